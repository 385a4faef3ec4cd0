"""THE contract: what an observation and an action are. Order, units, limits and orientation are declared here, once.

Frames: the robot's base frame, right-handed, z up; metres and radians. An action is a tuple of *fields*; a bound
belongs to a field, never to an axis, because a box on (dx, dy) would single out directions.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected, Status

FloatArray = NDArray[np.floating]


class Kind(StrEnum):
    """How a field transforms when the scene is turned about +z, or reflected."""

    SCALAR = "scalar"  # not at all
    VECTOR = "vector"  # as (x, y) does
    PSEUDOSCALAR = "pseudoscalar"  # changes sign under a reflection


SCALAR, VECTOR, PSEUDOSCALAR = Kind.SCALAR, Kind.VECTOR, Kind.PSEUDOSCALAR


def _as_floats(spec: Any) -> None:
    """30 and 30.0, 0.0 and -0.0 are equal, and must be the same text in a contract."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, int | float) and field.type in (float, float | None):
            object.__setattr__(spec, field.name, float(value) + 0.0)


@dataclass(frozen=True)
class Field:
    """One field of an action: its components, how it transforms, and its bound in physical units.

    Either `limit` (symmetric: |scalar| <= limit, or the *radius* of a vector) or an interval `low`..`high`.
    """

    name: str
    components: tuple[str, ...]
    kind: Kind
    unit: str
    limit: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for word in (self.name, self.unit, *self.components):  # a stranger's contract may hold anything
            if not (isinstance(word, str) and word and word.isprintable()):
                raise ValueError(f"a field's name, unit and components must be printable text, got {word!r}")
        _as_floats(self)
        interval = self.low is not None and self.high is not None
        if (self.limit is not None) == interval:
            raise ValueError(f"field {self.name}: give either limit or both low and high")
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"field {self.name}: limit must be positive and finite, got {self.limit}")
        if interval and not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):  # type: ignore[arg-type, operator]
            raise ValueError(f"field {self.name}: low must be below high, got {self.low} and {self.high}")
        if interval and self.kind is not SCALAR:
            raise ValueError(f"field {self.name}: only a scalar may have an interval, a {self.kind} needs a limit")
        if len(self.components) != (2 if self.kind is VECTOR else 1):
            raise ValueError(f"field {self.name}: a {self.kind} cannot have components {self.components}")

    @property
    def scale(self) -> float:
        """Physical size of one normalised unit."""
        return self.limit if self.limit is not None else (self.high - self.low) / 2  # type: ignore[operator]

    @property
    def centre(self) -> float:
        """Physical value of normalised zero."""
        return 0.0 if self.limit is not None else (self.high + self.low) / 2  # type: ignore[operator]


@dataclass(frozen=True)
class ActionSpec:
    """An ordered tuple of fields. Arrays of actions are [..., size] in the order of `components`."""

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        names = [f.name for f in self.fields]
        if len(set(names)) != len(names):
            raise ValueError(f"names of action fields must be distinct, got {names}")
        if len(set(self.components)) != len(self.components):
            raise ValueError(f"action components must be distinct, got {self.components}")

    @functools.cached_property
    def components(self) -> tuple[str, ...]:
        return tuple(c for f in self.fields for c in f.components)

    @property
    def size(self) -> int:
        return len(self.components)

    def slice_of(self, name: str) -> slice:
        """Where the field `name` lies in an action array."""
        start = 0
        for field in self.fields:
            if field.name == name:
                return slice(start, start + len(field.components))
            start += len(field.components)
        raise KeyError(f"no action field {name!r}; there are {[f.name for f in self.fields]}")

    @functools.cached_property
    def scale(self) -> NDArray[np.float32]:
        """[size] physical size of one normalised unit, per component."""
        return self.per_component([f.scale for f in self.fields])

    @functools.cached_property
    def centre(self) -> NDArray[np.float32]:
        """[size] physical value of normalised zero, per component."""
        return self.per_component([f.centre for f in self.fields])

    def per_component(self, per_field: list[float]) -> NDArray[np.float32]:
        """Repeat one number per field over the field's components: [fields] -> [size]."""
        return np.repeat(np.asarray(per_field, np.float32), [len(f.components) for f in self.fields])

    def normalize(self, action: FloatArray) -> FloatArray:
        """Physical [..., size] -> normalised: scalars in [-1, 1], vectors in the unit disc."""
        return (action - self.centre) / self.scale

    def denormalize(self, normalized: FloatArray) -> FloatArray:
        """Normalised [..., size] -> physical; the inverse of `normalize`."""
        return normalized * self.scale + self.centre

    def magnitudes(self, action: FloatArray) -> FloatArray:
        """Normalised size of every field, [..., size] -> [..., fields]; within bounds where <= 1."""
        normalized = self.normalize(action)
        sizes = [np.linalg.norm(normalized[..., self.slice_of(f.name)], axis=-1) for f in self.fields]
        return np.stack(sizes, axis=-1)

    def project(self, action: FloatArray) -> FloatArray:
        """The nearest action within bounds, [..., size]: vectors are shortened, never clipped per axis."""
        with np.errstate(over="ignore"):
            sizes = np.maximum(self.magnitudes(action), 1.0)
        wide = action
        if not np.isfinite(sizes).all():  # the square of a float32 beyond 1e19, or its normalised value, overflows
            wide = action.astype(np.float64)
            sizes = np.maximum(self.magnitudes(wide), 1.0)
        counts = [len(f.components) for f in self.fields]
        return self.denormalize(self.normalize(wide) / np.repeat(sizes, counts, axis=-1)).astype(action.dtype)


