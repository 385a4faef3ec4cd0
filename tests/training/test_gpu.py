"""On a GPU: an update replayed from its recording is the update, and a run trains, goes on and exports."""

import functools
from pathlib import Path

import pytest
import torch

from serving.policy import load
from tests.training.test_run import arguments
from training.agents.agent import Diverged
from training.config import parse
from training.gpu import Recorded
from training.loop import Run
from training.run import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_on_gpu(data: Path, output: Path, *flags: str) -> Run:
    return Run(parse(arguments(data, output, "--device", "cuda", "--updates", "8", *flags)))


def weights_of(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.learner.agent.parameters()])


def gradients_of(run: Run) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in run.learner.agent.parameters() if p.grad is not None])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).norm().item()


def test_a_recording_sees_new_numbers_and_draws_anew() -> None:
    shift = torch.zeros(4, device="cuda")

    def draw() -> torch.Tensor:
        return torch.rand(4, device="cuda") + shift

    torch.manual_seed(1)
    before = torch.cuda.get_rng_state()
    recorded = Recorded(draw)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    first, second = recorded().clone(), recorded().clone()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    torch.manual_seed(1)
    assert torch.equal(recorded(), first)
    shift.fill_(1.0)
    torch.manual_seed(1)
    assert torch.allclose(recorded(), first + 1)


def test_a_recording_keeps_what_it_reads() -> None:
    recorded = Recorded(functools.partial(torch.add, torch.ones(2**22, device="cuda"), 1.0))
    torch.cuda.empty_cache()
    others = [torch.zeros(2**22, device="cuda") for _ in range(8)]
    assert recorded().eq(2.0).all()
    assert not torch.stack(others).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "flags",
    [
        "--algo bc",
        "--algo iql",
        "--algo cql",
        "--algo cql --cql.gap 1.0",
        "--algo iql --iql.values-first 0.5",
        "--algo cql --cql.values-first 0.5",
        "--algo bc --equivariance none",
    ],
)
def test_replayed_updates_are_those_launched_one_by_one(
    flags: str, precision: str, reach_path: Path, tmp_path: Path
) -> None:
    gradients, ended, losses = [], [], []
    for records in (True, False):
        run = run_on_gpu(reach_path, tmp_path / str(records), *flags.split(), "--precision", precision)
        run.learner.records = records
        start = weights_of(run)
        seen = [run.step()]
        gradients.append(gradients_of(run))
        losses.append(seen + [run.step() for _ in range(7)])
        ended.append(weights_of(run))
    assert distance(*gradients) < 1e-3 * gradients[0].norm().item()  # a GPU adds in any order
    assert distance(*ended) < 0.1 * distance(ended[0], start)  # and Adam makes steps of the least gradients
    for one, other in zip(*losses, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name] == pytest.approx(other[name], rel=0.01, abs=1e-3) for name in one if "time" not in name)


def test_a_loss_that_is_not_finite_does_no_harm(reach_path: Path, tmp_path: Path) -> None:
    run = run_on_gpu(reach_path, tmp_path, "--algo", "iql")
    run.step()
    before, reward = weights_of(run), run.dataset.reward.clone()
    run.dataset.reward[:] = float("nan")
    with pytest.raises(Diverged, match="losses/critic"):
        run.step()
    assert torch.equal(weights_of(run), before)
    run.dataset.reward[:] = reward
    run.step()
    assert torch.isfinite(weights_of(run)).all()
    assert not torch.equal(weights_of(run), before)


@pytest.mark.parametrize("algo", ["iql", "cql"])
def test_a_run_on_a_gpu_goes_on_and_exports(algo: str, reach_path: Path, tmp_path: Path) -> None:
    train(parse(arguments(reach_path, tmp_path, "--device", "cuda", "--algo", algo, "--updates", "4")))
    path = train(parse(["--resume", "--output", str(tmp_path), "--updates", "210"]))  # a probe looks after 200
    assert load(path).manifest.updates == 210
