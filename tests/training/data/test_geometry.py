"""Geometry files: every convention of a source ends in the contract's, and what is unclear is refused by its key."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import Rejected
from sim_client.episodes import check
from tests.training.data.makers import REPOSITORY
from training.data.formats.raw import Raw
from training.data.geometry import Geometry
from training.data.geometry_file import AXES, KEYS, read_geometry

CAMERA = (REPOSITORY / "docs/camera.toml").read_text()
OPTIONAL = {name for name, key in KEYS.items() if key.default is None or name == "action.absent"}


def parse(folder: Path, *edits: tuple[str, str]) -> Geometry:
    """docs/camera.toml with lines of `key = ...` replaced; a key is looked for below its [table]."""
    lines, table = [], ""
    for line in CAMERA.splitlines():
        table = line.split("]")[0].strip("[") if line.startswith("[") else table
        for name, value in edits:
            section, _, key = name.rpartition(".")
            if section == table and re.match(rf"#? ?{key} *=", line):
                line = value
        lines.append(line)
    file = folder / "camera.toml"
    file.write_text("\n".join(lines))
    return read_geometry(file)


def raw(steps: int = 3, action: np.ndarray | None = None, depth: np.ndarray | None = None) -> Raw:
    return Raw(
        depth=np.full((steps + 1, 64, 64), 250) if depth is None else depth,
        gripper=np.zeros(steps + 1),
        action=np.zeros((steps, 7)) if action is None else action,
        reward=np.array([0.0] * (steps - 1) + [1.0]),
    )


def test_the_example_in_the_docs_means_what_its_comments_say(tmp_path: Path) -> None:
    geometry = read_geometry(REPOSITORY / "docs/camera.toml")
    assert geometry.spec.observation.extent_m == pytest.approx(0.448)
    assert geometry.spec.action.fields[1].limit == pytest.approx(math.sqrt(2) * 0.05)
    action = np.array([[1.0, -1.0, 0.5, 9, 9, 45.0, -1.0]])  # dx, dy, dz, two that are skipped, dtheta, p
    converted = geometry.episode(raw(1, action)).action
    np.testing.assert_allclose(converted, [[0, 0.05, -0.05, 0.025, math.pi / 4]], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(KEYS) - OPTIONAL))
def test_a_missing_key_is_named_with_its_meaning_and_an_example(name: str, tmp_path: Path) -> None:
    with pytest.raises(Rejected) as refusal:
        parse(tmp_path, (name, ""))
    key = name.rpartition(".")[2]
    assert refusal.value.field == f"{tmp_path / 'camera.toml'}, {name}"
    assert f"{KEYS[name].meaning}, e.g. {key} = {KEYS[name].example}" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("view.row_axis", 'row_axis = "forward"', "view.row_axis: expected world direction"),
        ("view.pixels", 'pixels = "64"', "view.pixels"),
        ("view.pixels", "pixels = true", "view.pixels"),
        ("task", 'task = ""', "task: expected what the robot does"),
        ("view.col_axis", 'col_axis = "+x"', "orthonormal"),
        ("view.metres_per_pixel", "metres_per_pixel = 0.007\nextent_m = 0.4", "got both"),
        ("view.metres_per_pixel", "", "got neither"),
        ("depth.metres_per_unit", "metres_per_unit = 0", "depth.metres_per_unit"),
        ("depth.max_m", "max_m = -1.0", "depth range"),
        ("depth.metres_per_unit", "metres_per_unit = inf", "depth.metres_per_unit: expected metres that one unit"),
        ("depth.offset_m", "offset_m = nan", "depth.offset_m"),
        ("depth.offset_m", f"offset_m = 1{400 * '0'}", "depth.offset_m: expected"),
        ("gripper.zero", "zero = nan", "gripper.zero"),
        ("action.gripper.closed", "closed = -inf", "action.gripper.closed"),
        ("gripper.meaning", 'meaning = "force"', "gripper.meaning"),
        ("gripper.one", "one = 0.0", "gripper.one"),
        ("action.order", 'order = ["dx", "dy", "dz", "p"]', "action.order"),
        ("action.order", 'order = ["dx", "dx", "dz", "dtheta", "p"]', "action.order"),
        ("action.planar.unit", 'unit = "inch"', "action.planar.unit"),
        ("action.lift.limit_m", "limit_m = -0.05", "limit must be positive"),
        ("success.from", 'from = "luck"', "success.from"),
        ("task", 'task = "reach"\ncolour = 1', "colour: expected one of task"),
        ("task", "task = ", "expected TOML"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(name: str, line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=re.escape(str(tmp_path))) as refusal:
        parse(tmp_path, (name, line))
    assert said in str(refusal.value)


@pytest.mark.parametrize("row", AXES)
@pytest.mark.parametrize("col", AXES)
def test_any_right_angled_pair_of_axes_is_a_view_mirrored_ones_too(row: str, col: str, tmp_path: Path) -> None:
    edits = (("view.row_axis", f'row_axis = "{row}"'), ("view.col_axis", f'col_axis = "{col}"'))
    if row[1] == col[1]:
        with pytest.raises(Rejected):
            parse(tmp_path, *edits)
        return
    view = parse(tmp_path, *edits).spec.observation
    for axis, index in ((row, 0), (col, 1)):  # a step along the axis moves the pixel along its own index alone
        moved = view.pixel_of(np.array(AXES[axis]) * 0.07) - view.pixel_of(np.zeros(2))
        np.testing.assert_allclose(moved, np.eye(2)[index] * 10)


@given(
    metres=st.lists(st.floats(0, 0.6), min_size=1, max_size=4),
    per_unit=st.sampled_from([1.0, 1e-2, 1e-3, 1e-4]),
    offset=st.floats(-2, 2),
    height=st.booleans(),
)
def test_depth_comes_back_in_metres_below_the_plane(
    tmp_path_factory: pytest.TempPathFactory, metres: list[float], per_unit: float, offset: float, height: bool
) -> None:
    measured = "height" if height else "below_plane"
    geometry = parse(
        tmp_path_factory.mktemp("geometry"),
        ("depth.metres_per_unit", f"metres_per_unit = {per_unit}"),
        ("depth.offset_m", f"offset_m = {offset}"),
        ("depth.measured", f'measured = "{measured}"'),
    )
    true = np.repeat(metres, 64 * 64).reshape(-1, 64, 64)
    recorded = ((offset - true) if height else (true - offset)) / per_unit
    converted = geometry.episode(raw(max(len(metres) - 1, 1), depth=recorded)).depth
    np.testing.assert_allclose(converted[: len(metres)], true, atol=1e-6)


UNITS = {"m": 1.0, "cm": 100.0, "mm": 1000.0}


@given(
    planar=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    lift=st.floats(-1, 1),
    yaw=st.floats(-1, 1),
    opened=st.floats(0, 1),
    order=st.permutations(["p", "dx", "dy", "dz", "dtheta", "_"]),
    turned=st.sets(st.sampled_from(["dx", "dy", "dz", "dtheta"])),
    unit=st.sampled_from([*UNITS, "normalized"]),
    degrees=st.booleans(),
    limit=st.floats(0.001, 0.2),
)
def test_an_action_of_any_order_sign_and_unit_arrives_and_no_corner_of_its_box_is_clipped(
    tmp_path_factory: pytest.TempPathFactory,
    planar: tuple[float, float],
    lift: float,
    yaw: float,
    opened: float,
    order: list[str],
    turned: set[str],
    unit: str,
    degrees: bool,
    limit: float,
) -> None:
    named = [f"-{name}" if name in turned else name for name in order]
    geometry = parse(
        tmp_path_factory.mktemp("geometry"),
        ("action.order", f"order = {named}".replace("'", '"')),
        ("action.planar.unit", f'unit = "{unit}"'),
        ("action.planar.limit_m", f"limit_m = {limit}"),
        ("action.yaw.unit", f'unit = "{"deg" if degrees else "rad"}"'),
    )
    true = {"p": opened, "dx": limit * planar[0], "dy": limit * planar[1], "dz": 0.05 * lift, "dtheta": 0.785 * yaw}
    scale = {"dx": UNITS.get(unit, 1 / limit), "dz": 20.0, "dtheta": 180 / math.pi if degrees else 1.0}
    scale["dy"] = scale["dx"]
    recorded = {n: v * scale.get(n, 1.0) * (-1 if n in turned else 1) for n, v in true.items()}
    recorded |= {"p": 2 * opened - 1, "_": 123.0}
    converted = geometry.episode(raw(1, np.array([[recorded[name] for name in order]]))).action[0]
    np.testing.assert_allclose(converted, [true[n] for n in ("p", "dx", "dy", "dz", "dtheta")], atol=1e-6)
    assert (geometry.spec.action.magnitudes(converted) <= 1 + 1e-5).all()


def test_a_radius_that_bounded_the_motion_stays_the_radius(tmp_path: Path) -> None:
    geometry = parse(tmp_path, ("action.planar.bounded_by", 'bounded_by = "radius"'))
    assert geometry.spec.action.fields[1].limit == 0.05


def test_an_open_ratio_is_read_between_closed_and_open(tmp_path: Path) -> None:
    geometry = parse(
        tmp_path,
        ("gripper.meaning", 'meaning = "open_ratio"'),
        ("gripper.zero", "zero = 0.01"),
        ("gripper.one", "one = 0.09"),
    )
    read = geometry.episode(replace(raw(1), gripper=np.array([[0.01], [0.05]])))
    np.testing.assert_allclose(read.gripper, [[0], [0.5]], atol=1e-6)


@pytest.mark.parametrize(
    ("edits", "depth", "gripper"),
    [
        ([], 250, np.float32([0.8, 0.8, 0.0])),  # closed at 0.8, where 0.8 is no float32
        ([("depth.measured", 'measured = "height"'), ("depth.offset_m", "offset_m = 0.35")], 350, np.zeros(3)),
    ],
    ids=["gripper", "a pixel on the plane"],
)
def test_what_lies_on_a_bound_is_not_refused_for_rounding(tmp_path: Path, edits, depth, gripper) -> None:
    zero, one = ("zero = 0.8", "one = 0.0") if gripper.any() else ("zero = 0.0", "one = 1.0")
    geometry = parse(tmp_path, ("gripper.zero", zero), ("gripper.one", one), *edits)
    source = replace(raw(2, depth=np.full((3, 64, 64), depth)), gripper=gripper)
    check(geometry.episode(source), geometry.spec, "here")
    with pytest.raises(Rejected):
        check(geometry.episode(replace(source, gripper=gripper + 1.001)), geometry.spec, "here")


@pytest.mark.parametrize(
    "empty", [{"action": np.zeros((0, 7))}, {"gripper": np.zeros(())}, {"depth": np.zeros((0, 64, 64))}], ids=str
)
def test_an_empty_episode_is_refused_by_what_is_empty(tmp_path: Path, empty: dict[str, np.ndarray]) -> None:
    with pytest.raises(Rejected, match=f"{next(iter(empty))}: expected at least one step"):
        parse(tmp_path).episode(replace(raw(2), **empty))


def test_the_first_done_is_the_end_however_the_recording_ended(tmp_path: Path) -> None:
    geometry = parse(tmp_path, ("success.from", 'from = "done"'))
    went_on = replace(raw(5), reward=None, done=np.array([0, 0, 1, 1, 1]), terminated=False, truncated=True)
    read = geometry.episode(went_on)
    assert (len(read), read.success, read.terminated, read.truncated) == (3, True, True, False)
    ended = geometry.episode(replace(went_on, done=np.array([0, 0, 0, 0, 1])))  # nothing was cut: it may say itself
    assert (len(ended), ended.terminated, ended.truncated) == (5, False, True)


@pytest.mark.parametrize("length", [1, 4])
def test_as_many_dones_as_actions_are_needed_to_end_one(tmp_path: Path, length: int) -> None:
    geometry = parse(tmp_path, ("success.from", 'from = "done"'))
    with pytest.raises(Rejected, match=f"done: expected length 3, one per action, got {length}"):
        geometry.episode(replace(raw(3), done=np.ones(length)))


@pytest.mark.parametrize("missing", [0, 65535, math.nan])
def test_pixels_that_were_not_measured_are_nearest_whatever_the_offset(tmp_path: Path, missing: float) -> None:
    """As in the simulator: else a hole would be a thing, or ground, or beyond the range, by chance."""
    depth = np.full((4, 64, 64), 1150.0)
    depth[1, 3, 4] = missing
    edits = (("depth.offset_m", "offset_m = -0.9"), ("depth.missing", f"missing = {missing}"))
    converted = parse(tmp_path, *edits).episode(raw(3, depth=depth)).depth
    assert converted[1, 3, 4] == 0
    assert np.isclose(np.sort(converted.ravel())[1:], 0.25).all()


@pytest.mark.parametrize("missing", [65836, 65.535, -1, math.nan, math.inf])
def test_a_missing_value_that_the_source_cannot_hold_erases_no_depth(tmp_path: Path, missing: float) -> None:
    depth = np.resize(np.array([0, 65, 300, 65535], np.uint16), (4, 64, 64))  # what each would wrap around to
    geometry = parse(tmp_path, ("depth.missing", f"missing = {missing}"))
    with pytest.raises(Rejected, match=r"depth.missing: expected a value that the source's uint16 can hold, got"):
        geometry.episode(raw(3, depth=depth))


def test_absent_components_are_zero(tmp_path: Path) -> None:
    geometry = parse(
        tmp_path, ("action.order", 'order = ["dx", "dy", "dz", "p"]'), ("action.absent", 'absent = ["dtheta"]')
    )
    assert geometry.episode(raw(1, np.ones((1, 4)))).action[0, 4] == 0


@pytest.mark.parametrize(
    ("success", "reward", "done", "succeeds"),
    [
        ("reward", [0, 1.0], None, True),
        ("reward", [1.0, 0], None, False),
        ("done", None, [0, 1], True),
        ("done", None, [0, 0], False),
        ("all", None, None, True),
    ],
)
def test_success_is_read_as_the_file_says(
    success: str, reward: list[float] | None, done: list[int] | None, succeeds: bool, tmp_path: Path
) -> None:
    geometry = parse(tmp_path, ("success.from", f'from = "{success}"'))
    source = replace(
        raw(2),
        reward=None if reward is None else np.array(reward),
        done=None if done is None else np.array(done),
    )
    read = geometry.episode(source)
    assert read.success is read.terminated is not read.truncated
    assert read.success == succeeds


@pytest.mark.parametrize("success", ["reward", "done"])
def test_success_that_the_source_does_not_tell_is_refused(success: str, tmp_path: Path) -> None:
    geometry = parse(tmp_path, ("success.from", f'from = "{success}"'))
    with pytest.raises(Rejected, match=f"{success}: expected in the source"):
        geometry.episode(replace(raw(2), reward=None))
