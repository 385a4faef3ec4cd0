"""The command that turns a dataset into a policy: `python -m training.run --help`."""

import contextlib
import dataclasses
import io
import json
import logging
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from protos.errors import Rejected
from protos.files import write_atomically
from training.agents.agent import Agent, Diverged, Learner
from training.agents.bc import BC
from training.agents.iql import IQL
from training.config import SETTINGS, RunConfig, parse
from training.data.augment import randomly
from training.data.dataset import load
from training.export import ExportError, Provenance, export
from training.networks.family import EQUIVARIANCE

AGENTS: dict[str, Any] = {"bc": BC, "iql": IQL}
WARM_UP_UPDATES = 20
LOG_EVERY = 20
CHECKPOINT, POLICY = "checkpoint.pt", "policy.onnx"


class Run:
    """A learner, its data, its random numbers and how far it has come: all that a checkpoint holds."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = _device(config.device)
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.dataset = load(config.dataset, successful_only=config.successful_only, device=self.device)
        self.learner = Learner(
            self._agent().to(self.device),
            config.learning_rate,
            bf16=_bf16(config.precision, self.device),
        )
        self.updates, self.seconds = 0, 0.0

    def _agent(self) -> Agent:
        c = self.config
        agent: Agent = AGENTS[c.algo](c.network, self.dataset.spec, EQUIVARIANCE[c.equivariance], getattr(c, c.algo))
        return agent

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        by_time = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        by_count = self.updates / self.config.updates if self.config.updates else 0.0
        return min(1.0, max(by_time, by_count))

    def step(self) -> dict[str, float]:
        """Sample, augment, update."""
        start = time.perf_counter()
        batch = self.dataset.sample(self.config.batch_size, self.generator)
        if self.config.augmentation != "none":
            reflections = self.config.augmentation == "o2"
            batch = randomly(batch, self.dataset.spec, self.generator, reflections=reflections)
        rate = 0.5 * (1 + math.cos(math.pi * self.progress)) if self.config.schedule == "cosine" else 1.0
        scalars = self.learner.update(batch, rate * min(1.0, (self.updates + 1) / WARM_UP_UPDATES))
        took = time.perf_counter() - start
        self.updates += 1
        self.seconds += took
        return scalars | {"time/update_ms": 1e3 * took}

    def save(self) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "updates": self.updates,
            "seconds": self.seconds,
            "dataset_sha256": self.dataset.sha256,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.config.output / CHECKPOINT, buffer.getvalue())

    def restore(self) -> None:
        """Continue where the last checkpoint was taken. Raises Rejected when the data are not those it was taken on."""
        path = self.config.output / CHECKPOINT
        if not path.exists():
            return  # stopped before its first checkpoint: begin again
        state = torch.load(path, weights_only=True, map_location=self.device)
        if state["dataset_sha256"] != self.dataset.sha256:
            raise Rejected(
                "dataset", f"sha256 {state['dataset_sha256']}", self.dataset.sha256, "resume with the same data"
            )
        self.learner.load_state_dict(state["learner"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        self.updates, self.seconds = state["updates"], state["seconds"]


def train(config: RunConfig) -> Path:
    """Train until the budget is used, then export; returns the path of policy.onnx.

    Raises:
        Rejected: on a dataset, a network or an output directory that does not fit; nothing has been written then.
        KeyboardInterrupt: on Ctrl-C, with a checkpoint saved.
    """
    if not config.resume and config.output.exists() and any(config.output.iterdir()):
        raise Rejected("--output", "a new or empty directory", str(config.output), "choose another, or add --resume")
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config)
    if config.resume:
        run.restore()
    _record(config)  # only now is the directory taken: a mistyped flag must not take it
    _describe(run)
    with _interrupt_noted() as stop:
        _loop(run, stop)
    run.save()
    if stop.is_set():
        raise KeyboardInterrupt
    provenance = Provenance(config.algo, config.equivariance, config.network.group, config.seed, run.updates)
    path = config.output / POLICY
    manifest = export(run.learner.agent, run.dataset, provenance, path)
    print(
        f"{path}: {run.updates} updates in {run.seconds / 60:.1f} min; equivariance error "
        f"{manifest.equivariance_error_90:.1e} at 90 degrees, {manifest.equivariance_error_45:.1e} at 45"
    )
    return path


@contextlib.contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """Note Ctrl-C for the loop: between updates the state is whole, within one it is half old and half new.

    A second Ctrl-C stops at once.
    """
    stop = threading.Event()

    def note(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _loop(run: Run, stop: threading.Event) -> None:
    saved = run.seconds
    with SummaryWriter(str(run.config.output / "tensorboard"), purge_step=run.updates) as log, _bar() as bar:
        while run.progress < 1 and not stop.is_set():
            scalars = run.step()
            bar.n = round(100 * run.progress, 1)
            if run.updates % LOG_EVERY == 0 or run.progress >= 1:
                for name, value in scalars.items():
                    log.add_scalar(name, value, run.updates)
                losses = ", ".join(f"{n.removeprefix('losses/')} {v:.3f}" for n, v in scalars.items() if "losses/" in n)
                bar.set_postfix_str(
                    f"update {run.updates}, {scalars['time/update_ms']:.0f} ms, {losses}", refresh=False
                )
            bar.refresh()
            if run.seconds - saved >= run.config.checkpoint_s:
                run.save()
                saved = run.seconds


def _bar() -> "tqdm[Any]":
    return tqdm(
        total=100, unit="%", bar_format="training {l_bar}{bar}| {elapsed}<{remaining} {postfix}", mininterval=0.5
    )


def _describe(run: Run) -> None:
    data, config = run.dataset, run.config
    counts = {
        name: sum(p.numel() for p in network.parameters()) for name, network in run.learner.agent.named_children()
    }
    print(
        f"{data.dataset_id}: {data.episodes} episodes, {len(data)} transitions"
        f"{' (successful ones only)' if config.successful_only else ''}; {config.algo}, equivariance "
        f"{config.equivariance}, {config.network.group}; free parameters "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items())
        + f"; {run.device.type}"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise Rejected(
            "device", "a CUDA device that torch can use", "none", "leave out --device, or install a CUDA torch"
        )
    return torch.device(name)


def _bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _record(config: RunConfig) -> None:
    text = json.dumps(dataclasses.asdict(config), indent=2, default=str)
    write_atomically(config.output / SETTINGS, text.encode())


def main() -> int:
    try:
        config = parse(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    try:
        train(config)
    except (Rejected, Diverged, ExportError) as error:
        print(f"training stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = f"python -m training.run --resume --output {shlex.quote(str(config.output))}"
        saved = (config.output / CHECKPOINT).exists()
        print(f"\ninterrupted{f'; continue with: {how}' if saved else ' before the first update'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
