"""Say again what a recorded policy said, and compare: `python -m serving.replay RECORDING --policy policy.onnx`.

The model may have run in a batch then and runs alone now. Measured with onnxruntime 1.32 on x86-64: in batches of 1, 2,
3, 4 and 8 and with 1, 2 and 4 threads every output had the same bits, for the tests' policy (64 scenes) and two trained
equivariant ones (16 each). onnxruntime promises neither, nor the same bits on another processor or in another version.
"""

import struct
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from protos.codec import pack_action, unpack_action, unpack_observation, unpack_pose
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, shown
from protos.spaces import ActionSpec
from serving.envelope import Envelope, Limits
from serving.errors import PolicyRefused
from serving.flight import files_of, limits_of, read
from serving.past import Past
from serving.pipeline import reported
from serving.policy import Policy, load
from serving.sampling import sample

DIFFERENT, NOT_CARRIED_OUT = 1, 2
NO_START = "in episodes whose start is not in the recording: greedy or sampled is not known"


@dataclass(frozen=True)
class Replay:
    """Run policies again on what a flight recording shows, and compare what they say with what they said.

    A policy is known by the SHA-256 of its file, whatever it is called. Its raw action, std and value must have the
    same bits; sampled actions are drawn again from their seeds. So must the action that was answered, within the
    limits of the server and of the episode, and what the answer said of them: `interventions` and `hold`. Of recordings
    that do not tell those limits, the action must lie within the contract's.
    Where messages were dropped (the server counts them), the action before, on which limits of a jump and the gripper
    of a hold depend, may be another, and a difference none; a recording of an older server may differ for the
    same reason. Expect the same bits on the same kind of processor with the same onnxruntime; elsewhere the last ones
    may differ.

    Exit code 0: all that could be compared is the same. 1: something differs. 2: nothing could be compared, or the
    command itself could not be carried out.

    Example: python -m serving.server --policy policy.onnx --record recordings; later
    python -m serving.replay recordings --policy policy.onnx
    """

    recording: tyro.conf.Positional[Path]
    """A folder that serving.server --record wrote to, also one that it is writing to, or one .mcap file."""
    policy: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """policy.onnx as it was served. Repeat for several; left out, the answer says which versions are asked for."""
    intra_op_threads: int = 2
    """Threads that share one inference, as the server had them."""
    show: int = 5
    """How many differences to print."""

    def run(self) -> int:
        if self.intra_op_threads < 1:
            raise Rejected("--intra-op-threads", "at least 1", str(self.intra_op_threads))
        again = Again([load(path, intra_op_threads=self.intra_op_threads) for path in self.policy])
        for file in files_of(self.recording):
            before = again.compared
            try:
                again.compare(file)
            except Rejected as damaged:
                if file.exists():
                    raise
                print(f"{file}: removed meanwhile, as a recorder does with its oldest ({damaged.got})", flush=True)
                continue
            print(f"{file}: {again.compared - before} compared", flush=True)
        for line in again.differences[: self.show]:
            print(f"different: {line}")
        print(f"{again.same} the same, {len(again.differences)} different, {again.skipped.total()} skipped")
        if again.unlimited:
            print(
                f"of {again.unlimited} the recording does not tell the server's limits: only the contract's were kept"
            )
        for reason, count in again.skipped.items():
            print(f"skipped {count} {reason}")
        if again.differences:
            return DIFFERENT
        if not again.same:
            print("nothing could be compared", file=sys.stderr)
            return NOT_CARRIED_OUT
        return 0


