"""A loaded policy.onnx: onnxruntime session, contract and golden pairs; act(observation) -> Proposal."""

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status, shown
from protos.manifest import INPUTS, OUTPUTS, VALUE_OUTPUT, Manifest
from protos.spaces import Observation, PolicySpec
from serving.envelope import require_bound
from serving.errors import PolicyRefused
from serving.onnx_header import require_standard_operators

VERSION_DIGITS = 12
BATCH = 8
"""Images per run in `act_batch`: a paper-size network holds 32 MB of activations per image."""
QUIET = 4  # onnxruntime's severity "fatal": its errors reach us as exceptions, its log would only repeat them
EXPORT_AGAIN = "export the policy again with training.run"


@dataclass(frozen=True)
class Proposal:
    """What the policy says of one observation, before any limit: action and std [A] in physical units."""

    action: NDArray[np.float32]
    std: NDArray[np.float32]
    value: float | None

    @property
    def sound(self) -> bool:
        """Whether all of it is finite."""
        return all(map(math.isfinite, (*self.action.tolist(), *self.std.tolist(), self.value or 0.0)))


@dataclass(frozen=True)
class Outputs:
    """What the graph says of a batch: action, normalized, std [B, A]; value [B] or None."""

    action: NDArray[np.float32]
    normalized: NDArray[np.float32]
    std: NDArray[np.float32]
    value: NDArray[np.float32] | None


@dataclass(frozen=True)
class Proof:
    """One check passed at load. `measured` and `bound` are fractions of a field's scale."""

    name: str
    measured: float
    bound: float
    detail: str


@dataclass(frozen=True, eq=False)
class Policy:
    """One version of one policy. Safe to call from several threads: onnxruntime's `run` is."""

    name: str
    file: str
    sha256: str
    manifest: Manifest
    session: ort.InferenceSession
    proofs: tuple[Proof, ...] = ()
    inference_ms: float = 0.0
    """One greedy action on this machine, after warming up."""

    @functools.cached_property
    def version(self) -> str:
        return self.sha256[:VERSION_DIGITS]

    @property
    def spec(self) -> PolicySpec:
        return self.manifest.spec

    def require_contract(self, digest: str) -> None:
        """Where a caller says which contract he means. Raises Rejected, FAILED_PRECONDITION, if it is not this one."""
        if digest and digest != self.spec.digest:
            whose = f"{self.name} {self.version}"
            remedy = f"{whose} has another contract than you mean; compare yours with what GetPolicy returns of it"
            raise Rejected("contract_digest", self.spec.digest, shown(digest), remedy, Status.FAILED_PRECONDITION)

    @functools.cached_property
    def has_value(self) -> bool:
        return any(output.name == VALUE_OUTPUT for output in self.session.get_outputs())

    def info(self) -> pb.PolicyInfo:
        """What it is, where it came from and what it has proved."""
        m = self.manifest
        return pb.PolicyInfo(
            name=self.name,
            version=self.version,
            sha256=self.sha256,
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
                pb.PolicyInfo.Proof(name=p.name, measured=p.measured, bound=p.bound, detail=p.detail)
                for p in self.proofs
            ],
            equivariance_error_90=m.equivariance_error_90,
            equivariance_error_45=m.equivariance_error_45,
            has_value=self.has_value,
            inference_ms=self.inference_ms,
        )

    def act(self, observation: Observation) -> Proposal:
        """The greedy action for one observation; whether it is finite is the envelope's question."""
        return self.act_many([observation])[0]

    def act_many(self, observations: Sequence[Observation]) -> list[Proposal]:
        """The greedy actions for several observations, in as few runs as memory allows."""
        if len(observations) == 1:
            outputs = self._run(observations[0].depth[None], np.array([observations[0].gripper], np.float32))
        else:
            depth = np.stack([o.depth for o in observations])
            outputs = self.act_batch(depth, np.array([o.gripper for o in observations], np.float32))
        values = [None] * len(observations) if outputs.value is None else outputs.value.tolist()
        return [Proposal(*parts) for parts in zip(outputs.action, outputs.std, values, strict=True)]

    def act_batch(self, depth: NDArray[np.float32], gripper: NDArray[np.float32], size: int = BATCH) -> Outputs:
        """depth [B, H, W], gripper [B], `size` of them at a time; what the graph really says, unchecked."""
        starts = range(0, len(gripper), size)
        parts = [self._run(depth[i : i + size], gripper[i : i + size]) for i in starts]
        values = [part.value for part in parts if part.value is not None]
        return Outputs(
            np.concatenate([part.action for part in parts]),
            np.concatenate([part.normalized for part in parts]),
            np.concatenate([part.std for part in parts]),
            np.concatenate(values) if values else None,
        )

    def _run(self, depth: NDArray[np.float32], gripper: NDArray[np.float32]) -> Outputs:
        names = [*OUTPUTS, VALUE_OUTPUT] if self.has_value else list(OUTPUTS)
        feeds = dict(zip(INPUTS, (depth[:, None], gripper[:, None]), strict=True))
        action, normalized, std, *value = self.session.run(names, feeds)
        return Outputs(action, normalized, std, value[0] if value else None)


