"""The symmetry of a table-top scene: C_N or D_N turns the image about its centre and (dx, dy) with it.

One declaration, four readers: augmentation, network types, the server's proof and the tests all take rho(g) from here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from protos.spaces import ActionSpec, Kind, Observation, ObservationSpec


@dataclass(frozen=True)
class Element:
    """A reflection y -> -y if `flip`, then a counter-clockwise turn (seen from above, about +z) by `angle` radians."""

    angle: float
    flip: bool = False

    @property
    def planar(self) -> NDArray[np.float64]:
        """[2, 2]: what happens to (x, y) in the world."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        mirror = -1.0 if self.flip else 1.0
        return np.array([[c, -s * mirror], [s, c * mirror]])

    def rho(self, spec: ActionSpec) -> NDArray[np.float64]:
        """[size, size]: what happens to an action; the same matrix for physical and normalised actions."""
        blocks = {Kind.SCALAR: np.eye(1), Kind.VECTOR: self.planar, Kind.PSEUDOSCALAR: np.eye(1) * (-1) ** self.flip}
        matrix = np.zeros((spec.size, spec.size))
        for field in spec.fields:
            place = spec.slice_of(field.name)
            matrix[place, place] = blocks[field.kind]
        return matrix

    def action(self, action: NDArray[np.floating], spec: ActionSpec) -> NDArray[np.floating]:
        """Transform actions [..., size]; any centred quantity with the same fields, e.g. a difference, works too."""
        return (action @ self.rho(spec).T).astype(action.dtype)

    def image(self, depth: NDArray[np.floating], spec: ObservationSpec) -> NDArray[np.floating]:
        """Turn images [..., H, W] about their centre: exact at multiples of 90 degrees, bilinear between.

        What turns in from outside the view takes the nearest edge pixel.
        """
        quarters = self.angle / (math.pi / 2)
        mirrored = self._mirror(depth, spec) if self.flip else depth
        if math.isclose(quarters, round(quarters), abs_tol=1e-9):
            return np.rot90(mirrored, round(quarters) * spec.handedness, axes=(-2, -1)).copy()
        return _resample(mirrored, self.angle * spec.handedness)

    def observation(self, observation: Observation, spec: ObservationSpec) -> Observation:
        """What the camera would see of the transformed scene."""
        return replace(observation, depth=self.image(observation.depth, spec))

    @staticmethod
    def _mirror(depth: NDArray[np.floating], spec: ObservationSpec) -> NDArray[np.floating]:
        """y -> -y: flip the image axis along which world y runs."""
        return np.flip(depth, axis=-2 if spec.row_axis[1] else -1)


@dataclass(frozen=True)
class Group:
    """C_N, or D_N with `reflections`."""

    order: int
    reflections: bool = False

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"a group of rotations needs an order of at least 1, got {self.order}")

    @classmethod
    def parse(cls, name: str) -> "Group":
        """ "C8" -> eight rotations, "D4" -> four rotations and four reflections."""
        if len(name) < 2 or name[0] not in "CD" or not name[1:].isdecimal():
            raise ValueError(f"a group is named C4, C8, C16, D4, ..., got {name!r}")
        return cls(int(name[1:]), reflections=name[0] == "D")

    @property
    def name(self) -> str:
        return f"{'D' if self.reflections else 'C'}{self.order}"

    def __iter__(self) -> Iterator[Element]:
        for flip in (False, True) if self.reflections else (False,):
            for k in range(self.order):
                yield Element(2 * math.pi * k / self.order, flip)


QUARTER_TURNS = tuple(Element(k * math.pi / 2) for k in range(1, 4))
EIGHTH_TURN = Element(math.pi / 4)


def _resample(depth: NDArray[np.floating], angle: float) -> NDArray[np.floating]:
    """Turn [..., H, W] counter-clockwise, as displayed, by `angle`; bilinear."""
    size = depth.shape[-1]
    rows, cols = np.indices((size, size)) - (size - 1) / 2
    c, s = math.cos(angle), math.sin(angle)
    # Displayed x is the column and displayed y is minus the row; each output pixel looks up where it came from.
    source_col = np.clip(c * cols - s * rows + (size - 1) / 2, 0, size - 1)
    source_row = np.clip(s * cols + c * rows + (size - 1) / 2, 0, size - 1)
    r0, c0 = np.minimum(source_row.astype(int), size - 2), np.minimum(source_col.astype(int), size - 2)
    fr, fc = source_row - r0, source_col - c0
    top = depth[..., r0, c0] * (1 - fc) + depth[..., r0, c0 + 1] * fc
    bottom = depth[..., r0 + 1, c0] * (1 - fc) + depth[..., r0 + 1, c0 + 1] * fc
    return (top * (1 - fr) + bottom * fr).astype(depth.dtype)
