"""A complete controller with the raw stubs: `python docs/examples/controller.py localhost:50051`.

It needs equiserve (the stubs, the contract) and grpcio-status; a server with tokens wants one in $TOKEN, and one with
another --valid-for-ms that in $VALID_FOR_MS. Replace `camera` and `move`. docs/protocol.md explains every field,
controller.cc is the same program in C++, and serving.client does all this in a call.
"""

import os
import sys
import time
from collections.abc import Sequence

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.spaces import SPEC

STEPS = 5
FRESH_S = float(os.environ.get("VALID_FOR_MS", "200")) / 1e3
"""The server's --valid-for-ms: of an older frame it says nothing, and what it has said comes too late."""
PATIENCE = 3
"""So many steps in a row without a motion, and the episode is over."""


def camera(step: int) -> NDArray[np.float32]:
    """[H, W] metres below the camera plane: a table, and a block that comes nearer from step to step."""
    depth = np.full(SPEC.observation.shape, 0.30, np.float32)
    row = 20 + 4 * step
    depth[row : row + 14, 50:64] = 0.24
    return depth


def move(action: pb.Action) -> None:
    """Relative to where the gripper is."""
    print(f"  p {action.p:.2f}, ({action.dx:+.4f}, {action.dy:+.4f}, {action.dz:+.4f}) m, {action.dtheta:+.3f} rad")


class Controller:
    """One episode on one server."""

    def __init__(self, channel: grpc.Channel, token: str = "") -> None:
        self._policies = pb_grpc.PolicyServiceStub(channel)
        self._applied, self._at_rest = 0, True  # the newest step that was carried out; whether the arm stands still
        self._metadata: Sequence[tuple[str, str]] = [("authorization", f"Bearer {token}")] if token else []

    def run(self) -> bool:
        """Whether the episode was not given up before any answer."""
        start = pb.StartEpisodeRequest(contract=SPEC.to_json(), limits={"planar": 0.02})
        episode = self._policies.StartEpisode(start, timeout=5, metadata=self._metadata, wait_for_ready=True)
        print(f"episode of {episode.policy} {episode.version}")
        outcome, still = pb.EndEpisodeRequest.OUTCOME_SUCCESS, 0
        for step in range(1, STEPS + 1):
            still = 0 if self.step(episode.episode_id, step) else still + 1
            if still == PATIENCE:
                outcome = pb.EndEpisodeRequest.OUTCOME_ABORTED
                break
        self.mistake(episode.episode_id)
        end = pb.EndEpisodeRequest(episode_id=episode.episode_id, outcome=outcome, applied_step=self._applied)
        ended = self._policies.EndEpisode(end, timeout=5, metadata=self._metadata)
        print(f"{pb.EndEpisodeRequest.Outcome.Name(outcome)} after {ended.steps} answered steps")
        return outcome != pb.EndEpisodeRequest.OUTCOME_ABORTED or ended.steps > 0

    def step(self, episode_id: str, step: int) -> bool:
        """Look, ask, move. Whether the robot moved; if not, it stays where it is."""
        taken_s = time.monotonic()
        observation = pb.Observation(
            depth=camera(step).astype("<f4").tobytes(),
            encoding=pb.Observation.FLOAT32_METERS,
            height=SPEC.observation.height,
            width=SPEC.observation.width,
            gripper=0.0,
        )
        arm = {"applied_step": self._applied, "at_rest": self._at_rest}
        request = pb.GetActionRequest(observation=observation, episode_id=episode_id, step=step, **arm)
        self._at_rest = True  # unless an answer comes in time
        sent_s = time.monotonic()  # the first time: what the answer's validity counts from
        response = self._ask(request, taken_s)
        if response is None:
            return False
        for warning in response.warnings:
            print(f"  warning: {warning}")
        for change in response.interventions:
            print(f"  {change.field}: {change.rule} {change.limit:g}, {[*change.before]} -> {[*change.after]}")
        if time.monotonic() - sent_s >= response.valid_for_us / 1e6:
            print(f"step {step}: too late")
            return False
        print(f"step {step}: {'hold' if response.hold else 'move'}")
        move(response.action)  # of a hold: no motion, and a gripper that keeps what it has
        self._applied, self._at_rest = step, response.hold
        return not response.hold

    def _ask(self, request: pb.GetActionRequest, taken_s: float) -> pb.GetActionResponse | None:
        """The same step again only on UNAVAILABLE, and while the frame is fresh: nothing was wrong with the request."""
        metadata = self._metadata
        while (age_s := time.monotonic() - taken_s) < FRESH_S:
            request.observation.age_us = round(age_s * 1e6)
            try:
                return self._policies.GetAction(request, timeout=FRESH_S - age_s, metadata=metadata)
            except grpc.RpcError as error:
                explain(error)
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    return None
            time.sleep(0.02)
            metadata = [*self._metadata, ("x-retry", "1")]  # it may have been answered already
        return None

    def mistake(self, episode_id: str) -> None:
        """A deliberate one, to see what a refusal says."""
        observation = pb.Observation(
            depth=bytes(100), encoding=pb.Observation.FLOAT32_METERS, height=SPEC.observation.height,
            width=SPEC.observation.width,
        )  # fmt: skip
        self._ask(pb.GetActionRequest(observation=observation, episode_id=episode_id, step=STEPS + 1), time.monotonic())


def explain(error: grpc.RpcError) -> None:
    """The status, and where the server itself refused, the parts of its google.rpc.ErrorInfo."""
    print(f"refused: {error.code().name}: {error.details()}")
    status, info = rpc_status.from_call(error), error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            for part in ("field", "expected", "got", "remedy"):
                print(f"  {part}: {info.metadata[part]}")


def main() -> int:
    address = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
    with grpc.insecure_channel(address) as channel:
        try:
            return 0 if Controller(channel, os.environ.get("TOKEN", "")).run() else 1
        except grpc.RpcError as error:
            explain(error)
            return 1


if __name__ == "__main__":
    sys.exit(main())