def load(path: Path, name: str = "", *, intra_op_threads: int = 1) -> Policy:
    """Read and check one file; it has proved nothing yet (serving.proofs does that).

    Args:
        name: what callers ask for; empty: the manifest's task.

    Raises:
        PolicyRefused: when the file is not a complete policy.onnx that fits the contract it carries.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PolicyRefused(str(path), [_refusal("file", "a readable file", str(error.strerror), "")]) from error
    try:
        require_standard_operators(content)
        session = _open(content, intra_op_threads)
        manifest = Manifest.from_metadata(_metadata(session))
        _require_known_components(manifest.spec)
        _require_tensors("input", INPUTS, _input_shapes(manifest.spec), session.get_inputs())
        _require_tensors("output", OUTPUTS, _output_shapes(manifest.spec), session.get_outputs())
        policy = Policy(name or manifest.task, str(path), sha256_of(content), manifest, session)
        _require_shapes_that_come(policy)
    except Rejected as reason:
        raise PolicyRefused(str(path), [reason]) from reason
    return policy


def sha256_of(content: bytes) -> str:
    """In hex: a file's identity, whose first digits are its version."""
    return hashlib.sha256(content).hexdigest()


def sha256_at(path: Path) -> str | None:
    """Of the file's bytes; None where it cannot be read."""
    try:
        return sha256_of(path.read_bytes())
    except OSError:
        return None


def _open(content: bytes, intra_op_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = QUIET
    # A spinning pool steals a core from whatever else runs on the robot's computer.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Weights beside the file would escape the SHA-256 that names the version, and onnxruntime would look for them in
    # the current directory. Nothing lies below a device, so such a file cannot load.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        if "xternal" in str(error):
            remedy = "export with external_data=False: a policy is one file"
            raise _refusal("file", "all weights inside the file", "weights in another file", remedy) from error
        got = f"{len(content)} bytes that onnxruntime cannot load: {_first_line(error)}"
        raise _refusal("file", "an ONNX model", got, "copy the file again, completely, or " + EXPORT_AGAIN) from error


def _metadata(session: ort.InferenceSession) -> dict[str, str]:
    try:
        return session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        got, remedy = str(error), "copy the file again, completely, or " + EXPORT_AGAIN
        raise _refusal("metadata", "text in UTF-8", got, remedy) from error


def _require_known_components(spec: PolicySpec) -> None:
    wire = set(pb.Action.DESCRIPTOR.fields_by_name)
    if not set(spec.action.components) <= wire:
        raise _refusal("contract.action", f"components among {sorted(wire)}", str(spec.action.components))
    require_bound(spec.action)


def _input_shapes(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    """Shapes without the batch axis."""
    return dict(zip(INPUTS, ((1, *spec.observation.shape), (1,)), strict=True))


def _output_shapes(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    return {**dict.fromkeys(OUTPUTS, (spec.action.size,)), VALUE_OUTPUT: ()}


def _require_tensors(
    side: str, required: Sequence[str], shapes: dict[str, tuple[int, ...]], found: Sequence[ort.NodeArg]
) -> None:
    """Names, element types and declared shapes, with a batch axis that is free."""
    by_name = {tensor.name: tensor for tensor in found}
    if not set(required) <= set(by_name) <= set(shapes):
        raise _refusal(f"{side}s", ", ".join(shapes), ", ".join(by_name) or "none")
    for name, tensor in by_name.items():
        expected = ("B", *shapes[name])
        # A dimension that the exporter left symbolic is settled by `_require_shapes_that_come`.
        fits = len(tensor.shape) == len(expected) and all(
            not isinstance(got, int) or got == want for got, want in zip(tensor.shape, expected, strict=True)
        )
        if tensor.type != "tensor(float)" or not fits:
            raise _refusal(f"{side} {name}", f"tensor(float) {list(expected)}", f"{tensor.type} {tensor.shape}")


def _require_shapes_that_come(policy: Policy) -> None:
    """Run one and two golden observations: declared shapes may be symbolic, these are not, and robots send one."""
    golden, size = policy.manifest.golden, policy.spec.action.size
    for batch in (1, min(2, len(golden.gripper))):
        try:
            outputs = policy.act_batch(golden.depth[:batch], golden.gripper[:batch])
        except Exception as error:  # onnxruntime's errors share no base class
            got = f"an error: {_first_line(error)}"
            raise _refusal("graph", "an answer to its own golden observations", got) from error
        for name in ("action", "normalized", "std", "value"):
            array, shape = getattr(outputs, name), (batch,) if name == "value" else (batch, size)
            if array is not None and array.shape != shape:
                raise _refusal(f"output {name}", f"{list(shape)} for a batch of {batch}", str(list(array.shape)))


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0][:200]  # a MemoryError has no text


def _refusal(field: str, expected: str, got: str, remedy: str = EXPORT_AGAIN) -> Rejected:
    return Rejected(field, expected, got, remedy, Status.FAILED_PRECONDITION)
