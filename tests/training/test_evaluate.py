"""Evaluation while training: real episodes in processes of their own; the best weights become the policy."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from protos.errors import Rejected
from protos.manifest import Manifest
from sim_client.collect import Collect, collect
from sim_client.seeds import WATCHED
from tests.makers import random_golden, small_spec, tiny_manifest
from tests.training.test_run import begun, same, weights
from training.agents.agent import Agent
from training.config import parse
from training.evaluate import Evaluate, evaluate, main
from training.evaluations import EvaluationError, Evaluations, Result, best
from training.export import Graph, Provenance
from training.loop import Run
from training.progress import BEHIND
from training.run import _record, train

TINY = ("--network.fields", "2", "2", "2", "2", "2", "--network.hidden", "2", "--network.pool", "2")


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "drawer"
    collect(Collect(output=path, episodes=3))
    return path


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return ["--dataset", str(data), "--output", str(output), "--batch-size", "8", *TINY, *more]


def test_success_is_measured_logged_and_kept_with_the_best_weights(
    drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(parse(arguments(drawer, run, "--updates", "40", "--eval-every", "20", "--eval-episodes", "2")))
    assert capsys.readouterr().out.count("of 2 episodes succeeded") == 2
    results = [json.loads(p.read_text()) for p in sorted((run / "evaluations").iterdir())]
    assert [(r["update"], r["episodes"]) for r in results] == [(20, 2), (40, 2)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(run / "tensorboard"))
    curves.Reload()
    assert [e.step for e in curves.Scalars("success/rate")] == [20, 40]
    import onnx

    manifest = Manifest.from_metadata({p.key: p.value for p in onnx.load(run / "policy.onnx").metadata_props})
    chosen = best(Result(**r) for r in results)
    assert manifest.updates == manifest.evaluation["update"] == chosen.update
    assert manifest.evaluation["episodes"] == 2
    assert torch.load(run / "best.pt", weights_only=True)["updates"] == chosen.update


@pytest.mark.usefixtures("without_export")
def test_while_values_come_first_there_is_nothing_to_evaluate(drawer: Path, tmp_path: Path) -> None:
    flags = "--algo iql --iql.values-first 0.6 --updates 9 --eval-every 3 --eval-episodes 1"
    train(parse(arguments(drawer, tmp_path / "run", *flags.split())))
    results = [json.loads(p.read_text()) for p in sorted((tmp_path / "run" / "evaluations").iterdir())]
    assert [r["update"] for r in results] == [9]


@pytest.mark.usefixtures("without_export")
def test_a_run_at_its_end_is_evaluated_still(drawer: Path, tmp_path: Path) -> None:
    """Where it ended without, or was stopped before its last snapshot was on the disk."""
    train(parse(arguments(drawer, tmp_path / "run", "--updates", "3")))
    watched = ["--eval-every", "2", "--eval-episodes", "1"]
    train(parse(["--resume", "--output", str(tmp_path / "run"), *watched]))
    results = [json.loads(p.read_text()) for p in sorted((tmp_path / "run" / "evaluations").iterdir())]
    assert [r["update"] for r in results] == [3]


def test_evaluations_that_fall_behind_are_told_of_once(
    drawer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluations, "_start_the_next", lambda self: None)
    monkeypatch.setattr("training.run._export", lambda run, evaluations: run.config.output)
    train(parse(arguments(drawer, tmp_path / "run", "--updates", "9", "--eval-every", "1", "--eval-episodes", "1")))
    said = capsys.readouterr().out
    assert said.count("evaluations are not done yet: with --eval-every 1 they") == 1
    assert said.count(f"{BEHIND + 1} evaluations") == 1


def waiting(data: Path, output: Path) -> tuple[Run, Evaluations, Path]:
    """A run after its first update, and the snapshot that waits for its evaluation."""
    config = parse(arguments(data, output, "--updates", "9", "--eval-every", "3"))
    _record(config)
    run = Run(config)
    run.step()
    evaluations = Evaluations(run)
    evaluations.take()
    evaluations.stop()
    (snapshot,) = (output / "evaluations").glob("*.pt")
    return run, evaluations, snapshot


def test_a_snapshot_is_evaluated_by_hand_to_the_same_result(
    drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, evaluations, snapshot = waiting(drawer, tmp_path / "run")
    monkeypatch.chdir(snapshot.parent)
    first, second = (evaluate(Evaluate(path, episodes=1)) for path in (snapshot, Path(snapshot.name)))
    assert first == second == Result(1, first.successes, 1)
    evaluations.take()  # came in meanwhile, and is still to be told
    assert evaluations.poll() == [first]
    assert (tmp_path / "run" / "best.pt").exists()
    evaluations.settle()
    assert not snapshot.exists()


def test_a_snapshot_that_waits_is_not_overwritten_by_other_weights(drawer: Path, tmp_path: Path) -> None:
    """As where a run was killed, and comes to the same update anew: the evaluation may have read the first already."""
    run, evaluations, snapshot = waiting(drawer, tmp_path / "run")
    before = snapshot.read_bytes()
    with torch.no_grad():
        next(run.learner.agent.parameters()).add_(1.0)
    evaluations.take()
    evaluations.stop()
    assert snapshot.read_bytes() == before


def test_a_resumed_run_tells_no_result_again(drawer: Path, tmp_path: Path) -> None:
    run, evaluations, snapshot = waiting(drawer, tmp_path / "run")
    result = {"update": 1, "successes": 1, "episodes": 2}
    snapshot.with_suffix(".json").write_text(json.dumps(result))
    assert evaluations.poll() == [Result(1, 1, 2)]
    killed = Evaluations(run)  # before the curve was on the disk
    killed.resume()
    assert killed.poll() == [Result(1, 1, 2)]
    evaluations.settle()
    rewound = Evaluations(Run(run.config))
    rewound.resume()  # to before that update: the curves were cut there
    assert rewound.poll() == [Result(1, 1, 2)]
    evaluations = Evaluations(run)
    evaluations.resume()
    assert evaluations.poll() == []


def test_an_evaluation_plays_the_agent_s_own_actions_in_scenes_of_its_own(
    drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, snapshot = waiting(drawer, tmp_path / "run")
    played = []

    def only_begun(env: Any, act: Any, seed: int) -> Any:
        obs, info = env.reset(seed=seed)
        played.append((seed, obs, act(obs, info)))
        return SimpleNamespace(success=seed > WATCHED)

    monkeypatch.setattr("training.evaluate.rollout", only_begun)
    assert evaluate(Evaluate(snapshot, episodes=3)) == Result(1, 2, 3)
    assert [seed for seed, *_ in played] == [WATCHED, WATCHED + 1, WATCHED + 2]
    graph = Graph(run.learner.agent, run.dataset.spec).eval()
    for _, obs, action in played:
        with torch.no_grad():
            ours = graph(torch.from_numpy(obs["depth"])[None, None], torch.from_numpy(obs["gripper"])[None])[0][0]
        np.testing.assert_allclose(action, run.dataset.spec.action.project(ours.numpy()), atol=1e-6)


def instead_of_an_evaluation(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training starts this Python in the place of each evaluation, with the arguments of that."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> "subprocess.Popen[str]":
        if "training.evaluate" in command:
            command = [sys.executable, "-c", script, *command[3:]]
        return popen(command, **options)  # git's, too

    monkeypatch.setattr("training.evaluations.subprocess.Popen", start)


ONLY_THE_FIRST_SUCCEEDS = """
import json, pathlib, sys
snapshot = pathlib.Path(sys.argv[1])
update = int(snapshot.stem.removeprefix("update-"))
unfinished = snapshot.with_suffix(".part")
unfinished.write_text(json.dumps({"update": update, "successes": 2 if update == 1 else 0, "episodes": 2}))
unfinished.rename(snapshot.with_suffix(".json"))
"""


@pytest.mark.parametrize(("keep", "update"), [("best", 1), ("last", 2)])
def test_the_weights_to_keep_are_those_that_are_exported(
    keep: str, update: int, drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: dict[str, torch.Tensor] = {}
    claimed = []
    versions = iter(("as it began", "as it ended"))
    monkeypatch.setattr("training.run.code_version", lambda: next(versions))

    def noted(agent: Agent, _data: Any, provenance: Provenance, *_: Any, **_more: Any) -> Manifest:
        exported.update({name: value.clone() for name, value in agent.state_dict().items()})
        claimed.append((provenance.updates, provenance.code_version))
        return tiny_manifest(small_spec(), random_golden(small_spec()))

    monkeypatch.setattr("training.run.export", noted)
    instead_of_an_evaluation(ONLY_THE_FIRST_SUCCEEDS, monkeypatch)
    run = tmp_path / "run"
    train(parse(arguments(drawer, run, "--updates", "2", "--eval-every", "1", "--keep", keep)))
    best_weights = torch.load(run / "best.pt", weights_only=True)["agent"]
    assert not same(best_weights, weights(run)), "or nothing would show"
    assert same(exported, best_weights if keep == "best" else weights(run))
    assert claimed == [(update, "as it began")]


def test_what_was_learned_outlives_an_evaluation_that_fails(
    drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talkative = "import sys; sys.stderr.write('warning ' * 30_000)"  # more than a pipe holds
    instead_of_an_evaluation(f"{talkative}; raise SystemExit('no display')", monkeypatch)
    with pytest.raises(EvaluationError, match="no display"):
        train(parse(arguments(drawer, tmp_path / "run", "--updates", "3", "--eval-every", "3")))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["updates"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_does_not_wait_for_evaluations(
    number: int, drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_an_evaluation(f"import os, time; os.kill({os.getpid()}, {int(number)}); time.sleep(600)", monkeypatch)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(parse(arguments(drawer, tmp_path / "run", "--updates", "3", "--eval-every", "3")))
    assert time.monotonic() - start < 60
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["updates"] == 3


def test_an_evaluation_that_ends_by_the_same_signal_is_no_failure(
    drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a job's processes are all told to end: the evaluation may be gone first."""
    code = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); os.kill(os.getpid(), signal.SIGKILL)"
    instead_of_an_evaluation(code, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(parse(arguments(drawer, tmp_path / "run", "--updates", "3", "--eval-every", "3")))


def test_an_evaluation_that_another_was_faster_than_is_no_failure(
    drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left by a run that was killed: the snapshot is gone once its result is there."""
    instead_of_an_evaluation("import sys, time; time.sleep(0.2); sys.exit(1)", monkeypatch)
    run = Run(parse(arguments(drawer, tmp_path / "run", "--updates", "900", "--eval-every", "10")))
    evaluations = Evaluations(run)
    run.step()
    evaluations.take()
    result = {"update": 1, "successes": 1, "episodes": 2}
    (tmp_path / "run" / "evaluations" / "update-0000001.json").write_text(json.dumps(result))
    assert evaluations.wait(threading.Event()) == [Result(1, 1, 2)]


def test_what_is_no_snapshot_is_an_error_that_says_so(drawer: Path, tmp_path: Path) -> None:
    begun(arguments(drawer, tmp_path / "run", "--updates", "3"))
    (tmp_path / "run" / "policy.onnx").write_bytes(b"a graph")
    for name in ("checkpoint.pt", "policy.onnx"):
        with pytest.raises(Rejected, match=rf"run/{name}: expected OUTPUT/evaluations/update-N\.pt"):
            evaluate(Evaluate(tmp_path / "run" / name))


def test_an_evaluation_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "evaluations"
    folder.mkdir()
    (folder / "update-0000001.pt").write_bytes(b"no checkpoint")
    monkeypatch.setattr("training.evaluate.os.nice", lambda _: 0)  # it would be the tests' own
    monkeypatch.setattr(sys, "argv", ["training.evaluate", str(folder / "update-0000001.pt")])
    assert main() == 1
    said = capsys.readouterr().err
    assert "update-0000001.pt" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("by_the_end", [1, 5])
def test_patience_counts_evaluations_that_brought_nothing_better(by_the_end: int, drawer: Path, tmp_path: Path) -> None:
    flags = ("--updates", "900", "--eval-every", "10", "--patience", "2")
    run = Run(parse(arguments(drawer, tmp_path / "run", *flags)))
    evaluations = Evaluations(run)
    folder = tmp_path / "run" / "evaluations"
    folder.mkdir(parents=True)
    for update, successes, exhausted in ((10, 3, False), (20, 5, False), (30, 4, False), (40, by_the_end, True)):
        result = {"update": update, "successes": successes, "episodes": 10}
        (folder / f"update-{update:07d}.json").write_text(json.dumps(result))
        assert evaluations.exhausted is exhausted


def test_results_are_in_the_order_of_their_updates_and_what_else_lies_there_is_none(
    drawer: Path, tmp_path: Path
) -> None:
    evaluations = Evaluations(Run(parse(arguments(drawer, tmp_path, "--updates", "1"))))
    (tmp_path / "evaluations").mkdir()
    for update in (9_999_999, 10_000_000, 50):
        result = json.dumps({"update": update, "successes": 1, "episodes": 2})
        (tmp_path / "evaluations" / f"update-{update:07d}.json").write_text(result)
    for other in ("notes.json", "update-copy.json", "update-.json"):
        (tmp_path / "evaluations" / other).write_text("mine")
    assert [result.update for result in evaluations.results()] == [50, 9_999_999, 10_000_000]


def test_of_equally_good_snapshots_the_longest_trained_is_best() -> None:
    assert best([Result(10, 4, 5), Result(20, 4, 5), Result(30, 3, 5)]) == Result(20, 4, 5)


def test_few_episodes_that_all_succeed_do_not_beat_many_of_which_nearly_all_do() -> None:
    """As after --resume with another --eval-episodes."""
    assert best([Result(10, 5, 5), Result(20, 97, 100)]) == Result(20, 97, 100)


@pytest.mark.usefixtures("without_export")
def test_a_run_that_ends_early_says_why_and_how_to_go_on(
    drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Evaluations, "exhausted", True)
    train(parse(arguments(drawer, tmp_path / "run", "--updates", "40", "--eval-every", "30", "--patience", "2")))
    assert "--patience 2: so many evaluations brought nothing better" in capsys.readouterr().out


def test_patience_without_evaluation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--dataset", "d", "--output", "o", "--patience", "3"])
    assert "give --eval-every" in capsys.readouterr().err
