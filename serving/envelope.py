"""The last gate before the arm: (action, limits, pose) -> what may be executed, and every change made. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected, Status
from protos.spaces import ActionSpec, Kind, Pose
from serving.errors import PolicyFault

ROUNDING = 1e-6
"""A float32 on its bound may exceed it by this fraction; that is arithmetic, not a wish to go further."""
AXIS_OF = {"dx": 0, "dy": 1, "dz": 2}


@dataclass(frozen=True)
class Workspace:
    """A box in the robot's base frame that the tool centre must not leave: metres, low and high per axis."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"a workspace needs low < high on every axis, got {self.low} and {self.high}")


@dataclass(frozen=True)
class Intervention:
    """One change: the field's components before and after, the rule, and the limit that it kept."""

    field: str
    rule: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    limit: float


@dataclass(frozen=True)
class Decision:
    """The action [A] to execute, and how it came to differ from the policy's."""

    action: NDArray[np.float32]
    interventions: tuple[Intervention, ...]


def limit(
    action: NDArray[np.float32], spec: ActionSpec, pose: Pose | None = None, workspace: Workspace | None = None
) -> Decision:
    """Keep every field within its bound and, where a workspace is given, the tool within the box.

    Raises:
        PolicyFault: when the action is not finite: no limit makes a motion out of it.
        Rejected: FAILED_PRECONDITION when there is a workspace and no pose.
    """
    if not np.isfinite(action).all():
        raise PolicyFault("the policy's action is not finite; hold")
    limited, changes = _within_bounds(action, spec)
    if workspace is not None:
        if pose is None:
            remedy = "this server keeps a workspace; send where the gripper is"
            raise Rejected("observation.pose", "a pose", "none", remedy, Status.FAILED_PRECONDITION)
        limited, more = _within_workspace(limited, spec, pose, workspace)
        changes += more
    return Decision(limited, tuple(changes))


def _within_bounds(action: NDArray[np.float32], spec: ActionSpec) -> tuple[NDArray[np.float32], list[Intervention]]:
    exceeds = spec.magnitudes(action) > 1 + ROUNDING
    projected, limited, changes = spec.project(action), action.copy(), []
    for field, too_far in zip(spec.fields, exceeds, strict=True):
        if too_far:
            part = spec.slice_of(field.name)
            limited[part] = projected[part]
            below = field.kind is not Kind.VECTOR and action[part][0] < field.centre
            passed = field.centre + (-field.scale if below else field.scale)
            changes.append(Intervention(field.name, "limit", _floats(action[part]), _floats(limited[part]), passed))
    return limited, changes


def _within_workspace(
    action: NDArray[np.float32], spec: ActionSpec, pose: Pose, workspace: Workspace
) -> tuple[NDArray[np.float32], list[Intervention]]:
    """Shorten a translation until it ends inside; a tool that is already outside may only move back in."""
    position, limited, changes = (pose.x, pose.y, pose.z), action.copy(), []
    for field in spec.fields:
        axes = [AXIS_OF[c] for c in field.components if c in AXIS_OF]
        if not axes:
            continue
        part = spec.slice_of(field.name)
        share, wall = 1.0, 0.0
        for axis, step in zip(axes, action[part].tolist(), strict=True):
            face = workspace.high[axis] if step > 0 else workspace.low[axis]
            room = max(face - position[axis], 0.0) if step > 0 else max(position[axis] - face, 0.0)
            if abs(step) > room * (1 + ROUNDING) and room / abs(step) < share:
                share, wall = room / abs(step), face
        if share < 1:
            limited[part] = action[part] * np.float32(share)
            changes.append(Intervention(field.name, "workspace", _floats(action[part]), _floats(limited[part]), wall))
    return limited, changes


def _floats(components: NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(components.tolist())
