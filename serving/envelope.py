"""The last gate before the arm: (action, limits, pose, the action before) -> what may be executed, and every change.

Pure, and plain floats rather than numpy: five numbers are not worth an array. Rules in their order:

    not_finite  anything that is no number means: stay where you are
    limit       each field within its bound; a vector is shortened and keeps its direction
    step        the length of the whole translation
    jump        the difference from the motion before, in an episode; from none, where the arm is at rest
    z_floor, workspace   where the tool would end; these come last, so a wall stops it however sudden that is
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected, Status, shown
from protos.spaces import ActionSpec, Field, Kind, PolicySpec, Pose

ROUNDING = 1e-6
"""A float32 on its bound may exceed it by this fraction; that is arithmetic, not a wish to go further."""
SHRINK = 1 - 1e-7  # so that what was shortened is still within when it is rounded to float32
STRAY_M, REACH_M = 1.0, 10.0
"""How far a tool may be beyond a wall, and on a side without one from the base: further, its unit is another. Of a tool
that is outside every motion inwards is let through, so a pose in millimetres would have no floor."""
AXIS_OF = {"dx": 0, "dy": 1, "dz": 2}
ROTATION, COMMAND = "dtheta", "p"
"""The command is the one component that says where to be, and not how far to move."""


@dataclass(frozen=True)
class Workspace:
    """A box in the robot's base frame that the tool centre must not leave: metres, low and high per axis."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"a workspace needs low < high on every axis, got {self.low} and {self.high}")


@dataclass(frozen=True)
class Limits:
    """Bounds beyond those of a policy's contract. Infinite: none."""

    fields: Mapping[str, float] = field(default_factory=dict)
    """By the name of a field with a symmetric bound, in its unit."""
    step_m: float = math.inf
    """The length of the translation (dx, dy, dz)."""
    jump_m: float = math.inf
    """How far a translation may lie from the one before."""
    jump_rad: float = math.inf
    """The same for a rotation."""
    z_floor_m: float = -math.inf
    """The lowest z at which a motion may end."""
    workspace: Workspace | None = None

    def tightened(self, asked: Mapping[str, float], spec: ActionSpec, *, refuse_wider: bool = True) -> "Limits":
        """These and the ones asked for, by the names of `in_force`.

        Args:
            refuse_wider: whether a limit that is wider than what holds is an error, or just without effect.

        Raises:
            Rejected: naming limits[NAME] that is unknown, no number that can bound, or wider.
        """
        held, changed = self.in_force(spec), {}
        for name, value in asked.items():
            key = f"limits[{shown(name)}]"
            if name not in held:
                raise Rejected(key, f"one of: {', '.join(held)}", "an unknown name")
            floor = name == "z_floor_m"
            if not math.isfinite(value) or (value <= 0 and not floor):
                raise Rejected(key, "a finite number" if floor else "a positive, finite number", f"{value:g}")
            slack = ROUNDING * abs(held[name])  # limits travel as float32, and 0.02 would come as a little less
            wider = value < held[name] - slack if floor else value > held[name] + slack
            if wider and refuse_wider:
                remedy = "limits can be tightened, never widened"
                raise Rejected(key, f"at {'least' if floor else 'most'} {held[name]:g}", f"{value:g}", remedy)
            changed[name] = max(value, held[name]) if floor else min(value, held[name])
        scalars = {name: value for name, value in changed.items() if name in SCALARS}
        fields = {name: value for name, value in changed.items() if name not in SCALARS}
        return replace(self, fields={**self.fields, **fields}, **scalars)  # type: ignore[arg-type]

    def in_force(self, spec: ActionSpec) -> dict[str, float]:
        """Every limit by name, the contract's own among them; infinite where there is none."""
        own = {f.name: f.limit for f in spec.fields if f.limit is not None}
        fields = {name: min(limit, self.fields.get(name, math.inf)) for name, limit in own.items()}
        return {**fields, **{name: getattr(self, name) for name in SCALARS}}


SCALARS = ("step_m", "jump_m", "jump_rad", "z_floor_m")
"""The limits that are no field's."""


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
    """The action [A] to execute, and how it came to differ from the policy's. `hold`: there was no valid action."""

    action: NDArray[np.float32]
    interventions: tuple[Intervention, ...] = ()
    hold: bool = False


