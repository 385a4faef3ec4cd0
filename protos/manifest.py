"""What a policy.onnx says about itself: contract, provenance, measured errors, golden pairs; to and from ONNX metadata.

Written by training.export, read by serving.policy. Text and plain arrays only; nothing here can run code.
"""

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected, Status
from protos.spaces import PolicySpec
from protos.symmetry import Group

MANIFEST_KEY = "equiserve.manifest"
GOLDEN_KEY = "equiserve.golden"
FORMAT = 1

EQUIVARIANCE = ("both", "actor", "critic", "none")

# The tensors of the graph. B is a free batch axis.
INPUTS = ("depth", "gripper")  # float32 [B, 1, H, W] metres; float32 [B, 1]
OUTPUTS = ("action", "normalized_action", "std")  # float32 [B, A], physical, normalised, physical
VALUE_OUTPUT = "value"  # float32 [B], where the algorithm has a critic


@dataclass(frozen=True)
class Golden:
    """Seeded (observation, action) pairs that a faithful runtime must reproduce.

    Observations come in twins, equal but for `gripper` (0 first, then 1): pair 2i and pair 2i + 1.
    """

    depth: NDArray[np.float32]
    """[K, H, W] metres."""
    gripper: NDArray[np.float32]
    """[K]"""
    action: NDArray[np.float32]
    """[K, A] physical units, computed by the training framework, not by the exported graph."""


@dataclass(frozen=True)
class Manifest:
    """Everything that a server or a person needs to know of a policy, apart from its weights."""

    spec: PolicySpec
    group: str
    """The symmetry group that the network was built for, e.g. "C8"."""
    task: str
    algorithm: str
    equivariance: str
    """Which roles are equivariant: both, actor, critic or none."""
    seed: int
    updates: int
    dataset_id: str
    dataset_sha256: str
    code_version: str
    equivariance_error_90: float
    """Largest error of the exported graph under quarter turns, as a fraction of each field's scale; of a group with
    reflections, under those, too."""
    equivariance_error_45: float
    """The same under 45 degrees, where the pixel grid itself is only approximately symmetric."""
    golden: Golden
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Closed-loop results, if known: success_rate, episodes, ..."""

    def __post_init__(self) -> None:
        Group.parse(self.group)
        for name in ("task", "algorithm", "dataset_id", "dataset_sha256", "code_version"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r}")
            getattr(self, name).encode()  # JSON can hold half a surrogate pair, the wire cannot
        if not self.task:
            raise ValueError("task must not be empty: callers ask for a policy by it")
        if self.equivariance not in EQUIVARIANCE:  # a typing error must not switch the symmetry proof off
            raise ValueError(f"equivariance must be one of {EQUIVARIANCE}, got {self.equivariance!r}")
        for name in ("seed", "updates"):
            if not isinstance(getattr(self, name), int) or not 0 <= getattr(self, name) < 2**64:
                raise ValueError(f"{name} must be a whole number below 2^64, got {getattr(self, name)!r}")
        for name in ("equivariance_error_90", "equivariance_error_45"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")

    @property
    def actor_is_equivariant(self) -> bool:
        return self.equivariance in ("both", "actor")

    def to_metadata(self) -> dict[str, str]:
        """The ONNX metadata_props that carry this manifest."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("spec", "golden")}
        plain |= {"format": FORMAT, "contract": self.spec.to_json(), "contract_digest": self.spec.digest}
        packed = io.BytesIO()
        np.savez_compressed(
            packed, depth=self.golden.depth, gripper=self.golden.gripper, action=self.golden.action, allow_pickle=False
        )
        return {
            MANIFEST_KEY: json.dumps(plain, sort_keys=True, allow_nan=False),
            GOLDEN_KEY: base64.b64encode(packed.getvalue()).decode("ascii"),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Manifest":
        """The inverse of `to_metadata`.

        Raises:
            Rejected: naming the key that is missing, does not parse, or contradicts the contract.
        """
        for key in (MANIFEST_KEY, GOLDEN_KEY):
            if key not in metadata:
                raise _refused(key, "metadata of an equiserve policy", "nothing")
        try:
            plain = json.loads(metadata[MANIFEST_KEY])
            if plain.pop("format") != FORMAT:
                raise _refused(f"{MANIFEST_KEY}.format", str(FORMAT), str(json.loads(metadata[MANIFEST_KEY])["format"]))
            spec = PolicySpec.from_json(plain.pop("contract"))
            recorded = plain.pop("contract_digest")
            manifest = cls(spec=spec, golden=_read_golden(metadata[GOLDEN_KEY], spec), **plain)
            if recorded != spec.digest:
                raise _refused(f"{MANIFEST_KEY}.contract_digest", spec.digest, str(recorded))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, Rejected):
                raise
            raise _refused(MANIFEST_KEY, "a manifest of this version", repr(error)) from error
        return manifest


def _read_golden(text: str, spec: PolicySpec) -> Golden:
    try:
        with np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False) as arrays:
            golden = Golden(arrays["depth"], arrays["gripper"], arrays["action"])
    except Exception as error:  # numpy, zipfile, zlib and struct each raise their own on bytes that are no npz
        raise _refused(GOLDEN_KEY, "base64 of an npz with depth, gripper and action", repr(error)) from error
    pairs = len(golden.gripper)
    shapes = {"depth": (pairs, *spec.observation.shape), "gripper": (pairs,), "action": (pairs, spec.action.size)}
    for name, shape in shapes.items():
        array = getattr(golden, name)
        if pairs == 0 or array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise _refused(f"{GOLDEN_KEY}.{name}", f"finite float32 {shape}", f"{array.dtype} {array.shape}")
    return golden


def _refused(key: str, expected: str, got: str) -> Rejected:
    remedy = "export the policy again with this version of training.run"
    return Rejected(key, expected, got, remedy, Status.FAILED_PRECONDITION)
