"""What a run says while it goes on: what it begins with, its bar, its curves."""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.evaluations import Evaluations, Result
from training.loop import Run
from training.names import TENSORBOARD
from training.networks.stem import deepest_m

BEHIND = 2
"""More evaluations than this without a result: the processor does not keep up with --eval-every."""


def describe(run: Run) -> None:
    """Print what is about to be learned from what, and on stderr what may be other than was thought."""
    data, config = run.dataset, run.config
    counts = {
        name: sum(p.numel() for p in network.parameters() if p.requires_grad)
        for name, network in run.learner.agent.named_children()
    }
    print(
        f"{data.dataset_id}: {data.episodes} episodes, {len(data)} transitions"
        f"{' (successful ones only)' if config.successful_only else ''}; {config.algo}, equivariance "
        f"{config.equivariance}, {config.network.group}; free parameters "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        + f"; {run.device.type}, {_precision(run.bf16)}"
        + (f", {run.processes.count} processes" if run.processes.count > 1 else "")
    )
    if run.bf16 != run.learned_in_bf16 and run.progress < 1:
        print(
            f"it learned in {_precision(run.learned_in_bf16)} so far: what follows is not what it would have been",
            file=sys.stderr,
        )
    if config.schedule == "cosine" and not (config.minutes or config.updates):
        print("without a budget there is nothing for --schedule cosine to fall over: the rate stays", file=sys.stderr)
    if config.algo != "bc" and not data.reward.any():
        print(
            f"no transition has a reward: all values will be 0, and {config.algo} learns nothing from them. Record "
            "episodes that succeed among others, or imitate these by --algo bc --failures keep",
            file=sys.stderr,
        )
    floor_m = deepest_m(data.spec.observation)
    if blind := int((data.depth.flatten(1).amin(dim=1) >= floor_m).sum()):
        print(
            f"in {blind} of {len(data.depth)} frames all is {floor_m:g} m or more below the camera plane, beyond which "
            "networks see no difference: record from nearer, or check the scale of depth",
            file=sys.stderr,
        )


def _precision(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def progress_bar(*, disable: bool) -> "tqdm[Any]":
    """Of the budget, in percent."""
    shape = "training {l_bar}{bar}| {elapsed}<{remaining} {postfix}"
    return tqdm(total=100, unit="%", bar_format=shape, mininterval=0.5, disable=disable)


def show(bar: "tqdm[Any]", run: Run, scalars: Mapping[str, float]) -> None:
    """Beside the bar: the last update's losses."""
    losses = ", ".join(f"{n.removeprefix('losses/')} {v:.3f}" for n, v in scalars.items() if "losses/" in n)
    bar.set_postfix_str(f"update {run.updates}, {scalars['time/update_ms']:.0f} ms, {losses}", refresh=False)


def curves(run: Run) -> SummaryWriter:
    """The leader's curves; the other processes write theirs nowhere."""
    if run.processes.leads:
        return SummaryWriter(str(run.config.output / TENSORBOARD), purge_step=run.updates + 1)
    return contextlib.nullcontext()  # type: ignore[return-value]


def log_success(evaluations: Evaluations, results: list[Result], log: SummaryWriter) -> None:
    """Print and plot these results, and let go of their snapshots once that is on the disk."""
    for result in results:
        low, high = result.interval
        for name, value in (("rate", result.success_rate), ("wilson_low", low), ("wilson_high", high)):
            log.add_scalar(f"success/{name}", value, result.update)
        tqdm.write(f"update {result.update}: {result.successes} of {result.episodes} episodes succeeded")
    if results:  # they are told once: a kill must not take them out of the curve
        log.flush()
        evaluations.settle()


def warn_if_behind(evaluations: Evaluations, run: Run, *, warned: bool) -> bool:
    """Once: all are played in the end, and a run would last longer than its budget without having said so."""
    behind = evaluations.unfinished > BEHIND
    if behind and not warned:
        pace = f"with --eval-every {run.config.eval_every} they come faster than they are played"
        tqdm.write(f"{evaluations.unfinished} evaluations are not done yet: {pace}, and the run ends when all are done")
    return warned or behind
