"""The wire: message -> validated -> inferred -> limited -> message, and every refusal as one gRPC status.

Until episodes exist, a request that carries `episode_id` or `step` is refused: to answer it would promise ordering and
idempotent retries that nobody keeps. Sampling is refused for a like reason: the graph gives the squashed mode and a
scale, and the exact draw (how the squash and the gripper's likelihood act) is known to the training code alone.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from protos.codec import pack_action, unpack_observation, unpack_pose
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import Rejected, Status
from serving import envelope
from serving.envelope import Decision, Workspace
from serving.errors import PolicyFault
from serving.metrics import Metrics, Phases
from serving.policy import Policy, Proposal
from serving.registry import Registry

log = logging.getLogger(__name__)

Method = Callable[[Any, Any, grpc.ServicerContext], None]


def _later(reason: str) -> Method:
    """A method that the contract declares and that this server does not have yet."""

    def refuse(self: Any, request: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)

    return refuse


class PolicyServicer(pb_grpc.PolicyServiceServicer):
    """Acting, and asking what acts."""

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        *,
        valid_for_us: int,
        workspace: Workspace | None = None,
        queued_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.registry, self.metrics = registry, metrics
        self.valid_for_us, self.workspace, self.queued_s = valid_for_us, workspace, queued_s

    def GetAction(self, request: pb.GetActionRequest, context: grpc.ServicerContext) -> pb.GetActionResponse:
        with self._answering("GetAction", context) as phases:
            _require_known_options(request)
            policy = self.registry.resolve(request.policy, request.version)
            _require_contract(request.contract_digest, policy)
            with phases.timed("decode"):
                if not request.HasField("observation"):
                    raise Rejected("observation", "an observation", "none")
                observation = unpack_observation(request.observation, policy.spec.observation)
                pose = unpack_pose(request.observation)
            with phases.timed("inference"):
                proposal = policy.act(observation)
            with phases.timed("safety"):
                decision = envelope.limit(proposal.action, policy.spec.action, pose, self.workspace)
            with phases.timed("encode"):
                response = self._pack(policy, proposal, decision)
            response.timing.CopyFrom(_timing(phases))
            return response

    def ListPolicies(self, request: pb.ListPoliciesRequest, context: grpc.ServicerContext) -> pb.ListPoliciesResponse:
        with self._answering("ListPolicies", context):
            default = self.registry.resolve("", "")
            return pb.ListPoliciesResponse(
                policies=[
                    pb.ListPoliciesResponse.Entry(
                        name=p.name,
                        version=p.version,
                        contract_digest=p.spec.digest,
                        task=p.manifest.task,
                        is_default=p is default,
                    )
                    for p in self.registry
                ]
            )

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        with self._answering("GetPolicy", context):
            return pb.GetPolicyResponse(policy=_info(self.registry.resolve(request.name, request.version, "name")))

    GetActionBatch = _later("GetActionBatch: this server answers single observations only; call GetAction")
    StartEpisode = _later("StartEpisode: this server has no episodes yet; GetAction needs none")
    EndEpisode = _later("EndEpisode: this server has no episodes yet")

    @contextmanager
    def _answering(self, method: str, context: grpc.ServicerContext) -> Iterator[Phases]:
        """Turn what goes wrong into one gRPC status, and count the call under it. No traceback leaves the server."""
        start, phases, refusal = time.perf_counter(), Phases(), None
        phases.seconds["queue"] = self.queued_s()
        try:
            yield phases
        except Rejected as rejected:
            refusal = grpc.StatusCode[rejected.status.value], str(rejected)
        except PolicyFault as fault:
            log.error("%s: %s", method, fault)
            refusal = grpc.StatusCode.INTERNAL, str(fault)
        except Exception:
            request_id = uuid.uuid4().hex[:12]
            log.exception("%s: request %s failed", method, request_id)
            refusal = grpc.StatusCode.INTERNAL, f"internal error; the server's log has it under request {request_id}"
        seconds = phases.seconds["queue"] + time.perf_counter() - start
        self.metrics.record(method, refusal[0].name if refusal else "OK", seconds, phases)
        if refusal:
            context.abort(*refusal)

    def _pack(self, policy: Policy, proposal: Proposal, decision: Decision) -> pb.GetActionResponse:
        spec = policy.spec
        return pb.GetActionResponse(
            action=pack_action(decision.action, spec.action),
            raw_action=pack_action(proposal.action, spec.action),
            std=pack_action(proposal.std, spec.action),
            value=proposal.value,
            interventions=[
                pb.Intervention(field=i.field, rule=i.rule, before=i.before, after=i.after, limit=i.limit)
                for i in decision.interventions
            ],
            policy=policy.name,
            version=policy.version,
            contract_digest=spec.digest,
            valid_for_us=self.valid_for_us,
        )


class PolicyAdminServicer(pb_grpc.PolicyAdminServicer):
    """Operating: declared, not yet built."""

    LoadPolicy = _later("LoadPolicy: policies are chosen at start, with --policy")
    UnloadPolicy = _later("UnloadPolicy: policies are chosen at start, with --policy")
    SetDefaultPolicy = _later("SetDefaultPolicy: the first --policy at start is the default")
    Drain = _later("Drain: send the server process SIGTERM")


def _require_known_options(request: pb.GetActionRequest) -> None:
    """Refuse what this server would otherwise silently ignore."""
    if request.episode_id or request.step:
        field = "episode_id" if request.episode_id else "step"
        remedy = "leave episode_id and step empty: this server has no episodes yet"
        raise Rejected(field, "nothing", "a value", remedy, Status.UNIMPLEMENTED)
    if request.mode == pb.MODE_SAMPLE:
        raise Rejected("mode", "MODE_GREEDY", "MODE_SAMPLE", "sampling is not built yet", Status.UNIMPLEMENTED)
    if request.mode not in pb.Mode.values():
        raise Rejected("mode", "MODE_GREEDY", str(request.mode))


def _require_contract(digest: str, policy: Policy) -> None:
    if digest and digest != policy.spec.digest:
        remedy = f"GetPolicy returns the contract of {policy.name} {policy.version}; compare it with yours"
        got = repr(digest[:64])
        raise Rejected("contract_digest", policy.spec.digest, got, remedy, Status.FAILED_PRECONDITION)


def _timing(phases: Phases) -> pb.Timing:
    return pb.Timing(
        decode_us=phases.us("decode"),
        queue_us=phases.us("queue"),
        inference_us=phases.us("inference"),
        safety_us=phases.us("safety"),
        encode_us=phases.us("encode"),
    )


def _info(policy: Policy) -> pb.PolicyInfo:
    m = policy.manifest
    return pb.PolicyInfo(
        name=policy.name,
        version=policy.version,
        sha256=policy.sha256,
        contract=m.spec.to_json(),
        contract_digest=m.spec.digest,
        task=m.task,
        algorithm=m.algorithm,
        equivariance=m.equivariance,
        group=m.group,
        seed=m.seed,
        dataset_id=m.dataset_id,
        dataset_sha256=m.dataset_sha256,
        code_version=m.code_version,
        proofs=[
            pb.PolicyInfo.Proof(name=p.name, measured=p.measured, bound=p.bound, detail=p.detail) for p in policy.proofs
        ],
        equivariance_error_90=m.equivariance_error_90,
        equivariance_error_45=m.equivariance_error_45,
        has_value=policy.has_value,
    )
