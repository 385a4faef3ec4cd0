"""One observation's way through the server: checked, asked of the model in turn, limited, packed, recorded."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import Message

from protos.codec import pack_action, unpack_observation, unpack_pose
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status
from protos.spaces import Observation, Pose
from serving.answering import Call
from serving.dispatcher import Dispatcher
from serving.envelope import Decision, Envelope, Limits
from serving.frames import FrameWatch, Look
from serving.metrics import Metrics
from serving.past import Before, Past
from serving.policy import Policy, Proposal
from serving.recorder import Recorder
from serving.registry import Registry
from serving.sampling import sample
from serving.sessions import Episode

MODES = frozenset(pb.Mode.values())


@dataclass(frozen=True)
class Task:
    """A request that was found good: what to ask of which policy, within which limits."""

    policy: Policy
    envelope: Envelope
    observation: Observation
    pose: Pose | None
    age_s: float
    look: Look
    rng: np.random.Generator | None
    """Where to draw from, or None for the greedy action."""
    before: Before


class Pipeline:
    """What GetAction and GetActionBatch share."""

    def __init__(
        self,
        registry: Registry,
        dispatcher: Dispatcher,
        frames: FrameWatch,
        metrics: Metrics,
        *,
        limits: Limits,
        valid_for_s: float,
        recorder: Callable[[], Recorder | None],
    ) -> None:
        self._registry, self._dispatcher, self._frames, self._metrics = registry, dispatcher, frames, metrics
        self._limits, self._valid_for_s, self._recorder = limits, valid_for_s, recorder
        self._envelopes: dict[str, Envelope] = {}

    def envelope(self, policy: Policy) -> Envelope:
        """What the server keeps such a policy within."""
        digest = policy.spec.digest
        if digest not in self._envelopes:
            self._envelopes[digest] = Envelope(policy.spec, self._limits)
        return self._envelopes[digest]

    def act(
        self,
        request: pb.GetActionRequest,
        call: Call,
        episode: Episode | None = None,
        before: Before | None = None,
    ) -> pb.GetActionResponse:
        """The whole way, for one call.

        Args:
            episode: the one that `request` is a step of, which pins policy, mode and limits.
            before: what came before that step.

        Raises:
            Rejected: what `understand` and Dispatcher.act raise; OUT_OF_RANGE where the frame grew too old in the line.
        """
        phases = call.phases
        with phases.timed("decode"):
            task = self.understand(request, call, episode, before)
        left_s = self._valid_for_s - task.age_s
        try:
            caller = call.caller(left_s - call.elapsed_s, last_turn=True)
            turn = self._dispatcher.act(task.policy, [task.observation], caller)
        except Rejected as refused:
            if refused.status is Status.DEADLINE_EXCEEDED and call.elapsed_s >= left_s and not call.is_late:
                raise self._stale(task.age_s + call.elapsed_s) from refused
            raise
        phases.seconds["queue"] += turn.queue_s
        phases.seconds["inference"] = turn.inference_s
        response = self.respond(task, turn.proposals[0], call)
        said = {"request_id": call.request_id, "client": call.client}
        frame = task.observation.depth.nbytes  # no less than it took on the wire; all else of a good request is short
        self.record(pb.FlightAction, task.policy, size_bytes=frame, **said, request=request, response=response)
        return response

    def understand(
        self,
        request: pb.GetActionRequest,
        call: Call,
        episode: Episode | None = None,
        before: Before | None = None,
    ) -> Task:
        """Everything that can be refused before the model is asked.

        Raises:
            Rejected: naming the field that is not as the policy's contract, or the server's rules, want it.
        """
        policy = episode.policy if episode else self._registry.resolve(request.policy, request.version)
        policy.require_contract(request.contract_digest)
        require_mode(request.mode)
        if not request.HasField("observation"):
            raise Rejected("observation", "an observation", "none")
        observation = unpack_observation(request.observation, policy.spec.observation)
        age_s = request.observation.age_us / 1e6
        if age_s + call.elapsed_s >= self._valid_for_s:
            raise self._stale(age_s + call.elapsed_s)
        try:
            look = self._frames.look((episode.id, call.client) if episode else (call.client,), observation)
        except Rejected:  # where the rules are strict
            self._metrics.warned()
            raise
        envelope, pose = episode.envelope if episode else self.envelope(policy), unpack_pose(request.observation)
        envelope.require_pose(pose)
        mode, seed = (episode.mode, (episode.seed, request.step)) if episode else (request.mode, request.seed)
        return Task(
            policy,
            envelope,
            observation,
            pose,
            age_s,
            look,
            np.random.default_rng(seed) if mode == pb.MODE_SAMPLE else None,
            before or Past().before(request),
        )

    def respond(self, task: Task, proposal: Proposal, call: Call) -> pb.GetActionResponse:
        """From what the policy said to what may be executed: sampled, limited, counted, packed.

        Raises:
            Rejected: what Envelope.decide raises.
        """
        spec = task.policy.spec.action
        with call.phases.timed("safety"):
            proposed, sound = proposal.action, proposal.sound
            if task.rng is not None and sound:
                proposed = sample(proposed, proposal.std, spec, task.rng)
            decision = task.envelope.decide(
                proposed,
                sound=sound,
                gripper=task.observation.gripper,
                pose=task.pose,
                previous=task.before.action,
                at_rest=task.before.at_rest,
            )
            self._count(decision, task)
        with call.phases.timed("encode"):
            response = pb.GetActionResponse(
                action=pack_action(decision.action, spec),
                raw_action=pack_action(proposed, spec),
                std=pack_action(proposal.std, spec),
                value=proposal.value,
                interventions=reported(decision),
                policy=task.policy.name,
                version=task.policy.version,
                contract_digest=task.policy.spec.digest,
                valid_for_us=round((self._valid_for_s - task.age_s) * 1e6),
                hold=decision.hold,
                warnings=task.look.warnings,
                request_id=call.request_id,
            )
        phases = call.phases
        response.timing.decode_us, response.timing.queue_us = phases.us("decode"), phases.us("queue")
        response.timing.inference_us, response.timing.safety_us = phases.us("inference"), phases.us("safety")
        response.timing.encode_us = phases.us("encode")
        return response

    def _count(self, decision: Decision, task: Task) -> None:
        for change in decision.interventions:
            self._metrics.intervened(change.field, change.rule)
        if decision.hold:
            self._metrics.held(task.policy.name)
        if task.look.warnings:
            self._metrics.warned()
        self._frames.answered(task.look)

    def record(
        self,
        kind: type[Message],
        policy: Policy | None = None,
        *,
        size_bytes: int | None = None,
        **fields: Message | str,
    ) -> None:
        """Hand a message to the flight recorder, if there is one: see Recorder.put."""
        recorder = self._recorder()
        if recorder is not None:
            recorder.put(kind, policy, size_bytes=size_bytes, **fields)

    def _stale(self, age_s: float) -> Rejected:
        expected = f"a frame younger than {self._valid_for_s * 1e3:g} ms when it is acted on"
        got = f"one of {age_s * 1e3:.0f} ms"
        return Rejected("observation.age_us", expected, got, "send a newer frame", Status.OUT_OF_RANGE)


def reported(decision: Decision) -> list[pb.Intervention]:
    """What the envelope changed, as a reply tells it."""
    return [
        pb.Intervention(field=i.field, rule=i.rule, before=i.before, after=i.after, limit=i.limit)
        for i in decision.interventions
    ]


def require_mode(mode: int) -> None:
    """Raises Rejected, naming the field, where `mode` is no pb.Mode."""
    if mode not in MODES:
        raise Rejected("mode", ", ".join(pb.Mode.keys()), str(mode))
