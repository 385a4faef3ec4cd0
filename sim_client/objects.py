"""What stands on the table: blocks, a bowl, a bumper; made of convex primitives, with real mass and friction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pybullet as p
from numpy.typing import NDArray

GRAVITY_M_S2 = 9.81
DENSITY_KG_M3 = 700.0
"""Of hardwood; a block of 45 mm weighs 64 g."""
FRICTION = 0.6
SETTLED_M_S, SETTLED_RAD_S = 0.02, 0.4
"""A body slower than this rests."""
UPRIGHT_RAD = math.radians(15)
"""A body that leans less stands. On its side a bowl leans by more than 70 degrees."""
MOST_BOXES = 16
"""PyBullet's shape arrays hold no more; one more ends the process without a word."""
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Traits:
    """What the objects of an episode are like, as multiples of what they usually are."""

    friction: float = 1.0
    mass: float = 1.0
    size: float = 1.0


@dataclass(frozen=True)
class Box:
    """One box of a body: metres and radians, z from where the body stands."""

    half: tuple[float, float, float]
    at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rpy: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Body:
    """A rigid body of boxes, as heavy as they are large; Bullet derives the inertia from their shapes.

    A `fixed` one is immovable, as if screwed to the table.
    """

    def __init__(self, client: int, boxes: Sequence[Box], traits: Traits, color: Color, *, fixed: bool = False) -> None:
        if len(boxes) > MOST_BOXES:
            raise ValueError(f"a body has at most {MOST_BOXES} boxes, got {len(boxes)}")
        s = traits.size
        boxes = [
            replace(b, half=tuple(s * x for x in b.half), at=tuple(s * x for x in b.at))  # type: ignore[arg-type]
            for b in boxes
        ]
        volumes = np.array([8 * math.prod(b.half) for b in boxes])
        centre = volumes @ np.array([b.at for b in boxes]) / volumes.sum()  # the body's frame lies there
        self._client, self._standing_m = client, float(centre[2])
        where = [tuple(np.array(b.at) - centre) for b in boxes]
        turned = [p.getQuaternionFromEuler(b.rpy) for b in boxes]
        shapes, halves = [p.GEOM_BOX] * len(boxes), [b.half for b in boxes]
        collision = p.createCollisionShapeArray(
            shapes, halfExtents=halves, collisionFramePositions=where, collisionFrameOrientations=turned,
            physicsClientId=client,
        )  # fmt: skip
        visual = p.createVisualShapeArray(
            shapes, halfExtents=halves, visualFramePositions=where, visualFrameOrientations=turned,
            rgbaColors=[(*color, 1.0)] * len(boxes), physicsClientId=client,
        )  # fmt: skip
        self.id = p.createMultiBody(
            baseMass=0.0 if fixed else DENSITY_KG_M3 * volumes.sum() * traits.mass,
            baseCollisionShapeIndex=collision,
            baseVisualShapeIndex=visual,
            physicsClientId=client,
        )
        p.changeDynamics(
            self.id, -1, lateralFriction=FRICTION * traits.friction, spinningFriction=0.002,
            activationState=p.ACTIVATION_STATE_ENABLE_SLEEPING, physicsClientId=client,
        )  # fmt: skip

    def place(self, xy: Sequence[float] | NDArray[np.float64], yaw: float) -> None:
        """Stand the body at `xy` (metres), at rest, and asleep until something touches it: a resting body's contacts
        cost more than the arm."""
        xyz, turned = (xy[0], xy[1], self._standing_m), p.getQuaternionFromEuler((0, 0, yaw))
        p.resetBasePositionAndOrientation(self.id, xyz, turned, physicsClientId=self._client)
        p.resetBaseVelocity(self.id, (0, 0, 0), (0, 0, 0), physicsClientId=self._client)
        p.changeDynamics(self.id, -1, activationState=p.ACTIVATION_STATE_SLEEP, physicsClientId=self._client)

    @property
    def position(self) -> NDArray[np.float64]:
        """float64 [3]: the centre of mass, metres."""
        return np.array(p.getBasePositionAndOrientation(self.id, physicsClientId=self._client)[0])

    @property
    def xy(self) -> NDArray[np.float64]:
        """float64 [2], metres."""
        return self.position[:2]

    @property
    def yaw(self) -> float:
        """Heading of the x axis seen from above; of whichever axis is horizontal, should the body have tipped over."""
        matrix = self._rotation
        flattest = int(np.argmin(np.abs(matrix[2])))
        if flattest == 1 and abs(matrix[2, 0]) < 0.1:
            flattest = 0  # x and y are both horizontal: rounding must not choose
        return math.atan2(matrix[1, flattest], matrix[0, flattest])

    @property
    def upright(self) -> bool:
        """Whether the body stands as it was placed."""
        return bool(self._rotation[2, 2] > math.cos(UPRIGHT_RAD))

    @property
    def settled(self) -> bool:
        """Whether the body rests."""
        linear, angular = p.getBaseVelocity(self.id, physicsClientId=self._client)
        return bool(np.linalg.norm(linear) < SETTLED_M_S and np.linalg.norm(angular) < SETTLED_RAD_S)

    @property
    def _rotation(self) -> NDArray[np.float64]:
        """[3, 3]: its axes as columns, in the world's frame."""
        quaternion = p.getBasePositionAndOrientation(self.id, physicsClientId=self._client)[1]
        return np.reshape(p.getMatrixFromQuaternion(quaternion), (3, 3))


def block(client: int, side_m: float, traits: Traits, color: Color = (0.85, 0.32, 0.2)) -> Body:
    """A cube."""
    half = side_m / 2
    return Body(client, [Box((half, half, half), (0, 0, half))], traits, color)


def bumper(client: int, length_m: float, depth_m: float, height_m: float, traits: Traits) -> Body:
    """A low wall along its y axis, fixed to the table."""
    half = (depth_m / 2, length_m / 2, height_m / 2)
    return Body(client, [Box(half, (0, 0, height_m / 2))], traits, (0.3, 0.35, 0.4), fixed=True)


def bowl(client: int, radius_m: float, height_m: float, traits: Traits) -> Body:
    """A bowl: a floor, and a ring of staves that lean outwards up to `radius_m` at the rim."""
    staves, thick, lean = 12, 0.004, math.radians(20)
    foot = radius_m - height_m * math.tan(lean)
    side = foot / math.sqrt(2)
    floor = [Box((side, side, 0.003), (0, 0, 0.003), (0, 0, turn)) for turn in (0, math.pi / 4)]
    half = (thick / 2, radius_m * math.tan(math.pi / staves), height_m / 2 / math.cos(lean))
    middle = (radius_m + foot) / 2
    ring = [
        Box(half, (middle * math.cos(a), middle * math.sin(a), height_m / 2 + 0.002), (0, lean, a))
        for a in np.arange(staves) * 2 * math.pi / staves
    ]
    return Body(client, [*floor, *ring], traits, (0.25, 0.5, 0.75))