class GripperState(StrEnum):
    """What `gripper` says."""

    HOLDING = "holding"  # 1 if the gripper holds something, else 0
    OPEN_RATIO = "open_ratio"  # for a robot that only knows its opening: 0 closed, 1 open


class View(StrEnum):
    """Where the camera looks from."""

    TOPDOWN = "topdown"  # orthographic, straight down, centred on the tool and moving with it
    SIDE = "side"  # perspective, fixed, aimed at the workspace's centre: the scene's symmetry is only latent in it


@dataclass(frozen=True)
class ObservationSpec:
    """A depth view and the gripper's state. By default top-down, orthographic, centred on the gripper.

    `row_axis` and `col_axis` are the world directions (x, y) in which the row and the column index grow. They are the
    whole map from pixels to the world: a mirrored or transposed image has other axes and so another digest.
    """

    height: int = 128
    width: int = 128
    view: View = View.TOPDOWN
    elevation_deg: float = 90.0
    """How steeply the camera looks down; below 90 a side view's, from the robot's front."""
    extent_m: float = 0.45
    """Side of the square that the view covers; of a side view, through the workspace's centre."""
    row_axis: tuple[int, int] = (-1, 0)
    """Row 0 looks towards +x, away from the robot's base."""
    col_axis: tuple[int, int] = (0, -1)
    """Column 0 looks towards +y, the robot's left."""
    plane_above_tool_m: float = 0.10
    """The camera plane lies this far above the tool centre and moves with it; a side view's camera is fixed this far
    from the workspace's centre."""
    depth_min_m: float = 0.0
    depth_max_m: float = 0.60
    gripper: GripperState = GripperState.HOLDING

    def __post_init__(self) -> None:
        _as_floats(self)
        for name in ("row_axis", "col_axis"):  # -1.0 and -1 are equal, too
            axis = tuple(int(v) if isinstance(v, float) and v.is_integer() else v for v in getattr(self, name))
            object.__setattr__(self, name, axis)
        is_whole = isinstance(self.height, int) and not isinstance(self.height, bool)
        if not (is_whole and self.height == self.width and self.height > 0):
            raise ValueError(f"the view must be square, whole pixels, got {self.height} x {self.width}")
        if not 0 < self.elevation_deg <= 90 or (self.view is View.TOPDOWN and self.elevation_deg != 90):
            raise ValueError(
                f"a side view looks down at 0 to 90 degrees, a top-down one at 90, got {self.elevation_deg}"
            )
        if not 0 < self.extent_m < math.inf or not math.isfinite(self.plane_above_tool_m):
            raise ValueError(f"lengths must be finite, got {self.extent_m} and {self.plane_above_tool_m}")
        axes = np.array([self.row_axis, self.col_axis])
        if (
            any(isinstance(v, bool) for v in (*self.row_axis, *self.col_axis))
            or axes.shape != (2, 2)
            or not np.array_equal(axes @ axes.T, np.eye(2))
        ):
            raise ValueError(
                f"row_axis and col_axis must be orthonormal world directions, got {self.row_axis}, {self.col_axis}"
            )
        if not 0 <= self.depth_min_m < self.depth_max_m < math.inf:
            raise ValueError(f"depth range must be 0 <= min < max, got {self.depth_min_m}..{self.depth_max_m}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def handedness(self) -> int:
        """+1 where a scene that turns counter-clockwise (seen from above) turns so in the displayed image, else -1."""
        return self.row_axis[0] * self.col_axis[1] - self.row_axis[1] * self.col_axis[0]

    def pixel_of(self, offset_m: FloatArray) -> FloatArray:
        """World offsets (x, y) from the gripper, [..., 2] metres -> (row, column), fractional pixels."""
        per_pixel = self.extent_m / self.height
        return offset_m @ np.array([self.row_axis, self.col_axis]).T / per_pixel + (self.height - 1) / 2


LONGEST_CONTRACT = 64 * 1024
"""Characters of a contract's JSON, which has one or two thousand: a stranger may send it."""


@dataclass(frozen=True)
class PolicySpec:
    """The contract between dataset, policy, server and controller."""

    observation: ObservationSpec
    action: ActionSpec

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, so that equal specs have equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "PolicySpec":
        """The inverse of `to_json`. Raises Rejected naming the part that does not parse."""
        try:
            if len(text) > LONGEST_CONTRACT:
                raise ValueError(f"{len(text)} characters, more than {LONGEST_CONTRACT}")
            raw = json.loads(text)
            observation: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in raw["observation"].items()
            }
            observation["gripper"] = GripperState(observation["gripper"])
            observation["view"] = View(observation["view"])
            fields = tuple(
                Field(**{**f, "components": tuple(f["components"]), "kind": Kind(f["kind"])})
                for f in raw["action"]["fields"]
            )
            return cls(ObservationSpec(**observation), ActionSpec(fields))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise Rejected(
                "contract",
                "the JSON of a PolicySpec",
                repr(error),
                "write it with PolicySpec.to_json",
                Status.FAILED_PRECONDITION,
            ) from error

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits: the contract digest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def hold(self, gripper: float) -> NDArray[np.float32]:
        """The action [A] that stays: no motion, and a gripper that keeps what it holds (or, empty, is open)."""
        action = self.action.centre.copy()
        if self.observation.gripper is GripperState.HOLDING:
            gripper = 1.0 - gripper  # a closed hand holds
        for field in self.action.fields:
            if field.low is not None and field.high is not None:
                action[self.action.slice_of(field.name)] = field.low + gripper * (field.high - field.low)
        return action

    def require_same(self, other: "PolicySpec", whose: str) -> None:
        """Raise Rejected (FAILED_PRECONDITION) naming every field in which `other`, `whose` contract, differs."""
        ours, theirs = _flatten(json.loads(self.to_json())), _flatten(json.loads(other.to_json()))
        names = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if names:
            raise Rejected(
                f"contract.{names[0]}",
                ", ".join(f"{n}={ours.get(n)}" for n in names),
                ", ".join(f"{n}={theirs.get(n)}" for n in names) + f" in {whose}",
                "both sides must speak of the same observation and action",
                Status.FAILED_PRECONDITION,
            )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists by index, and by their parts' names: {"fields.1[planar].limit": 0.05}."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = [(f"{i}[{v['name']}]" if isinstance(v, Mapping) and "name" in v else i, v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for name, sub in items for k, v in _flatten(sub, f"{prefix}.{name}" if prefix else str(name)).items()}


