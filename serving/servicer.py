"""The wire: message -> validated -> inferred -> limited -> message. What can go wrong there: serving.answering."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc import code_pb2

from protos.codec import pack_action, unpack_observation, unpack_pose
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import Rejected, Status
from protos.spaces import Observation, PolicySpec, Pose
from serving.answering import Answering, Call
from serving.dispatcher import Dispatcher
from serving.envelope import Decision, Envelope, Limits
from serving.frames import FrameWatch, Look
from serving.past import Before, Past
from serving.policy import BATCH, Policy, Proposal
from serving.recorder import Recorder
from serving.registry import Registry
from serving.sampling import sample
from serving.sessions import Episode, Sessions
from serving.stats import stats_of

MAX_BATCH_ITEMS = 256
MODES = frozenset(pb.Mode.values())


@dataclass(frozen=True)
class _Task:
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


class PolicyServicer(pb_grpc.PolicyServiceServicer):
    """Acting, and asking what acts."""

    def __init__(
        self,
        registry: Registry,
        answering: Answering,
        dispatcher: Dispatcher,
        sessions: Sessions,
        frames: FrameWatch,
        *,
        limits: Limits,
        valid_for_s: float,
        recorder: Callable[[], Recorder | None],
    ) -> None:
        self._registry, self._answering, self._metrics = registry, answering, answering.metrics
        self._dispatcher, self._sessions, self._frames = dispatcher, sessions, frames
        self._limits, self._valid_for_s, self._recorder = limits, valid_for_s, recorder
        self._envelopes: dict[str, Envelope] = {}

    def GetAction(self, request: pb.GetActionRequest, context: grpc.ServicerContext) -> pb.GetActionResponse:
        with self._answering("GetAction", context) as call:
            call.phases.seconds["queue"] = call.pool_s
            if request.episode_id:
                _require_mode(request.mode)
                _require_order(request)
                episode = self._sessions.get(request.episode_id)
                episode.require_pinned(request)
                return episode.step(request, call.patience_s, lambda before: self._act(request, call, episode, before))
            _require_no_episode(request, "call StartEpisode first")
            return self._act(request, call)

    def GetActionBatch(
        self, request: pb.GetActionBatchRequest, context: grpc.ServicerContext
    ) -> pb.GetActionBatchResponse:
        with self._answering("GetActionBatch", context) as call:
            if not 1 <= len(request.requests) <= MAX_BATCH_ITEMS:
                raise Rejected("requests", f"1 to {MAX_BATCH_ITEMS} items", str(len(request.requests)))
            items = [pb.GetActionBatchResponse.Item() for _ in request.requests]
            tasks: dict[Policy, list[tuple[int, _Task]]] = {}
            for i, one in enumerate(request.requests):
                try:
                    _require_no_episode(one, "an episode acts by GetAction, and not in a batch")
                    task = self._understand(one, call)
                    tasks.setdefault(task.policy, []).append((i, task))
                except Rejected as refused:
                    items[i].status.CopyFrom(_item_status(refused))
            self._dispatcher.asks_more(call.client, max(0, sum(map(len, tasks.values())) - 1))
            for policy, group in tasks.items():
                size = self._dispatcher.part(call.client, BATCH)  # others get their turns in between
                for start in range(0, len(group), size):
                    self._act_together(policy, group[start : start + size], items, call)
            return pb.GetActionBatchResponse(items=items)

    def _act_together(
        self,
        policy: Policy,
        group: Sequence[tuple[int, _Task]],
        items: list[pb.GetActionBatchResponse.Item],
        call: Call,
    ) -> None:
        """One turn for the tasks of these items."""
        try:
            turn = self._dispatcher.act(policy, [task.observation for _, task in group], call.caller(math.inf))
        except Rejected as refused:
            if refused.status is Status.DEADLINE_EXCEEDED:  # of the whole call: nobody waits for the other items
                raise
            for i, _ in group:
                items[i].status.CopyFrom(_item_status(refused))
            return
        for (i, task), proposal in zip(group, turn.proposals, strict=True):
            items[i].response.CopyFrom(self._respond(task, proposal, call))

    def StartEpisode(self, request: pb.StartEpisodeRequest, context: grpc.ServicerContext) -> pb.StartEpisodeResponse:
        with self._answering("StartEpisode", context) as call:
            policy = self._registry.resolve(request.policy, request.version)
            spec = policy.spec
            if request.contract:
                PolicySpec.from_json(request.contract).require_same(spec, f"policy {policy.name} {policy.version}")
            _require_mode(request.mode)
            envelope = self._envelope(policy).tighter(request.limits)
            episode = self._sessions.start(policy, envelope, request.mode or pb.MODE_GREEDY, request.seed)
            in_force = envelope.limits.in_force(spec.action)
            response = pb.StartEpisodeResponse(
                episode_id=episode.id,
                policy=policy.name,
                version=policy.version,
                contract_digest=spec.digest,
                limits={name: value for name, value in in_force.items() if math.isfinite(value)},
            )
            self._record(pb.FlightStart, policy, client=call.client, request=request, response=response)
            return response

    def EndEpisode(self, request: pb.EndEpisodeRequest, context: grpc.ServicerContext) -> pb.EndEpisodeResponse:
        with self._answering("EndEpisode", context) as call:
            if request.outcome not in pb.EndEpisodeRequest.Outcome.values():
                raise Rejected("outcome", "an Outcome", str(request.outcome))
            # Behind a step under way: a recording whose end comes before its last step would have a gap.
            response = pb.EndEpisodeResponse(steps=self._sessions.end(request.episode_id, call.patience_s))
            self._record(pb.FlightEnd, client=call.client, request=request, response=response)
            return response

    def ListPolicies(self, request: pb.ListPoliciesRequest, context: grpc.ServicerContext) -> pb.ListPoliciesResponse:
        with self._answering("ListPolicies", context):
            default = self._registry.resolve("", "")
            return pb.ListPoliciesResponse(
                policies=[
                    pb.ListPoliciesResponse.Entry(
                        name=p.name,
                        version=p.version,
                        contract_digest=p.spec.digest,
                        task=p.manifest.task,
                        is_default=p is default,
                    )
                    for p in self._registry
                ]
            )

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        with self._answering("GetPolicy", context):
            return pb.GetPolicyResponse(policy=self._registry.resolve(request.name, request.version, "name").info())

    def GetStats(self, request: pb.GetStatsRequest, context: grpc.ServicerContext) -> pb.GetStatsResponse:
        with self._answering("GetStats", context):
            return stats_of(self._metrics, self._dispatcher, self._sessions, self._recorder())

    def _act(
        self,
        request: pb.GetActionRequest,
        call: Call,
        episode: Episode | None = None,
        before: Before | None = None,
    ) -> pb.GetActionResponse:
        """One observation's way through the server."""
        phases = call.phases
        with phases.timed("decode"):
            task = self._understand(request, call, episode, before)
        left_s = self._valid_for_s - task.age_s
        try:
            caller = call.caller(left_s - call.elapsed_s, last_turn=True)
            turn = self._dispatcher.act(task.policy, [task.observation], caller)
        except Rejected as refused:
            if refused.status is Status.DEADLINE_EXCEEDED and call.elapsed_s >= left_s:
                raise self._stale(task.age_s + call.elapsed_s) from refused
            raise
        phases.seconds["queue"] += turn.queue_s
        phases.seconds["inference"] = turn.inference_s
        response = self._respond(task, turn.proposals[0], call)
        said = {"request_id": call.request_id, "client": call.client}
        frame = task.observation.depth.nbytes  # all else of a request that was found good is short
        self._record(pb.FlightAction, task.policy, told=frame, **said, request=request, response=response)
        return response

    def _understand(
        self,
        request: pb.GetActionRequest,
        call: Call,
        episode: Episode | None = None,
        before: Before | None = None,
    ) -> _Task:
        """Everything that can be refused before the model is asked."""
        policy = episode.policy if episode else self._registry.resolve(request.policy, request.version)
        policy.require_contract(request.contract_digest)
        _require_mode(request.mode)
        if not request.HasField("observation"):
            raise Rejected("observation", "an observation", "none")
        observation = unpack_observation(request.observation, policy.spec.observation)
        age_s = request.observation.age_us / 1e6
        if age_s + call.elapsed_s >= self._valid_for_s:
            raise self._stale(age_s + call.elapsed_s)
        look = self._frames.look((episode.id, call.client) if episode else (call.client,), observation)
        envelope, pose = episode.envelope if episode else self._envelope(policy), unpack_pose(request.observation)
        envelope.require_pose(pose)
        mode, seed = (episode.mode, (episode.seed, request.step)) if episode else (request.mode, request.seed)
        return _Task(
            policy,
            envelope,
            observation,
            pose,
            age_s,
            look,
            np.random.default_rng(seed) if mode == pb.MODE_SAMPLE else None,
            before or Past().before(request),
        )

    def _respond(self, task: _Task, proposal: Proposal, call: Call) -> pb.GetActionResponse:
        """From what the policy said to what may be executed."""
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
                interventions=[
                    pb.Intervention(field=i.field, rule=i.rule, before=i.before, after=i.after, limit=i.limit)
                    for i in decision.interventions
                ],
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

    def _count(self, decision: Decision, task: _Task) -> None:
        for change in decision.interventions:
            self._metrics.intervened(change.field, change.rule)
        if decision.hold:
            self._metrics.held(task.policy.name)
        if task.look.warnings:
            self._metrics.warned()
        self._frames.answered(task.look)

    def _envelope(self, policy: Policy) -> Envelope:
        digest = policy.spec.digest
        if digest not in self._envelopes:
            self._envelopes[digest] = Envelope(policy.spec, self._limits)
        return self._envelopes[digest]

    def _record(
        self, kind: type[Message], policy: Policy | None = None, *, told: int | None = None, **fields: Message | str
    ) -> None:
        recorder = self._recorder()
        if recorder is not None:
            recorder.put(kind, policy, told=told, **fields)

    def _stale(self, age_s: float) -> Rejected:
        expected = f"a frame younger than {self._valid_for_s * 1e3:g} ms when it is acted on"
        got = f"one of {age_s * 1e3:.0f} ms"
        return Rejected("observation.age_us", expected, got, "send a newer frame", Status.OUT_OF_RANGE)


def _require_mode(mode: int) -> None:
    if mode not in MODES:
        raise Rejected("mode", ", ".join(pb.Mode.keys()), str(mode))


def _require_no_episode(request: pb.GetActionRequest, remedy: str) -> None:
    for name, said in (
        ("episode_id", request.episode_id),
        ("step", request.step),
        ("applied_step", request.HasField("applied_step")),
    ):
        if said:
            raise Rejected(name, "nothing outside an episode", str(getattr(request, name)), remedy)


def _require_order(request: pb.GetActionRequest) -> None:
    if request.HasField("applied_step") and request.applied_step >= request.step:
        raise Rejected("applied_step", f"a step before this one, {request.step}", str(request.applied_step))


def _item_status(refused: Rejected) -> pb.ItemStatus:
    return pb.ItemStatus(code=code_pb2.Code.Value(refused.status.value), message=str(refused))
