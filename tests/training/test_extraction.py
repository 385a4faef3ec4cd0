"""Values first: who learns when, what is drawn how often, and at which rate."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.errors import Rejected
from protos.spaces import ACTION
from tests.training.test_run import arguments
from training.agents.agent import Diverged
from training.batch import Batch, State
from training.config import parse
from training.extraction import VIEWS, Extraction
from training.loop import WARM_UP_UPDATES, Run
from training.run import train


def run_of(data: Path, output: Path, *flags: str, algo: str = "iql", first: float = 0.5) -> Run:
    return Run(parse(arguments(data, output, "--algo", algo, f"--{algo}.values-first", str(first), *flags)))


@pytest.mark.parametrize(
    ("algo", "at_first"),
    [
        ("iql", {"critic", "value", "target_critic"}),
        ("cql", {"critic", "value", "target_critic", "actor", "log_alpha"}),
    ],
)
def test_values_come_first_and_rest_later(algo: str, at_first: set[str], reach_path: Path, tmp_path: Path) -> None:
    run = run_of(reach_path, tmp_path, "--updates", "8", algo=algo)
    for expected in (at_first, {"actor"}):
        before = {name: p.detach().clone() for name, p in run.learner.agent.named_parameters()}
        for _ in range(4):
            run.step()
        after = run.learner.agent.named_parameters()
        assert {name.split(".")[0] for name, p in after if not torch.equal(before[name], p)} == expected


def test_batches_are_drawn_by_weight_once_values_rest(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only who holds something is worth imitating here."""
    run, shares = run_of(reach_path, tmp_path, "--updates", "8"), []
    update = run.learner.update

    def watched(batch: Batch, rate: float) -> dict[str, float]:
        shares.append(batch.state.gripper.mean().item())
        return update(batch, rate)

    monkeypatch.setattr(run.learner, "update", watched)
    monkeypatch.setattr(run.learner.agent, "advantage", lambda state, action: 100 * (state.gripper[:, 0] - 1))
    for _ in range(8):
        run.step()
    assert min(shares[:4]) < 1
    assert shares[4:] == [1.0] * 4


def test_what_is_not_augmented_is_looked_at_once(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, looks = run_of(reach_path, tmp_path, "--updates", "2", "--augmentation", "none"), []

    def advantage(state: State, action: torch.Tensor) -> torch.Tensor:
        looks.append(len(action))
        return torch.zeros(len(action))

    monkeypatch.setattr(run.learner.agent, "advantage", advantage)
    for _ in range(2):
        run.step()
    assert sum(looks) == len(run.dataset)


def test_weights_are_clipped_and_of_the_mean_over_turns(
    reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--updates", "2", "--iql.largest-weight", "2", "--iql.temperature", "1", "--augmentation", "so2")
    run, seen = run_of(reach_path, tmp_path, *flags), []
    planar = ACTION.slice_of("planar")

    def advantage(state: State, action: torch.Tensor) -> torch.Tensor:
        seen.append(2 * state.gripper[:, 0] + action[:, planar].sum(dim=1))  # depends on the turn
        return seen[-1]

    monkeypatch.setattr(run.learner.agent, "advantage", advantage)
    for _ in range(2):
        run.step()
    mean = torch.cat(seen).view(VIEWS, len(run.dataset)).mean(dim=0)
    assert run.extraction is not None
    torch.testing.assert_close(run.extraction.weights, mean.exp().clamp(max=2))
    assert run.extraction.weights.max() == 2
    assert (torch.cat(seen).view(VIEWS, -1).std(dim=0) > 0.1).float().mean() > 0.5  # whoever moves at all


def test_the_rate_rises_and_falls_in_each_part(reach_path: Path, tmp_path: Path) -> None:
    run, rates = run_of(reach_path, tmp_path, "--updates", "200", first=0.25), []
    for update in range(200):
        run.updates = update
        if update == 50:
            run.extraction = Extraction(torch.ones(len(run.dataset)), update, run.progress)
        rates.append(run.rate)
    assert rates[0] < 0.1
    assert max(rates[:50]) > 0.5
    assert rates[49] < 0.01
    assert rates[51] < 0.2
    assert max(rates[50:]) == pytest.approx(1.0, abs=0.05)
    assert rates[50 + WARM_UP_UPDATES] == pytest.approx(0.5 * (1 + math.cos(math.pi * WARM_UP_UPDATES / 150)))
    assert rates[199] < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_cannot_be_drawn_by_stop_the_run(
    value: float, reach_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(reach_path, tmp_path, "--updates", "2")
    monkeypatch.setattr(run.learner.agent, "advantage", lambda state, action: torch.full((len(action),), value))
    run.step()
    with pytest.raises(Diverged, match=r"weights of recorded actions are not finite, or all 0 at update 1"):
        run.step()
    assert (tmp_path / "diverged.json").exists()


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        ("--minutes None --updates None --eval-every 5 --patience 2", ValueError, "is a share of a budget"),
        ("--updates 1", Rejected, "expected time for the actor after --iql.values-first, got 1 updates"),
    ],
)
def test_an_actor_that_would_never_learn_is_refused(
    flags: str, error: Any, said: str, reach_path: Path, tmp_path: Path
) -> None:
    options = ("--algo", "iql", "--iql.values-first", "0.5", *flags.split())
    with pytest.raises(error, match=said):
        train(parse(arguments(reach_path, tmp_path / "run", *options)))
    assert not (tmp_path / "run" / "policy.onnx").exists()


def test_a_checkpoint_from_before_there_were_parts_is_resumed(reach_path: Path, tmp_path: Path) -> None:
    config = parse(arguments(reach_path, tmp_path, "--algo", "iql", "--updates", "4"))
    run = Run(config)
    run.step()
    run.save()
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["extraction"]
    torch.save(state, path)
    again = Run(config)
    again.restore()
    assert (again.updates, again.extraction) == (1, None)