@dataclass(frozen=True)
class Observation:
    """One observation.

    Attributes:
        depth: float32 [H, W], metres below the camera plane, oriented as the spec says.
        gripper: 1.0 holding, 0.0 not (or the open ratio, as the spec says).
    """

    depth: NDArray[np.float32]
    gripper: float


@dataclass(frozen=True)
class Pose:
    """The tool centre in the robot's base frame: metres, and radians about +z."""

    x: float
    y: float
    z: float
    yaw: float


ACTION = ActionSpec(
    (
        Field("gripper", ("p",), SCALAR, low=0.0, high=1.0, unit="1"),  # 0 closed, 1 open
        Field("planar", ("dx", "dy"), VECTOR, limit=0.05, unit="m"),  # a radius: a box has preferred directions
        Field("lift", ("dz",), SCALAR, limit=0.05, unit="m"),
        Field("yaw", ("dtheta",), PSEUDOSCALAR, limit=math.pi / 4, unit="rad"),
    )
)
OBSERVATION = ObservationSpec()
SPEC = PolicySpec(OBSERVATION, ACTION)


def side_view(elevation_deg: float) -> PolicySpec:
    """The contract of a camera that stands in front of the robot and looks back at it from above, or from the side."""
    view = ObservationSpec(
        view=View.SIDE, elevation_deg=elevation_deg, extent_m=0.6, row_axis=(1, 0), col_axis=(0, 1),
        plane_above_tool_m=0.8, depth_max_m=1.6,
    )  # fmt: skip
    return PolicySpec(view, ACTION)
