from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_GREEDY: _ClassVar[Mode]
    MODE_SAMPLE: _ClassVar[Mode]
MODE_UNSPECIFIED: Mode
MODE_GREEDY: Mode
MODE_SAMPLE: Mode

class Observation(_message.Message):
    __slots__ = ("depth", "encoding", "depth_scale", "height", "width", "gripper", "pose", "age_us")
    class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ENCODING_UNSPECIFIED: _ClassVar[Observation.Encoding]
        FLOAT32_METERS: _ClassVar[Observation.Encoding]
        UINT16_MILLIMETERS: _ClassVar[Observation.Encoding]
        UINT16: _ClassVar[Observation.Encoding]
    ENCODING_UNSPECIFIED: Observation.Encoding
    FLOAT32_METERS: Observation.Encoding
    UINT16_MILLIMETERS: Observation.Encoding
    UINT16: Observation.Encoding
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    DEPTH_SCALE_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    GRIPPER_FIELD_NUMBER: _ClassVar[int]
    POSE_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    depth: bytes
    encoding: Observation.Encoding
    depth_scale: float
    height: int
    width: int
    gripper: float
    pose: Pose
    age_us: int
    def __init__(self, depth: _Optional[bytes] = ..., encoding: _Optional[_Union[Observation.Encoding, str]] = ..., depth_scale: _Optional[float] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., gripper: _Optional[float] = ..., pose: _Optional[_Union[Pose, _Mapping]] = ..., age_us: _Optional[int] = ...) -> None: ...

class Pose(_message.Message):
    __slots__ = ("x", "y", "z", "yaw")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    YAW_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    z: float
    yaw: float
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ..., z: _Optional[float] = ..., yaw: _Optional[float] = ...) -> None: ...

class Action(_message.Message):
    __slots__ = ("p", "dx", "dy", "dz", "dtheta")
    P_FIELD_NUMBER: _ClassVar[int]
    DX_FIELD_NUMBER: _ClassVar[int]
    DY_FIELD_NUMBER: _ClassVar[int]
    DZ_FIELD_NUMBER: _ClassVar[int]
    DTHETA_FIELD_NUMBER: _ClassVar[int]
    p: float
    dx: float
    dy: float
    dz: float
    dtheta: float
    def __init__(self, p: _Optional[float] = ..., dx: _Optional[float] = ..., dy: _Optional[float] = ..., dz: _Optional[float] = ..., dtheta: _Optional[float] = ...) -> None: ...

class Intervention(_message.Message):
    __slots__ = ("field", "rule", "before", "after", "limit")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    field: str
    rule: str
    before: _containers.RepeatedScalarFieldContainer[float]
    after: _containers.RepeatedScalarFieldContainer[float]
    limit: float
    def __init__(self, field: _Optional[str] = ..., rule: _Optional[str] = ..., before: _Optional[_Iterable[float]] = ..., after: _Optional[_Iterable[float]] = ..., limit: _Optional[float] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("decode_us", "queue_us", "inference_us", "safety_us", "encode_us")
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_US_FIELD_NUMBER: _ClassVar[int]
    SAFETY_US_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    decode_us: int
    queue_us: int
    inference_us: int
    safety_us: int
    encode_us: int
    def __init__(self, decode_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., inference_us: _Optional[int] = ..., safety_us: _Optional[int] = ..., encode_us: _Optional[int] = ...) -> None: ...

class GetActionRequest(_message.Message):
    __slots__ = ("observation", "policy", "version", "episode_id", "step", "mode", "seed", "contract_digest", "at_rest", "applied_step")
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AT_REST_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    observation: Observation
    policy: str
    version: str
    episode_id: str
    step: int
    mode: Mode
    seed: int
    contract_digest: str
    at_rest: bool
    applied_step: int
    def __init__(self, observation: _Optional[_Union[Observation, _Mapping]] = ..., policy: _Optional[str] = ..., version: _Optional[str] = ..., episode_id: _Optional[str] = ..., step: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ..., seed: _Optional[int] = ..., contract_digest: _Optional[str] = ..., at_rest: _Optional[bool] = ..., applied_step: _Optional[int] = ...) -> None: ...

class GetActionResponse(_message.Message):
    __slots__ = ("action", "raw_action", "std", "value", "interventions", "policy", "version", "contract_digest", "valid_for_us", "timing", "hold", "warnings", "request_id")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    RAW_ACTION_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VALID_FOR_US_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    action: Action
    raw_action: Action
    std: Action
    value: float
    interventions: _containers.RepeatedCompositeFieldContainer[Intervention]
    policy: str
    version: str
    contract_digest: str
    valid_for_us: int
    timing: Timing
    hold: bool
    warnings: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    def __init__(self, action: _Optional[_Union[Action, _Mapping]] = ..., raw_action: _Optional[_Union[Action, _Mapping]] = ..., std: _Optional[_Union[Action, _Mapping]] = ..., value: _Optional[float] = ..., interventions: _Optional[_Iterable[_Union[Intervention, _Mapping]]] = ..., policy: _Optional[str] = ..., version: _Optional[str] = ..., contract_digest: _Optional[str] = ..., valid_for_us: _Optional[int] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., hold: _Optional[bool] = ..., warnings: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ...) -> None: ...

class GetActionBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[GetActionRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[GetActionRequest, _Mapping]]] = ...) -> None: ...