class Again:
    """Compares recordings, file by file in the order of recording, with what `policies` say now."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = {policy.version: policy for policy in policies}
        self._envelopes = {policy.version: Envelope(policy.spec) for policy in policies}
        self._limits: dict[str, Limits] = {}
        """By version: what the server kept it within, where the recording tells."""
        self._episodes: dict[str, pb.StartEpisodeRequest] = {}
        self._pasts: dict[str, Past] = {}
        """Of each of those."""
        self.same = 0
        self.unlimited = 0
        """Compared without knowing the limits that the server kept."""
        self.differences: list[str] = []
        """Of an action each: its file, its request, and what differs."""
        self.skipped: Counter[str] = Counter()
        """By reason."""

    @property
    def compared(self) -> int:
        return self.same + len(self.differences)

    def compare(self, file: Path) -> None:
        """Raises Rejected when the file is damaged."""
        for entry in read(file):
            message = entry.message
            if isinstance(message, pb.FlightPolicy) and message.HasField("limits"):
                self._limits[message.policy.version] = limits_of(message.limits)
            elif isinstance(message, pb.FlightStart):
                self._episodes[message.response.episode_id] = message.request
            elif isinstance(message, pb.FlightEnd):
                self._episodes.pop(message.request.episode_id, None)
                self._pasts.pop(message.request.episode_id, None)
            elif isinstance(message, pb.FlightAction):
                self._compare(file, message)

    def _compare(self, file: Path, recorded: pb.FlightAction) -> None:
        request, response = recorded.request, recorded.response
        policy = self._policies.get(response.version)
        if policy is None:
            self.skipped[f"of {shown(response.policy)} {response.version}: no --policy is that version"] += 1
        elif request.episode_id and request.episode_id not in self._episodes:
            self.skipped[NO_START] += 1
        else:
            now = self._answer(policy, request)
            self.unlimited += not now.HasField("action")
            if different := [*_differences(now, response, policy), *self._beyond(response)]:
                self.differences.append(f"{file}, request {recorded.request_id}: {'; '.join(different)}")
            else:
                self.same += 1
        if policy is not None and request.episode_id in self._episodes:
            past = self._pasts.setdefault(request.episode_id, Past())
            past.answered(request, unpack_action(response.action, policy.spec.action))

    def _answer(self, policy: Policy, request: pb.GetActionRequest) -> pb.GetActionResponse:
        """What serving.pipeline says: raw_action, std and value, and where limits are known the action and the rest."""
        spec = policy.spec.action
        observation = unpack_observation(request.observation, policy.spec.observation)
        proposal = policy.act(observation)
        episode = self._episodes.get(request.episode_id)
        mode, seed = (episode.mode, (episode.seed, request.step)) if episode else (request.mode, request.seed)
        proposed = proposal.action
        if mode == pb.MODE_SAMPLE and proposal.sound:
            proposed = sample(proposed, proposal.std, spec, np.random.default_rng(seed))
        answer = pb.GetActionResponse(
            raw_action=pack_action(proposed, spec), std=pack_action(proposal.std, spec), value=proposal.value
        )
        if (limits := self._limits.get(policy.version)) is not None:
            envelope = Envelope(policy.spec, limits).tighter(episode.limits if episode else {})
            before = self._pasts.get(request.episode_id, Past()).before(request)
            decision = envelope.decide(
                proposed,
                sound=proposal.sound,
                gripper=observation.gripper,
                pose=unpack_pose(request.observation),
                previous=before.action,
                at_rest=before.at_rest,
            )
            answer.action.CopyFrom(pack_action(decision.action, spec))
            answer.interventions.extend(reported(decision))
            answer.hold = decision.hold
        return answer

    def _beyond(self, response: pb.GetActionResponse) -> list[str]:
        """The fields of what was executed that lie outside the policy's limits."""
        envelope = self._envelopes[response.version]
        decision = envelope.decide(unpack_action(response.action, envelope.spec.action))
        return [f"action.{i.field} {list(i.before)} is not within {i.limit:g}" for i in decision.interventions]


def _differences(now: pb.GetActionResponse, then: pb.GetActionResponse, policy: Policy) -> list[str]:
    parts = ("raw_action", "std", *(["action"] if now.HasField("action") else []))
    left, right = (_numbers(response, policy.spec.action, parts) for response in (then, now))
    different = [
        f"{name} was {left.get(name, 'absent')}, is {right.get(name, 'absent')}"
        for name in left | right
        if _bits(left.get(name)) != _bits(right.get(name))
    ]
    if now.HasField("action"):
        told, tells = ([change.SerializeToString() for change in one.interventions] for one in (then, now))
        if told != tells:
            different.append(f"interventions were {_named(then)}, are {_named(now)}")
        if then.hold != now.hold:
            different.append(f"hold was {then.hold}, is {now.hold}")
    return different


def _named(response: pb.GetActionResponse) -> str:
    return ", ".join(f"{i.field} {i.rule} {i.limit:g} to {list(i.after)}" for i in response.interventions) or "none"


def _numbers(response: pb.GetActionResponse, spec: ActionSpec, parts: Sequence[str]) -> dict[str, float]:
    """Every number of an answer's parts, and its value, by name."""
    numbers = {f"{part}.{name}": getattr(getattr(response, part), name) for part in parts for name in spec.components}
    return numbers | ({"value": response.value} if response.HasField("value") else {})


def _bits(number: float | None) -> bytes:
    return b"" if number is None else struct.pack("<f", number)


def main(argv: list[str] | None = None) -> int:
    asked = tyro.cli(Replay, args=argv, prog="python -m serving.replay")
    try:
        return asked.run()
    except (Rejected, PolicyRefused) as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return NOT_CARRIED_OUT


if __name__ == "__main__":
    sys.exit(main())
