"""The page that compares runs: numbers that are those of the runs, pictures that are there."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim_client.randomization import Randomization
from sim_client.world import World
from tests.makers import small_spec, tiny_manifest, tiny_policy_file
from tests.training.conftest import leave_out_the_export
from tests.training.test_run import arguments
from training.config import parse
from training.report import COLUMNS, Report, Run, _figure, _served, main, write_report
from training.run import train


@pytest.fixture(scope="module")
def runs(reach_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        leave_out_the_export(monkeypatch)
        for weight, algo in enumerate(("bc", "iql"), start=1):
            train(parse(arguments(reach_path, home / algo, "--updates", "40", "--algo", algo)))
            tiny_policy_file(home / algo / "policy.onnx", weight=weight)
    return [home / "bc", home / "iql"]


def cell(run: Run, column: str) -> str:
    return run.row()[COLUMNS.index(column)]


def test_the_table_says_what_the_runs_were(runs: list[Path], tmp_path: Path) -> None:
    write_report(Report((runs[0], runs[1]), tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    for words in ("<th>bc</th>", "<th>iql</th>", "both, C8", "expert-v0", "losses", "values", "policy"):
        assert words in page
    assert page.count("data:image/png;base64,") == 4  # losses, policy, time, values


def test_a_row_takes_success_from_the_curves_and_from_the_server_s_report(runs: list[Path]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(runs[0] / "tensorboard")) as log:
        for update, rate in ((40, 0.5), (20, 0.75)):  # evaluations come in when they can
            for name, value in (("rate", rate), ("wilson_low", rate - 0.1), ("wilson_high", rate + 0.1)):
                log.add_scalar(f"success/{name}", value, update)
    sha256 = hashlib.sha256((runs[0] / "policy.onnx").read_bytes()).hexdigest()
    served = {"policy_sha256": sha256, "successes": 9, "episodes": 10, "success_rate": 0.9}
    (runs[0] / "report.json").write_text(json.dumps(served))
    run = Run.read(runs[0])
    assert cell(run, "success in training") == "best 75% (65% to 85%) at update 20, last 50%"
    assert cell(run, "success through the server") == "90% (60% to 98%) at update 10"
    assert cell(run, "updates") == "40"
    (runs[0] / "report.json").write_text(json.dumps(served | {"policy_sha256": "another"}))
    assert cell(Run.read(runs[0]), "success through the server") == ""
    (runs[0].parent / "report.json").write_text(json.dumps(served))  # as the demo leaves it
    assert cell(Run.read(runs[0]), "success through the server") == "90% (60% to 98%) at update 10"


def test_of_several_reports_the_usual_world_s_is_shown_and_another_s_says_what_it_is_of(tmp_path: Path) -> None:
    def told(**differs: Any) -> str:
        if differs:
            write(f"a{len(list(tmp_path.iterdir()))}", **differs)
        manifest = tiny_manifest(small_spec(), None)  # type: ignore[arg-type]
        return Run("run", None, {}, manifest, _served(tmp_path, "x"))._through_the_server()  # type: ignore[arg-type]

    def write(name: str, successes: int, task: str = "reach", **world: Any) -> None:
        report = {"task": task, "policy_task": "reach", "world": asdict(World(**world)), "policy_sha256": "x"}
        counts = {"successes": successes, "episodes": 10, "success_rate": successes / 10}
        (tmp_path / f"{name}.json").write_text(json.dumps(report | counts))

    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    assert told() == ""
    assert told(successes=5, task="push").endswith("at update 10, task push")
    hard = {"randomize": Randomization(friction=0.3), "view": "side"}
    assert told(successes=4, **hard) == "40% (17% to 69%) at update 10, view side, friction 0.3; of 2 reports"
    assert told(successes=9) == "90% (60% to 98%) at update 10; of 3 reports"


def test_the_best_is_what_was_exported(runs: list[Path]) -> None:
    """After --resume with fewer --eval-episodes: of 5 all may succeed."""
    run = Run.read(runs[1])
    steps, rates, ends = np.array([20, 40]), np.array([0.97, 1.0]), ([0.92, 0.57], [0.99, 1.0])
    for tag, values in zip(("success/rate", "success/wilson_low", "success/wilson_high"), (rates, *ends), strict=True):
        run.curves[tag] = steps, np.array(values)
    assert cell(run, "success in training") == "best 97% (92% to 99%) at update 20, last 100%"


def test_an_evaluation_that_is_being_written_is_left_out(runs: list[Path], tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shutil.copytree(runs[1], tmp_path / "run")
    with SummaryWriter(str(tmp_path / "run/tensorboard")) as log:
        log.add_scalar("success/rate", 0.5, 20)
    assert cell(Run.read(tmp_path / "run"), "success in training") == ""
    with SummaryWriter(str(tmp_path / "run/tensorboard")) as log:
        log.add_scalar("success/wilson_low", 0.4, 20)
        log.add_scalar("success/wilson_high", 0.6, 20)
        log.add_scalar("success/rate", 0.9, 40)
    run = Run.read(tmp_path / "run")
    assert cell(run, "success in training") == "best 50% (40% to 60%) at update 20, last 50%"
    write_report(Report((tmp_path / "run",), tmp_path / "page.html"))


def test_the_legend_names_every_run_whatever_it_logged() -> None:
    """CQL alone has values/alpha, and the first panel is that one's."""
    curve = np.array([20, 40]), np.array([0.1, 0.2])
    made = [
        Run(name, None, dict.fromkeys(tags, curve), None, [])  # type: ignore[arg-type]
        for name, tags in (("iql", ["values/v"]), ("cql", ["values/alpha", "values/v"]), ("bc", ["losses/actor"]))
    ]
    figure = _figure(made, ["values/alpha", "values/v"])
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["iql", "cql"]


