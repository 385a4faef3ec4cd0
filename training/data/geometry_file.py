"""The geometry file: what the numbers of somebody else's dataset mean, in TOML. docs/camera.toml is one, explained."""

import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from protos.errors import Rejected
from protos.spaces import ACTION, ActionSpec, GripperState, ObservationSpec, PolicySpec
from training.data.geometry import Geometry

AXES = {"+x": (1, 0), "-x": (-1, 0), "+y": (0, 1), "-y": (0, -1)}
LENGTHS = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}
ANGLES = {"rad": 1.0, "deg": math.pi / 180}
NORMALIZED = "normalized"
NOTHING = object()


@dataclass(frozen=True)
class Key:
    """A key of the file: what it means, an example as one writes it, and what it may be."""

    meaning: str
    example: str
    kind: type | tuple[type, ...]
    choices: tuple[str, ...] = ()
    default: Any = NOTHING


NUMBER = (int, float)
KEYS = {
    "task": Key("what the robot does, as the dataset is to call it", '"drawer_opening"', str),
    "source.depth": Key("the source's name for depth images", '"birdview_depth"', str, default=None),
    "source.gripper": Key("the source's name for the gripper's state", '"gripper_state"', str, default=None),
    "source.action": Key("the source's name for actions", '"actions"', str, default=None),
    "source.reward": Key("the source's name for rewards", '"rewards"', str, default=None),
    "source.done": Key("the source's name for done flags", '"dones"', str, default=None),
    "view.pixels": Key("side of the square depth image in pixels", "128", int),
    "view.metres_per_pixel": Key("side of the square that a pixel covers, m", "0.0035", NUMBER, default=None),
    "view.extent_m": Key("side of the square that the image covers, m", "0.45", NUMBER, default=None),
    "view.row_axis": Key("world direction in which the row index grows", '"-x"', str, tuple(AXES)),
    "view.col_axis": Key("world direction in which the column index grows", '"-y"', str, tuple(AXES)),
    "view.plane_above_tool_m": Key("height above the tool of the plane that depth is measured from, m", "0.1", NUMBER),
    "depth.metres_per_unit": Key("metres that one unit of a depth value stands for", "0.001", NUMBER),
    "depth.measured": Key(
        "what a value is: the distance below the plane, or the height above some level",
        '"below_plane"',
        str,
        ("below_plane", "height"),
    ),
    "depth.offset_m": Key("added to the distance (or, for heights: the plane's own height), m", "0.0", NUMBER),
    "depth.min_m": Key("smallest distance below the plane that occurs, m", "0.0", NUMBER),
    "depth.max_m": Key("largest distance below the plane that occurs, m", "0.6", NUMBER),
    "depth.missing": Key("the source's value where its camera measured nothing", "0", NUMBER, default=None),
    "gripper.meaning": Key(
        "whether it says that something is held, or how far the gripper is open",
        '"holding"',
        str,
        tuple(GripperState),
    ),
    "gripper.zero": Key("the source's value for not holding, or for closed", "0.0", NUMBER),
    "gripper.one": Key("the source's value for holding, or for wide open", "1.0", NUMBER),
    "action.order": Key(
        "what each column of an action is; a minus turns a sign, an underscore skips a column",
        '["dx", "dy", "dz", "dtheta", "p"]',
        list,
    ),
    "action.absent": Key("components that the source does not have; they become 0", '["dtheta"]', list, default=()),
    "action.gripper.closed": Key("the command that closes the gripper", "-1.0", NUMBER),
    "action.gripper.open": Key("the command that opens the gripper", "1.0", NUMBER),
    "action.planar.unit": Key("unit of dx and dy", '"m"', str, (*LENGTHS, NORMALIZED)),
    "action.planar.limit_m": Key("largest planar motion of a step, m", "0.05", NUMBER),
    "action.planar.bounded_by": Key(
        "whether limit_m bounds the length of (dx, dy), or each of them apart", '"box"', str, ("radius", "box")
    ),
    "action.lift.unit": Key("unit of dz", '"m"', str, (*LENGTHS, NORMALIZED)),
    "action.lift.limit_m": Key("largest vertical motion of a step, m", "0.05", NUMBER),
    "action.yaw.unit": Key("unit of dtheta, counter-clockwise seen from above", '"deg"', str, (*ANGLES, NORMALIZED)),
    "action.yaw.limit_rad": Key("largest turn of a step, rad", "0.785", NUMBER),
    "success.from": Key(
        "what tells success: a positive last reward, the done flag, or that all episodes succeed",
        '"reward"',
        str,
        ("reward", "done", "all"),
    ),
}


