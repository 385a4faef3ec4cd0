"""PolicyService's methods. An observation's way: serving.pipeline; how calls begin and end: serving.answering."""

import math
from collections.abc import Callable, Sequence

import grpc
from google.rpc import code_pb2

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import Rejected, Status
from protos.spaces import PolicySpec
from serving.answering import Answering, Call
from serving.dispatcher import Dispatcher
from serving.parsing import MAX_BATCH_ITEMS
from serving.pipeline import Pipeline, Task, require_mode
from serving.policy import BATCH, Policy
from serving.recorder import Recorder
from serving.registry import Registry
from serving.sessions import Sessions
from serving.stats import stats_of


class PolicyServicer(pb_grpc.PolicyServiceServicer):
    """Acting, and asking what acts."""

    def __init__(
        self,
        registry: Registry,
        answering: Answering,
        dispatcher: Dispatcher,
        sessions: Sessions,
        pipeline: Pipeline,
        *,
        recorder: Callable[[], Recorder | None],
    ) -> None:
        self._registry, self._answering, self._dispatcher = registry, answering, dispatcher
        self._sessions, self._pipeline, self._recorder = sessions, pipeline, recorder

    def GetAction(self, request: pb.GetActionRequest, context: grpc.ServicerContext) -> pb.GetActionResponse:
        with self._answering("GetAction", context) as call:
            call.phases.seconds["queue"] = call.pool_s
            if request.episode_id:
                require_mode(request.mode)
                _require_order(request)
                episode = self._sessions.get(request.episode_id)
                episode.require_pinned(request)
                return episode.step(
                    request, call.patience_s, lambda before: self._pipeline.act(request, call, episode, before)
                )
            _require_no_episode(request, "call StartEpisode first")
            return self._pipeline.act(request, call)

    def GetActionBatch(
        self, request: pb.GetActionBatchRequest, context: grpc.ServicerContext
    ) -> pb.GetActionBatchResponse:
        with self._answering("GetActionBatch", context) as call:
            if not 1 <= len(request.requests) <= MAX_BATCH_ITEMS:
                raise Rejected("requests", f"1 to {MAX_BATCH_ITEMS} items", str(len(request.requests)))
            items = [pb.GetActionBatchResponse.Item() for _ in request.requests]
            tasks: dict[Policy, list[tuple[int, Task]]] = {}
            for i, one in enumerate(request.requests):
                try:
                    _require_no_episode(one, "an episode acts by GetAction, and not in a batch")
                    task = self._pipeline.understand(one, call)
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
        group: Sequence[tuple[int, Task]],
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
            items[i].response.CopyFrom(self._pipeline.respond(task, proposal, call))

    def StartEpisode(self, request: pb.StartEpisodeRequest, context: grpc.ServicerContext) -> pb.StartEpisodeResponse:
        with self._answering("StartEpisode", context) as call:
            policy = self._registry.resolve(request.policy, request.version)
            spec = policy.spec
            if request.contract:
                PolicySpec.from_json(request.contract).require_same(spec, f"policy {policy.name} {policy.version}")
            require_mode(request.mode)
            envelope = self._pipeline.envelope(policy).tighter(request.limits)
            episode = self._sessions.start(policy, envelope, request.mode or pb.MODE_GREEDY, request.seed)
            in_force = envelope.limits.in_force(spec.action)
            response = pb.StartEpisodeResponse(
                episode_id=episode.id,
                policy=policy.name,
                version=policy.version,
                contract_digest=spec.digest,
                limits={name: value for name, value in in_force.items() if math.isfinite(value)},
            )
            self._pipeline.record(pb.FlightStart, policy, client=call.client, request=request, response=response)
            return response

    def EndEpisode(self, request: pb.EndEpisodeRequest, context: grpc.ServicerContext) -> pb.EndEpisodeResponse:
        with self._answering("EndEpisode", context) as call:
            if request.outcome not in pb.EndEpisodeRequest.Outcome.values():
                raise Rejected("outcome", "an Outcome", str(request.outcome))
            # Behind a step under way: a recording whose end comes before its last step would have a gap.
            response = pb.EndEpisodeResponse(steps=self._sessions.end(request.episode_id, call.patience_s))
            self._pipeline.record(pb.FlightEnd, client=call.client, request=request, response=response)
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
            return stats_of(self._answering.metrics, self._dispatcher, self._sessions, self._recorder())


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
