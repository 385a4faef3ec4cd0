"""What a robot's controller imports: PolicyClient(target).act(observation). Needs grpcio, protobuf and numpy alone."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from protos.codec import pack_observation, unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.spaces import Observation, PolicySpec, Pose

RETRY_AFTER_S = (0.02, 0.05, 0.1)
"""Waits before another attempt at a call that was answered UNAVAILABLE; then the error is the caller's."""
POLL_S = 0.1
CHANNEL_OPTIONS = [
    ("grpc.enable_retries", 0),  # retries are ours: bounded, within the deadline, UNAVAILABLE only
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class PolicyError(Exception):
    """A call that failed.

    Attributes:
        code: the gRPC status, e.g. grpc.StatusCode.INVALID_ARGUMENT.
        message: what the server said: the field, what it expected, what came.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"{code.name}: {message}")


@dataclass(frozen=True)
class Answer:
    """One answer. Actions and std are float32 [A], in the order of the contract's components, in physical units."""

    action: NDArray[np.float32]
    """To apply, within `valid_for_us` of now."""
    raw_action: NDArray[np.float32]
    """What the policy said before the server's limits."""
    std: NDArray[np.float32]
    value: float | None
    interventions: tuple[pb.Intervention, ...]
    """Every difference between raw_action and action, with its reason."""
    latency_ms: float
    """From this call's start to its end, retries included."""
    timing: pb.Timing
    """Where the server spent its part."""
    policy: str
    version: str
    valid_for_us: int


class PolicyClient:
    """A connection to one policy of one server. Use as a context manager; threads may share it.

    Args:
        target: "host:port".
        policy, version: empty: the server's default and newest.
        timeout_s: deadline of every call, retries included.
        spec: the contract that the caller was built for. Compared with the server's at the first call, which raises
            `protos.errors.Rejected` naming the field that differs; left out, the server's is taken.
    """

    def __init__(
        self,
        target: str,
        policy: str = "",
        version: str = "",
        *,
        timeout_s: float = 1.0,
        spec: PolicySpec | None = None,
    ) -> None:
        self._policy, self._version, self._timeout_s, self._expected = policy, version, timeout_s, spec
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.PolicyServiceStub(self._channel)
        self._connected: tuple[pb.PolicyInfo, PolicySpec] | None = None

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def wait_ready(self, timeout_s: float = 30.0) -> pb.PolicyInfo:
        """Wait until the server answers for the policy: it listens before its policies have proved themselves."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.policy()
            except PolicyError as error:
                retry = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                if not retry or time.monotonic() + POLL_S >= deadline:
                    raise
            time.sleep(POLL_S)

    def policy(self) -> pb.PolicyInfo:
        """What acts: contract, provenance and the proofs it passed, as of the first call."""
        return self._connect()[0]

    @property
    def spec(self) -> PolicySpec:
        """The contract: shape and orientation of the view, fields and limits of the action."""
        return self._connect()[1]

    def act(self, observation: Observation, pose: Pose | None = None) -> Answer:
        """One observation in, one limited motion out.

        Args:
            pose: where the gripper is; needed by a server that keeps a workspace.

        Raises:
            PolicyError: anything but an answer. Do not move on it.
        """
        start = time.perf_counter()
        spec = self.spec
        request = pb.GetActionRequest(
            observation=pack_observation(observation, pose=pose),
            policy=self._policy,
            version=self._version,
            contract_digest=spec.digest,
        )
        response = self._call(self._stub.GetAction, request)
        return Answer(
            action=unpack_action(response.action, spec.action),
            raw_action=unpack_action(response.raw_action, spec.action),
            std=unpack_action(response.std, spec.action),
            value=response.value if response.HasField("value") else None,
            interventions=tuple(response.interventions),
            latency_ms=(time.perf_counter() - start) * 1e3,
            timing=response.timing,
            policy=response.policy,
            version=response.version,
            valid_for_us=response.valid_for_us,
        )

    def _connect(self) -> tuple[pb.PolicyInfo, PolicySpec]:
        if self._connected is None:
            request = pb.GetPolicyRequest(name=self._policy, version=self._version)
            info = self._call(self._stub.GetPolicy, request).policy
            served = PolicySpec.from_json(info.contract)
            if self._expected is not None:
                self._expected.require_same(served, f"policy {info.name} {info.version}")
            self._connected = info, served
        return self._connected

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        """One call, tried again on UNAVAILABLE only: any other status would be the same again, or may have acted."""
        deadline = time.monotonic() + self._timeout_s
        waits = iter(RETRY_AFTER_S)
        while True:
            try:
                return method(request, timeout=max(deadline - time.monotonic(), 0.0))
            except grpc.RpcError as error:
                wait = next(waits, math.inf) * random.uniform(0.5, 1.0)  # not all robots at once
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() + wait >= deadline:
                    raise PolicyError(error.code(), error.details() or "") from None
            time.sleep(wait)