class ItemStatus(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class GetActionBatchResponse(_message.Message):
    __slots__ = ("items",)
    class Item(_message.Message):
        __slots__ = ("status", "response")
        STATUS_FIELD_NUMBER: _ClassVar[int]
        RESPONSE_FIELD_NUMBER: _ClassVar[int]
        status: ItemStatus
        response: GetActionResponse
        def __init__(self, status: _Optional[_Union[ItemStatus, _Mapping]] = ..., response: _Optional[_Union[GetActionResponse, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[GetActionBatchResponse.Item]
    def __init__(self, items: _Optional[_Iterable[_Union[GetActionBatchResponse.Item, _Mapping]]] = ...) -> None: ...

class StartEpisodeRequest(_message.Message):
    __slots__ = ("policy", "version", "mode", "seed", "contract", "limits")
    class LimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    version: str
    mode: Mode
    seed: int
    contract: str
    limits: _containers.ScalarMap[str, float]
    def __init__(self, policy: _Optional[str] = ..., version: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ..., seed: _Optional[int] = ..., contract: _Optional[str] = ..., limits: _Optional[_Mapping[str, float]] = ...) -> None: ...

class StartEpisodeResponse(_message.Message):
    __slots__ = ("episode_id", "policy", "version", "contract_digest", "limits")
    class LimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    policy: str
    version: str
    contract_digest: str
    limits: _containers.ScalarMap[str, float]
    def __init__(self, episode_id: _Optional[str] = ..., policy: _Optional[str] = ..., version: _Optional[str] = ..., contract_digest: _Optional[str] = ..., limits: _Optional[_Mapping[str, float]] = ...) -> None: ...

class EndEpisodeRequest(_message.Message):
    __slots__ = ("episode_id", "outcome", "applied_step")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[EndEpisodeRequest.Outcome]
        OUTCOME_SUCCESS: _ClassVar[EndEpisodeRequest.Outcome]
        OUTCOME_FAILURE: _ClassVar[EndEpisodeRequest.Outcome]
        OUTCOME_ABORTED: _ClassVar[EndEpisodeRequest.Outcome]
    OUTCOME_UNSPECIFIED: EndEpisodeRequest.Outcome
    OUTCOME_SUCCESS: EndEpisodeRequest.Outcome
    OUTCOME_FAILURE: EndEpisodeRequest.Outcome
    OUTCOME_ABORTED: EndEpisodeRequest.Outcome
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    outcome: EndEpisodeRequest.Outcome
    applied_step: int
    def __init__(self, episode_id: _Optional[str] = ..., outcome: _Optional[_Union[EndEpisodeRequest.Outcome, str]] = ..., applied_step: _Optional[int] = ...) -> None: ...

class EndEpisodeResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class ListPoliciesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoliciesResponse(_message.Message):
    __slots__ = ("policies",)
    class Entry(_message.Message):
        __slots__ = ("name", "version", "contract_digest", "task", "is_default")
        NAME_FIELD_NUMBER: _ClassVar[int]
        VERSION_FIELD_NUMBER: _ClassVar[int]
        CONTRACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
        TASK_FIELD_NUMBER: _ClassVar[int]
        IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
        name: str
        version: str
        contract_digest: str
        task: str
        is_default: bool
        def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., contract_digest: _Optional[str] = ..., task: _Optional[str] = ..., is_default: _Optional[bool] = ...) -> None: ...
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[ListPoliciesResponse.Entry]
    def __init__(self, policies: _Optional[_Iterable[_Union[ListPoliciesResponse.Entry, _Mapping]]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: PolicyInfo
    def __init__(self, policy: _Optional[_Union[PolicyInfo, _Mapping]] = ...) -> None: ...

class PolicyInfo(_message.Message):
    __slots__ = ("name", "version", "sha256", "contract", "contract_digest", "task", "algorithm", "equivariance", "group", "seed", "dataset_id", "dataset_sha256", "code_version", "proofs", "equivariance_error_90", "equivariance_error_45", "has_value", "inference_ms")
    class Proof(_message.Message):
        __slots__ = ("name", "measured", "bound", "detail")
        NAME_FIELD_NUMBER: _ClassVar[int]
        MEASURED_FIELD_NUMBER: _ClassVar[int]
        BOUND_FIELD_NUMBER: _ClassVar[int]
        DETAIL_FIELD_NUMBER: _ClassVar[int]
        name: str
        measured: float
        bound: float
        detail: str
        def __init__(self, name: _Optional[str] = ..., measured: _Optional[float] = ..., bound: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    EQUIVARIANCE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_SHA256_FIELD_NUMBER: _ClassVar[int]
    CODE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROOFS_FIELD_NUMBER: _ClassVar[int]
    EQUIVARIANCE_ERROR_90_FIELD_NUMBER: _ClassVar[int]
    EQUIVARIANCE_ERROR_45_FIELD_NUMBER: _ClassVar[int]
    HAS_VALUE_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    sha256: str
    contract: str
    contract_digest: str
    task: str
    algorithm: str
    equivariance: str
    group: str
    seed: int
    dataset_id: str
    dataset_sha256: str
    code_version: str
    proofs: _containers.RepeatedCompositeFieldContainer[PolicyInfo.Proof]
    equivariance_error_90: float
    equivariance_error_45: float
    has_value: bool
    inference_ms: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., sha256: _Optional[str] = ..., contract: _Optional[str] = ..., contract_digest: _Optional[str] = ..., task: _Optional[str] = ..., algorithm: _Optional[str] = ..., equivariance: _Optional[str] = ..., group: _Optional[str] = ..., seed: _Optional[int] = ..., dataset_id: _Optional[str] = ..., dataset_sha256: _Optional[str] = ..., code_version: _Optional[str] = ..., proofs: _Optional[_Iterable[_Union[PolicyInfo.Proof, _Mapping]]] = ..., equivariance_error_90: _Optional[float] = ..., equivariance_error_45: _Optional[float] = ..., has_value: _Optional[bool] = ..., inference_ms: _Optional[float] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("uptime_s", "calls", "latencies", "interventions", "running", "waiting", "open_episodes", "recorded", "dropped", "expired")
    class Calls(_message.Message):
        __slots__ = ("method", "code", "count")
        METHOD_FIELD_NUMBER: _ClassVar[int]
        CODE_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        method: str
        code: str
        count: int
        def __init__(self, method: _Optional[str] = ..., code: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...
    class Latency(_message.Message):
        __slots__ = ("phase", "p50_ms", "p95_ms", "p99_ms", "max_ms", "samples")
        PHASE_FIELD_NUMBER: _ClassVar[int]
        P50_MS_FIELD_NUMBER: _ClassVar[int]
        P95_MS_FIELD_NUMBER: _ClassVar[int]
        P99_MS_FIELD_NUMBER: _ClassVar[int]
        MAX_MS_FIELD_NUMBER: _ClassVar[int]
        SAMPLES_FIELD_NUMBER: _ClassVar[int]
        phase: str
        p50_ms: float
        p95_ms: float
        p99_ms: float
        max_ms: float
        samples: int
        def __init__(self, phase: _Optional[str] = ..., p50_ms: _Optional[float] = ..., p95_ms: _Optional[float] = ..., p99_ms: _Optional[float] = ..., max_ms: _Optional[float] = ..., samples: _Optional[int] = ...) -> None: ...
    class Rule(_message.Message):
        __slots__ = ("field", "rule", "count")
        FIELD_FIELD_NUMBER: _ClassVar[int]
        RULE_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        field: str
        rule: str
        count: int
        def __init__(self, field: _Optional[str] = ..., rule: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    OPEN_EPISODES_FIELD_NUMBER: _ClassVar[int]
    RECORDED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    uptime_s: float
    calls: _containers.RepeatedCompositeFieldContainer[GetStatsResponse.Calls]
    latencies: _containers.RepeatedCompositeFieldContainer[GetStatsResponse.Latency]
    interventions: _containers.RepeatedCompositeFieldContainer[GetStatsResponse.Rule]
    running: int
    waiting: int
    open_episodes: int
    recorded: int
    dropped: int
    expired: int
    def __init__(self, uptime_s: _Optional[float] = ..., calls: _Optional[_Iterable[_Union[GetStatsResponse.Calls, _Mapping]]] = ..., latencies: _Optional[_Iterable[_Union[GetStatsResponse.Latency, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[GetStatsResponse.Rule, _Mapping]]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., open_episodes: _Optional[int] = ..., recorded: _Optional[int] = ..., dropped: _Optional[int] = ..., expired: _Optional[int] = ...) -> None: ...

class LoadPolicyRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LoadPolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: PolicyInfo
    def __init__(self, policy: _Optional[_Union[PolicyInfo, _Mapping]] = ...) -> None: ...

class UnloadPolicyRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class UnloadPolicyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetDefaultPolicyRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SetDefaultPolicyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlightAction(_message.Message):
    __slots__ = ("request_id", "client", "request", "response")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    client: str
    request: GetActionRequest
    response: GetActionResponse
    def __init__(self, request_id: _Optional[str] = ..., client: _Optional[str] = ..., request: _Optional[_Union[GetActionRequest, _Mapping]] = ..., response: _Optional[_Union[GetActionResponse, _Mapping]] = ...) -> None: ...

class FlightStart(_message.Message):
    __slots__ = ("client", "request", "response")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    client: str
    request: StartEpisodeRequest
    response: StartEpisodeResponse
    def __init__(self, client: _Optional[str] = ..., request: _Optional[_Union[StartEpisodeRequest, _Mapping]] = ..., response: _Optional[_Union[StartEpisodeResponse, _Mapping]] = ...) -> None: ...

class FlightEnd(_message.Message):
    __slots__ = ("client", "request", "response")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    client: str
    request: EndEpisodeRequest
    response: EndEpisodeResponse
    def __init__(self, client: _Optional[str] = ..., request: _Optional[_Union[EndEpisodeRequest, _Mapping]] = ..., response: _Optional[_Union[EndEpisodeResponse, _Mapping]] = ...) -> None: ...

class FlightPolicy(_message.Message):
    __slots__ = ("policy", "limits")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    policy: PolicyInfo
    limits: FlightLimits
    def __init__(self, policy: _Optional[_Union[PolicyInfo, _Mapping]] = ..., limits: _Optional[_Union[FlightLimits, _Mapping]] = ...) -> None: ...

class FlightLimits(_message.Message):
    __slots__ = ("limits", "workspace")
    class LimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_FIELD_NUMBER: _ClassVar[int]
    limits: _containers.ScalarMap[str, float]
    workspace: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, limits: _Optional[_Mapping[str, float]] = ..., workspace: _Optional[_Iterable[float]] = ...) -> None: ...