def read_geometry(path: Path) -> Geometry:
    """Parse a geometry file. Raises Rejected naming the key, what it means and an example of its value."""
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as error:
        raise Rejected(str(path), "a geometry file", str(error), "copy docs/camera.toml and edit it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Rejected(str(path), "TOML", str(error), "compare docs/camera.toml") from error
    given = _flat(tree)
    for name in given:
        if name not in KEYS:
            raise Rejected(f"{path}, {name}", f"one of {', '.join(KEYS)}", "an unknown key", "compare docs/camera.toml")
    value = {name: _value(path, name, key, given.get(name, key.default)) for name, key in KEYS.items()}
    try:
        return _geometry(value)
    except Rejected as error:
        raise error.within(f"{path}, ") from error
    except ValueError as error:
        raise Rejected(str(path), "a view and limits that a contract can state", str(error)) from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _value(path: Path, name: str, key: Key, value: Any) -> Any:
    example = f"{name.rpartition('.')[2]} = {key.example}"
    if value is NOTHING:
        raise Rejected(f"{path}, {name}", f"{key.meaning}, e.g. {example}", "nothing", "compare docs/camera.toml")
    if value is key.default:
        return value
    wrong = isinstance(value, bool) or not isinstance(value, key.kind) or value == ""
    if not wrong and isinstance(value, int | float) and not _is_finite(value) and name != "depth.missing":
        raise Rejected(f"{path}, {name}", f"{key.meaning}, a finite number, e.g. {example}", repr(value))
    if wrong or (key.choices and value not in key.choices):
        choices = f" (one of {', '.join(key.choices)})" if key.choices else ""
        raise Rejected(f"{path}, {name}", f"{key.meaning}{choices}, e.g. {example}", repr(value))
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # TOML's integers are of any length
        return False


def _geometry(value: dict[str, Any]) -> Geometry:
    for name in ("gripper", "action.gripper"):
        zero, one = ("zero", "one") if name == "gripper" else ("closed", "open")
        if value[f"{name}.{zero}"] == value[f"{name}.{one}"]:
            raise Rejected(f"{name}.{one}", f"another value than {name}.{zero}", str(value[f"{name}.{one}"]))
    if not value["depth.metres_per_unit"] > 0:
        raise Rejected("depth.metres_per_unit", "a positive number", str(value["depth.metres_per_unit"]))
    action = _action_spec(value)
    slope = value["depth.metres_per_unit"] * (1 if value["depth.measured"] == "below_plane" else -1)
    return Geometry(
        task=value["task"],
        spec=PolicySpec(_observation_spec(value), action),
        names={
            n: value[f"source.{n}"] for n in ("depth", "gripper", "action", "reward", "done") if value[f"source.{n}"]
        },
        depth_slope=slope,
        depth_offset_m=value["depth.offset_m"],
        depth_missing=value["depth.missing"],
        gripper_zero=value["gripper.zero"],
        gripper_one=value["gripper.one"],
        columns=_columns(value),
        width=len(value["action.order"]),
        success=value["success.from"],
    )


def _observation_spec(value: dict[str, Any]) -> ObservationSpec:
    pixels, extent, per_pixel = (value[f"view.{name}"] for name in ("pixels", "extent_m", "metres_per_pixel"))
    if (extent is None) == (per_pixel is None):
        got = "neither" if extent is None else "both"
        raise Rejected("view.metres_per_pixel", "either it or view.extent_m, e.g. metres_per_pixel = 0.0035", got)
    return ObservationSpec(
        height=pixels,
        width=pixels,
        extent_m=float(extent if extent is not None else per_pixel * pixels),
        row_axis=AXES[value["view.row_axis"]],
        col_axis=AXES[value["view.col_axis"]],
        plane_above_tool_m=float(value["view.plane_above_tool_m"]),
        depth_min_m=float(value["depth.min_m"]),
        depth_max_m=float(value["depth.max_m"]),
        gripper=GripperState(value["gripper.meaning"]),
    )


def _action_spec(value: dict[str, Any]) -> ActionSpec:
    # A box's corner lies at sqrt(2) times the axis limit: the smallest radius that clips nothing.
    radius = value["action.planar.limit_m"] * (math.sqrt(2) if value["action.planar.bounded_by"] == "box" else 1.0)
    limits = {"planar": radius, "lift": value["action.lift.limit_m"], "yaw": value["action.yaw.limit_rad"]}
    return ActionSpec(tuple(replace(f, limit=float(limits[f.name])) if f.name in limits else f for f in ACTION.fields))


def _columns(value: dict[str, Any]) -> tuple[tuple[int, float, float], ...]:
    order = [str(name) for name in value["action.order"]]
    bare, absent = [name.removeprefix("-") for name in order], [str(name) for name in value["action.absent"]]
    named = sorted([name for name in bare if name != "_"] + absent)
    if named != sorted(ACTION.components):
        expected = f"each of {', '.join(ACTION.components)} once, in action.order or in action.absent"
        raise Rejected("action.order", expected, f"{order}, absent {absent}")
    closed, opened = value["action.gripper.closed"], value["action.gripper.open"]
    lengths = {axis: _factor(value, "planar", LENGTHS, "limit_m") for axis in ("dx", "dy")}
    factors = lengths | {"dz": _factor(value, "lift", LENGTHS, "limit_m")}
    factors |= {"dtheta": _factor(value, "yaw", ANGLES, "limit_rad"), "p": 1 / (opened - closed)}
    columns = []
    for name in ACTION.components:
        column = bare.index(name) if name in bare else -1
        sign = -1.0 if f"-{name}" in order else 1.0
        columns.append((column, sign * factors[name], -closed / (opened - closed) if name == "p" else 0.0))
    return tuple(columns)


def _factor(value: dict[str, Any], field: str, units: dict[str, float], limit: str) -> float:
    unit = value[f"action.{field}.unit"]
    return float(value[f"action.{field}.{limit}"] if unit == NORMALIZED else units[unit])