def require_bound(action: ActionSpec) -> None:
    """Raise unless an envelope can keep every part of such actions within limits that have names of their own.

    Motions have a limit, in the units of the wire; the command has an interval, as a hold repeats what has: of a
    motion that would be one more step.

    Raises:
        Rejected: FAILED_PRECONDITION, naming the fields that it could not.
    """
    units = {**dict.fromkeys(AXIS_OF, "m"), ROTATION: "rad"}
    for one in action.fields:
        command = one.components == (COMMAND,) and one.limit is None
        motion = one.limit is not None and all(units.get(c) == one.unit for c in one.components)
        if not (command or motion) or one.name in SCALARS:
            expected = (
                f"fields of {', '.join(AXIS_OF)} in m or {ROTATION} in rad, with a limit, and of {COMMAND} with low "
                f"and high; none called {', '.join(SCALARS)}"
            )
            remedy = "declare it so, and export the policy again"
            raise Rejected("contract.action", expected, one.name, remedy, Status.FAILED_PRECONDITION)


class Envelope:
    """What may be executed under one contract and one set of limits.

    Raises:
        Rejected: when a limit names a field that the contract does not have, or the floor is above the workspace.
    """

    def __init__(self, spec: PolicySpec, limits: Limits = Limits()) -> None:
        self.spec, self.limits = spec, limits.tightened(limits.fields, spec.action, refuse_wider=False)
        self._bounds = self.limits.in_force(spec.action)
        places = {f.name: tuple(range(spec.action.size))[spec.action.slice_of(f.name)] for f in spec.action.fields}
        self._fields: tuple[tuple[Field, tuple[int, ...]], ...] = tuple((f, places[f.name]) for f in spec.action.fields)
        self._translation = [(f, p) for f, p in self._fields if set(f.components) <= set(AXIS_OF)]
        self._rotation = [(f, p) for f, p in self._fields if f.components == (ROTATION,)]
        self._rest = (0.0,) * spec.action.size
        box = self.limits.workspace or Workspace((-math.inf,) * 3, (math.inf,) * 3)
        self._low, self._high = (*box.low[:2], max(box.low[2], self.limits.z_floor_m)), box.high
        self._floored = self.limits.z_floor_m >= box.low[2]
        self._bounded = any(map(math.isfinite, (*self._low, *self._high)))
        self._least = [low - STRAY_M if math.isfinite(low) else -REACH_M for low in self._low]
        self._most = [high + STRAY_M if math.isfinite(high) else REACH_M for high in self._high]
        if self._low[2] >= self._high[2]:
            expected, got = f"below {self._high[2]:g} m, the workspace's upper wall", f"{self.limits.z_floor_m:g}"
            raise Rejected("limits['z_floor_m']", expected, got, "no motion could end between them")

    def tighter(self, asked: Mapping[str, float]) -> "Envelope":
        """This one within an episode's own limits. Raises what Limits.tightened and Envelope raise."""
        return Envelope(self.spec, self.limits.tightened(asked, self.spec.action))

    def require_pose(self, pose: Pose | None) -> None:
        """Where there is a workspace or a floor.

        Raises:
            Rejected: FAILED_PRECONDITION without a pose, INVALID_ARGUMENT for one so far off that its unit or its frame
                must be another.
        """
        if not self._bounded:
            return
        if pose is None:
            remedy = "this server keeps a workspace; send where the gripper is"
            raise Rejected("observation.pose", "a pose", "none", remedy, Status.FAILED_PRECONDITION)
        for name, value, least, most in zip("xyz", (pose.x, pose.y, pose.z), self._least, self._most, strict=True):
            if not least <= value <= most:
                remedy = "check unit and frame: metres, in the robot's base frame"
                raise Rejected(f"observation.pose.{name}", f"{least:g} to {most:g} m", f"{value:g} m", remedy)

    def decide(
        self,
        action: NDArray[np.float32],
        *,
        sound: bool = True,
        gripper: float = 0.0,
        pose: Pose | None = None,
        previous: Sequence[float] | NDArray[np.float32] | None = None,
        at_rest: bool = False,
    ) -> Decision:
        """Keep an action [A] within every limit.

        Args:
            sound: whether all else that the policy said is finite; if not, its action is not believed either.
            gripper: the observation's, for a hand that must keep what it holds.
            pose: where the tool is; needed where a workspace or a floor is kept.
            previous: the action that was executed before; None: there was none, or it is not known.
            at_rest: the arm stands still, so that any motion is a jump from none.

        Raises:
            Rejected: what `require_pose` raises.
        """
        self.require_pose(pose)
        proposed = action.tolist()
        if not sound or not all(map(math.isfinite, proposed)):
            return self._hold(proposed, gripper, previous)
        motion = _Motion(proposed)
        self._keep_bounds(motion)
        self._keep_step(motion)
        if at_rest:
            self._keep_jump(motion, self._rest)
        elif previous is not None:
            self._keep_jump(motion, previous)
        if self._bounded and pose is not None:
            self._keep_inside(motion, (pose.x, pose.y, pose.z))
        if not motion.changes:
            return Decision(action)
        return Decision(np.array(motion.values, np.float32), tuple(motion.changes))

    def _hold(
        self, proposed: list[float], gripper: float, previous: Sequence[float] | NDArray[np.float32] | None
    ) -> Decision:
        held = self.spec.hold(gripper).tolist()
        for f, places in self._fields:
            if f.limit is None and previous is not None:  # a command stands until another is given
                for place in places:
                    held[place] = float(previous[place])
        motion = _Motion(proposed)
        for f, places in self._fields:
            motion.change(f, places, [held[p] for p in places], "not_finite", 0.0)
        return Decision(np.array(held, np.float32), tuple(motion.changes), hold=True)

    def _keep_bounds(self, motion: "_Motion") -> None:
        for f, places in self._fields:
            values = [motion.values[p] for p in places]
            if f.limit is None:
                low, high = float(f.low or 0.0), float(f.high or 0.0)
                if not low <= values[0] <= high:
                    motion.change(
                        f, places, [min(max(values[0], low), high)], "limit", low if values[0] < low else high
                    )
            else:
                bound = self._bounds[f.name]
                size = math.hypot(*values)
                if size > bound * (1 + ROUNDING):
                    share = bound / size * SHRINK
                    limit = -bound if f.kind is not Kind.VECTOR and values[0] < 0 else bound
                    motion.change(f, places, [v * share for v in values], "limit", limit)

    def _keep_step(self, motion: "_Motion") -> None:
        length = math.hypot(*(motion.values[p] for _, places in self._translation for p in places))
        if length > self.limits.step_m * (1 + ROUNDING):
            share = self.limits.step_m / length * SHRINK
            for f, places in self._translation:
                motion.change(f, places, [motion.values[p] * share for p in places], "step", self.limits.step_m)

    def _keep_jump(self, motion: "_Motion", previous: Sequence[float] | NDArray[np.float32]) -> None:
        """Towards the wish, but no further from the motion before; both lie within the bounds, so this does too."""
        for parts, bound in ((self._translation, self.limits.jump_m), (self._rotation, self.limits.jump_rad)):
            places = [p for _, places in parts for p in places]
            jump = math.hypot(*(motion.values[p] - float(previous[p]) for p in places))
            if jump > bound * (1 + ROUNDING):
                share = bound / jump * SHRINK
                for f, own in parts:
                    after = [float(previous[p]) + share * (motion.values[p] - float(previous[p])) for p in own]
                    motion.change(f, own, after, "jump", bound)

    def _keep_inside(self, motion: "_Motion", position: tuple[float, float, float]) -> None:
        """Shorten a translation until it ends inside; a tool that is already outside may only move back in."""
        for f, places in self._translation:
            share, wall, rule = 1.0, 0.0, "workspace"
            for name, place in zip(f.components, places, strict=True):
                step, axis = motion.values[place], AXIS_OF[name]
                face = self._high[axis] if step > 0 else self._low[axis]
                room = max(face - position[axis], 0.0) if step > 0 else max(position[axis] - face, 0.0)
                if abs(step) > room * (1 + ROUNDING) and room / abs(step) < share:
                    share, wall = room / abs(step), face
                    rule = "z_floor" if self._floored and axis == 2 and step < 0 else "workspace"
            if share < 1:
                motion.change(f, places, [motion.values[p] * share * SHRINK for p in places], rule, wall)


class _Motion:
    """An action on its way through the rules."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.changes = list(values), list[Intervention]()

    def change(self, f: Field, places: tuple[int, ...], after: list[float], rule: str, limit: float) -> None:
        before = tuple(self.values[p] for p in places)
        if before == tuple(after):
            return
        for place, value in zip(places, after, strict=True):
            self.values[place] = value
        self.changes.append(Intervention(f.name, rule, before, tuple(np.array(after, np.float32).tolist()), limit))