def test_the_legend_takes_any_name_and_a_colour_of_its_own_for_each_run() -> None:
    curve = np.array([20, 40]), np.array([0.1, 0.2])
    names = ["_a", "$x$", *map(str, range(10))]
    (legend,) = _figure([Run(n, None, {"values/v": curve}, None, []) for n in names], ["values/v"]).legends  # type: ignore[arg-type]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert not any(text.get_parse_math() for text in legend.get_texts())
    assert len({tuple(line.get_color()) for line in legend.get_lines()}) == len(names)


@pytest.mark.usefixtures("without_export")
def test_a_resumed_run_keeps_its_last_point(reach_path: Path, tmp_path: Path) -> None:
    args = arguments(reach_path, tmp_path / "run", "--updates", "25")
    train(parse(args))
    train(parse([*args, "--resume"]))
    assert cell(Run.read(tmp_path / "run"), "updates") == "25"


def test_what_is_no_run_and_another_s_file_are_no_traceback(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[1] / "notes.json").write_text("no JSON")
    (runs[1] / "folder.json").mkdir()
    for run, output, status in (
        (runs[1], tmp_path / "page.html", 0),
        (runs[1] / "policy.onnx", tmp_path / "other.html", 1),
        (runs[1], runs[1] / "policy.onnx" / "page.html", 1),
    ):
        monkeypatch.setattr("sys.argv", ["report", str(run), "--output", str(output)])
        assert main() == status
    assert capsys.readouterr().err.count("no report") == 2


def test_a_policy_that_is_none_is_named(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs[1], tmp_path / "run")
    (tmp_path / "run/policy.onnx").write_bytes(b"no graph")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert main() == 1
    assert f"{tmp_path / 'run/policy.onnx'}: expected a policy of training.run" in capsys.readouterr().err


def test_a_page_of_no_runs_does_not_replace_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").write_text("of yesterday's runs")
    monkeypatch.setattr("sys.argv", ["report", "--output", str(tmp_path / "report.html")])
    assert main() == 1
    assert "expected one or more runs" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "of yesterday's runs"


def test_runs_of_the_same_name_go_by_their_paths(runs: list[Path], tmp_path: Path) -> None:
    same = tuple(tmp_path / home / "run" for home in ("a", "b"))
    for path in same:
        shutil.copytree(runs[1], path)
    write_report(Report(same, tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert all(f"<th>{path}</th>" in page for path in same)


def test_a_directory_without_a_run_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert main() == 1
    assert "expected a run of training.run" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_minutes_count_fast_updates_and_slow_ones(runs: list[Path]) -> None:
    """Where values come first, an update of the first part takes longer."""
    run = Run.read(runs[0])
    steps = np.array([20, 40, 60, 80])
    run.curves.clear()
    run.curves["time/update_ms"] = steps, np.array([60_000.0, 20_000.0, 20_000.0, 20_000.0])
    assert cell(run, "minutes") == f"{80 * 30_000 / 60e3:.1f}"
