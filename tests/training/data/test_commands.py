"""`python -m training.data`: what it says, what it writes, how it exits."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from protos.spaces import SPEC as DEFAULT_SPEC
from protos.spaces import ActionSpec, GripperState
from sim_client import store
from sim_client.episodes import Episode
from tests.makers import CONVENTIONS
from tests.training.data.makers import ABOUT, REPOSITORY, SPEC, assert_same, episode, minari
from training.data.__main__ import main
from training.data.convert import convert
from training.data.page import bars, charts, filmstrip
from training.data.regroup import draw, joined
from training.data.survey import SECTORS, Survey


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minari(tmp_path_factory.mktemp("data") / "set", 8)


def test_help_teaches_each_command_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in ("validate", "inspect", "import", "export", "split", "merge"):
        assert f"Example: python -m training.data {name} " in said


def test_a_mistake_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.data", "inspect", str(tmp_path / "nowhere")]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert answer.returncode == 2
    assert answer.stderr == f"refused: {tmp_path}/nowhere: expected a dataset, got no such file or directory\n"


def test_what_is_not_there_is_not_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "policy.onnx").touch()
    assert main(["validate", str(tmp_path)]) == 2
    assert "got a directory that is none of them\n" in capsys.readouterr().err


def test_neither_torch_nor_a_simulator_is_imported(path: Path) -> None:
    heavy = "{'torch', 'e2cnn', 'pybullet'} & set(sys.modules)"
    code = f"import sys; from training.data.__main__ import main; main(['inspect', {str(path)!r}]); print({heavy})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert said.stdout.endswith("\nset()\n")


def test_usage_errors_exit_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "somewhere"])
    assert stop.value.code == 2


def test_validate_counts_what_is_good(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 0
    told = capsys.readouterr()
    assert told.out == (f"{path}: good; 8 episodes, 29 transitions, 4 successful, contract {SPEC.digest[:16]}\n")
    assert told.err == ""


def suspicious(change: str) -> Episode:
    made = episode(0)
    if change == "dead camera":
        return replace(made, depth=np.repeat(made.depth[:1], len(made.depth), axis=0))
    if change == "no success":
        return replace(made, reward=made.reward * 0)
    if change == "empty gripper":
        return replace(made, gripper=made.gripper * 0)
    if change == "tiny motions":
        return replace(made, action=made.action * np.float32([1, 0.02, 0.02, 1, 1]))
    if change == "holes":
        depth = made.depth.copy()
        depth[:, 0] = 0.0
        return replace(made, depth=depth)
    if change == "paid early":
        return replace(made, reward=np.ones_like(made.reward))
    if change == "no motion":
        return replace(made, action=made.action * np.float32([1, 0, 0, 0, 0]))
    return replace(made, action=np.abs(made.action))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("dead camera", "depth image never changes within 1 episodes (0)"),
        ("no success", "no episode succeeds"),
        ("empty gripper", "gripper's state never reaches 1 (at most 0)"),
        ("no motion", "all motions are zero"),
        ("one quadrant", "of 8 sectors of the circle"),
        ("tiny motions", "planar motions use at most 2 % of their bound"),
        ("holes", "6.2 % of pixels read 0 m"),
        ("paid early", "a reward comes before the last step in 1 episodes (0)"),
    ],
)
def test_validate_warns_of_what_is_legal_but_suspicious(
    change: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write(tmp_path / "set", [suspicious(change)], ABOUT)
    assert main(["validate", str(tmp_path / "set")]) == 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("opening", "warned"),
    [([0.0, 0.4], False), ([0.4, 0.4], True), ([1.0, 1.0], True)],
    ids=["half open", "never moves", "wide open"],
)
def test_an_open_ratio_is_suspicious_where_it_never_changes(opening: list[float], warned: bool) -> None:
    spec = replace(SPEC, observation=replace(SPEC.observation, gripper=GripperState.OPEN_RATIO))
    one = replace(episode(0), gripper=np.resize(np.float32(opening), (3, 1)))
    told = [warning for warning in Survey.of(spec, [one]).warnings() if "gripper" in warning]
    assert told == ([f"the gripper's opening never changes (always {opening[0]:g}): is it recorded?"] if warned else [])


def test_inspect_tells_counts_distributions_coverage_and_bytes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    for expected in (
        "8, 4 successful (50%)",
        "behavior expert: 4 episodes, 4 successful",
        "behavior random: 4 episodes, 0 successful",
        "min 2, median 3.5, mean 3.62, max 6",
        "on disk",
        *(f.name for f in SPEC.action.fields),
        "315-360 deg",
    ):
        assert expected in said


def test_the_survey_counts_every_step_once_and_directions_by_sector() -> None:
    made = episode(0)
    turns = (np.arange(SECTORS) + 0.5) * 2 * np.pi / SECTORS
    action = np.zeros((SECTORS, 5), np.float32)
    action[:, 1], action[:, 2] = 0.04 * np.cos(turns), 0.04 * np.sin(turns)
    frames = {"depth": np.zeros((SECTORS + 1, 16, 16), np.float32), "gripper": np.ones((SECTORS + 1, 1), np.float32)}
    survey = Survey.of(SPEC, [replace(made, **frames, action=action, reward=np.ones(SECTORS, np.float32))])
    assert survey.sectors.tolist() == [1] * SECTORS
    assert survey.covered == SECTORS
    assert all(counts.sum() == SECTORS for counts in survey.histograms.values())
    assert survey.histograms["planar"][15:17].sum() == SECTORS  # 0.8 of the radius, on the edge of two bins


def test_bars_show_what_is_there() -> None:
    assert bars(np.array([0, 1, 1000])) == " ▁█"
    assert bars(np.zeros(3, int)) == "   "


def test_the_page_is_one_file_with_pictures_and_numbers(path: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "set.html"
    assert main(["inspect", str(path), "--html", str(page)]) == 0
    text = page.read_text()
    pictures = re.findall(r"data:image/png;base64,([^']+)'", text)
    assert len(pictures) == 1 + 6  # charts, and a filmstrip of each of the first six episodes
    for picture in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))
        assert pixels.std() > 0.05
    assert "8, 4 successful (50%)" in text
    assert "episode 5: 2 steps, failure, recorded by random" in text
    assert "http" not in text  # nothing is fetched
    assert [p.name for p in page.parent.iterdir()] == ["set.html"]


@pytest.mark.parametrize("dx", [0.05, 0.001])
def test_arrows_point_where_the_scene_moves(dx: float) -> None:
    """A target at +x of the gripper lies above the middle of the default view: an arrow to it points up. Where motions
    are so small that none would be seen, as at 30 Hz, all arrows are longer, and the page says by how much."""
    view = DEFAULT_SPEC.observation
    made = Episode(
        depth=np.random.default_rng(0).uniform(0, 0.5, (2, *view.shape)).astype(np.float32),
        gripper=np.zeros((2, 1), np.float32),
        action=np.array([[1, dx, 0, 0, 0]], np.float32),
        reward=np.zeros(1, np.float32),
        terminated=False,
        truncated=True,
    )
    first = filmstrip(made, DEFAULT_SPEC, longest=dx / 0.05).axes[0]
    arrow = next(text for text in first.texts if text.arrow_patch is not None)  # type: ignore[attr-defined]
    (head_col, head_row), (tail_col, tail_row) = arrow.xy, arrow.xyann  # type: ignore[attr-defined]
    assert head_col == pytest.approx(tail_col)
    assert tail_row - head_row == pytest.approx(max(dx, 0.025) / (view.extent_m / view.height))


@pytest.mark.parametrize(("row_axis", "col_axis"), CONVENTIONS)
def test_the_axes_in_a_corner_are_the_worlds_also_where_the_view_is_mirrored(row_axis, col_axis) -> None:
    spec = replace(SPEC, observation=replace(SPEC.observation, row_axis=row_axis, col_axis=col_axis))
    first, view = filmstrip(episode(0), spec, longest=1.0).axes[0], spec.observation
    arrows = [text for text in first.texts if getattr(text, "arrow_patch", None)][-2:]
    for arrow, direction in zip(arrows, ((1, 0), (0, 1)), strict=True):
        drawn = np.subtract(arrow.xy, arrow.xyann)[::-1]  # type: ignore[attr-defined]
        seen = np.subtract(view.pixel_of(np.array(direction)), view.pixel_of(np.zeros(2)))
        assert np.dot(drawn, seen) == pytest.approx(np.linalg.norm(drawn) * np.linalg.norm(seen))
    assert [text.get_text() for text in first.texts if text.get_text()] == ["x", "y"]


def test_a_planar_motion_may_have_any_name() -> None:
    fields = tuple(replace(f, name="xy") if f.name == "planar" else f for f in SPEC.action.fields)
    spec = replace(SPEC, action=ActionSpec(fields))
    filmstrip(episode(0), spec, longest=1.0)
    assert "xy, length" in {axis.get_title() for axis in charts(Survey.of(spec, [episode(0)])).axes}


def test_charts_have_a_panel_per_field() -> None:
    titles = {axis.get_title() for axis in charts(Survey.of(SPEC, [episode(0)])).axes}
    assert {"gripper", "planar, length", "lift", "yaw", "episode length", "return"} <= titles


@pytest.mark.parametrize(("kind", "name"), [("npz", "out.npz"), ("robomimic", "out.hdf5"), ("lerobot", "out")])
def test_export_and_import_give_back_the_dataset(
    kind: str, name: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / name, tmp_path / "back"
    assert main(["export", str(path), "--format", kind, "--output", str(out)]) == 0
    assert main(["import", str(out), "--output", str(back)]) == 0
    assert capsys.readouterr().out.endswith(f"{back}: 8 episodes, 29 transitions, 4 successful\n")
    assert_same(list(store.read(back)), list(store.read(path)))
    assert main(["export", str(path), "--format", kind, "--output", str(out)]) == 2  # it exists


def test_split_divides_whole_episodes_evenly_and_the_same_way_again(path: Path, tmp_path: Path) -> None:
    for run in ("one", "two"):
        a, b = tmp_path / run / "a", tmp_path / run / "b"
        arguments = ["--share", "0.75", "--seed", "3", "--output-a", str(a), "--output-b", str(b)]
        assert main(["split", str(path), *arguments]) == 0
    first, second = list(store.read(tmp_path / "one/a")), list(store.read(tmp_path / "one/b"))
    assert [e.success for e in first].count(True) == 3
    assert [e.success for e in second].count(True) == 1
    assert len(first) == 6
    lost = {e.depth.tobytes() for e in store.read(path)} ^ {e.depth.tobytes() for e in first + second}
    assert not lost
    assert_same(first, list(store.read(tmp_path / "two/a")))
    assert store.read_about(tmp_path / "one/a").notes["split"] == {
        "of": ABOUT.dataset_id,
        "share": 0.75,
        "seed": 3,
    }


def test_a_split_that_fails_half_way_leaves_nothing_in_the_way(path: Path, tmp_path: Path, monkeypatch) -> None:
    converted, outputs = [], ["--output-a", str(tmp_path / "a"), "--output-b", str(tmp_path / "b")]

    def full_at_the_second(output: Path, *arguments: Any) -> int:
        converted.append(output)
        if len(converted) == 2:
            raise OSError(28, "No space left on device")
        return convert(output, *arguments)

    monkeypatch.setattr("training.data.regroup.convert", full_at_the_second)
    assert main(["split", str(path), "--share", "0.5", *outputs]) == 2
    assert list(tmp_path.iterdir()) == []
    assert main(["split", str(path), "--share", "0.5", *outputs]) == 0


def test_a_split_leaves_what_another_made_meanwhile(path: Path, tmp_path: Path, monkeypatch) -> None:
    def meanwhile(*arguments: Any) -> list[bool]:
        minari(tmp_path / "a")
        return draw(*arguments)

    monkeypatch.setattr("training.data.regroup.draw", meanwhile)
    outputs = ["--output-a", str(tmp_path / "a"), "--output-b", str(tmp_path / "b")]
    assert main(["split", str(path), *outputs]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert len(list(store.read(tmp_path / "a"))) == 5


def test_a_split_by_no_share_is_refused(path: Path, tmp_path: Path) -> None:
    outputs = ["--output-a", str(tmp_path / "a"), "--output-b", str(tmp_path / "b")]
    assert main(["split", str(path), "--share", "1.0", *outputs]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_split_into_itself_is_refused(path: Path, tmp_path: Path) -> None:
    for outputs in (("a", "a"), ("a", "a/b"), ("q/a", "q")):
        flags = [word for flag, output in zip("ab", outputs, strict=True) for word in (f"--output-{flag}", output)]
        assert main(["split", str(path), *(str(tmp_path / f) if "--" not in f else f for f in flags)]) == 2
    assert list(tmp_path.iterdir()) == []


def merged(tmp_path: Path, *paths: Path) -> int:
    return main(["merge", *map(str, paths), "--output", str(tmp_path / "both")])


def test_what_was_split_is_merged_again(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(["split", str(path), "--share", "0.5", "--output-a", str(a), "--output-b", str(b)]) == 0
    capsys.readouterr()
    assert merged(tmp_path, a, b) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"{tmp_path}/both: 8 episodes, 29 transitions, 4 successful\n", "")
    assert_same([*store.read(a), *store.read(b)], list(store.read(tmp_path / "both")))
    about = store.read_about(tmp_path / "both")
    assert (about.task, about.spec, about.behavior) == (ABOUT.task, ABOUT.spec, ABOUT.behavior)
    assert [part["of"] for part in about.notes["merged"]] == [ABOUT.dataset_id] * 2
    assert main(["validate", str(tmp_path / "both")]) == 0


def test_an_episode_is_merged_once(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merged(tmp_path, minari(tmp_path / "more", 10), path) == 0
    assert "warning: left out: 8 of the episodes, as they were there before\n" in capsys.readouterr().err
    assert_same(list(store.read(tmp_path / "more")), list(store.read(tmp_path / "both")))


@pytest.mark.parametrize(
    ("worlds", "kept"), [(("one", "one"), "one"), (("one", None), "one"), (("one", "two"), None), ((None, None), None)]
)
def test_a_merged_dataset_has_the_world_that_its_parts_share(
    worlds: tuple[str | None, ...], kept: str | None, tmp_path: Path
) -> None:
    parts = [replace(ABOUT, env_spec=world, behavior=f"policy:{i}") for i, world in enumerate(worlds)]
    about = joined([tmp_path / "a", tmp_path / "b"], parts)
    assert about.env_spec == kept
    assert about.behavior == "policy:0, policy:1"


@pytest.mark.parametrize("what", ["another task", "another contract", "one", "an output that is there"])
def test_what_does_not_belong_together_is_not_merged(
    what: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, spec = tmp_path / "other", replace(SPEC, observation=replace(SPEC.observation, extent_m=0.5))
    about = {"another task": replace(ABOUT, task="stack"), "another contract": replace(ABOUT, spec=spec)}
    store.write(other, [episode(0)], about.get(what, ABOUT))
    if what == "an output that is there":
        (tmp_path / "both").mkdir()
    before = sorted(tmp_path.iterdir())
    assert merged(tmp_path, path, *([] if what == "one" else [other])) == 2
    said = {
        "another task": f"{other}, task: expected {ABOUT.task}, as of {path}, got stack",
        "another contract": f"contract.observation.extent_m: expected observation.extent_m={SPEC.observation.extent_m}",
        "one": "PATHS: expected two datasets or more, got 1",
        "an output that is there": f"{tmp_path}/both",
    }
    assert said[what] in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("share", "count"), [("0.9", 2), ("0.1", 2), ("0.9", 1)])
def test_a_split_with_an_empty_part_is_refused(share: str, count: int, tmp_path: Path) -> None:
    """Of a single success and a single failure neither can be divided."""
    few, outputs = (
        minari(tmp_path / "few", count),
        ["--output-a", str(tmp_path / "a"), "--output-b", str(tmp_path / "b")],
    )
    assert main(["split", str(few), "--share", share, *outputs]) == 2
    assert list(tmp_path.iterdir()) == [few]


@pytest.mark.parametrize("outcomes", [[True] * 2, [False] * 4, [True] * 2 + [False] * 2])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.9, 0.99])
def test_few_episodes_are_divided_where_there_are_two_of_a_kind(outcomes: list[bool], share: float) -> None:
    first = draw(outcomes, share, 0)
    assert {outcome for outcome, chosen in zip(outcomes, first, strict=True) if chosen} == set(outcomes)
    assert {outcome for outcome, chosen in zip(outcomes, first, strict=True) if not chosen} == set(outcomes)


def test_few_successes_are_not_all_on_one_side() -> None:
    outcomes = [True] * 4 + [False] * 16
    for share in (0.1, 0.9):
        first = draw(outcomes, share, 0)
        for part in (first, [not chosen for chosen in first]):
            assert {outcomes[i] for i, chosen in enumerate(part) if chosen} == {True, False}


def test_another_seed_draws_other_episodes() -> None:
    outcomes = [True, False] * 20
    assert draw(outcomes, 0.5, 0) == draw(outcomes, 0.5, 0)
    assert draw(outcomes, 0.5, 0) != draw(outcomes, 0.5, 1)
