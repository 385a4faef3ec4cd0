"""The training loop: an agent, its data, its budget and its checkpoints."""

import contextlib
import io
import json
import math
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protos.errors import Rejected
from protos.files import write_atomically
from training import gpu
from training.agents.agent import Agent, Diverged, Learner
from training.agents.bc import BC
from training.agents.cql import CQL
from training.agents.iql import IQL
from training.batch import Batch
from training.config import RunConfig
from training.data.augment import randomly
from training.data.dataset import Dataset, load
from training.distributed import join, to_resume
from training.extraction import VIEWS, Extraction, weigh
from training.networks.family import EQUIVARIANCE

AGENTS: dict[str, Any] = {"bc": BC, "iql": IQL, "cql": CQL}
WARM_UP_UPDATES = 20
CHECKPOINT, DIAGNOSIS = "checkpoint.pt", "diverged.json"
TEMPERATURE = {"iql": "--iql.temperature", "cql": "--cql.cloning-temperature"}
"""Of the weights that `training.extraction` draws by."""
EXPLODED = 10.0
"""Values this many times beyond the largest return that the data's rewards allow are no estimates any more."""


def make_agent(config: RunConfig, spec: Any) -> Agent:
    """The untrained agent of a run."""
    c = config
    agent: Agent = AGENTS[c.algo](c.network, spec, EQUIVARIANCE[c.equivariance], getattr(c, c.algo))
    return agent


class Run:
    """A learner, its data and how far it has come: all that a checkpoint holds.

    Whatever is random in an update follows from (seed, update, process), so a resumed run needs no random state.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.processes, self.device = join(config.device)
        if self.device.type == "cuda":
            gpu.prepare(config.precision)
        self._batch_size = self.processes.share(config.batch_size)
        torch.manual_seed(config.seed)
        self._generator = torch.Generator()
        self.dataset = self._data()
        half_m = self.dataset.spec.observation.extent_m / 2
        if config.augmentation == "se2" and config.shift_m >= half_m:
            expected = f"less than {half_m:g} m, half of the view"
            raise Rejected("--shift-m", expected, f"{config.shift_m:g} m", "it is in metres")
        bf16 = _bf16(config.precision, self.device)
        # The data's rewards are sums over n steps already.
        largest_return = float(self.dataset.reward.abs().max()) / (1 - config.discount**config.n_step)
        self.learner = Learner(
            make_agent(config, self.dataset.spec).to(self.device),
            config.learning_rate,
            bf16=bf16,
            value_bound=EXPLODED * max(1.0, largest_return),
            processes=self.processes,
        )
        self.updates, self.seconds = 0, 0.0
        self.learned_by = self.processes.count
        self.bf16, self.learned_in_bf16 = bf16, bf16
        """In what precision it learns here, and in what it has learned so far."""
        self.code_version = ""
        """Of the code that began it, as `train` says; an export may be years later."""
        self.extraction: Extraction | None = None
        """Once values rest: see `training.agents.agent.Agent.values_first`."""

    def _data(self) -> Dataset:
        c = self.config
        try:
            return load(
                c.dataset, successful_only=c.successful_only, discount=c.discount, n_step=c.n_step, device=self.device
            )
        except Rejected as error:
            if not c.resume:
                raise
            remedy = f"{error.remedy}; if they lie elsewhere now, say --dataset PLACE"
            raise Rejected(error.field, error.expected, error.got, remedy) from error

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        by_time = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        by_count = self.updates / self.config.updates if self.config.updates else 0.0
        return min(1.0, max(by_time, by_count))

    def step(self) -> dict[str, float]:
        """Sample, augment, update. Raises Diverged, with a diagnosis written beside the checkpoint."""
        start = time.perf_counter()
        if not self.has_policy and self.progress >= self.learner.agent.values_first:
            self._rest_values(Extraction(self._weigh(), self.updates, self.progress))
        self._seed(self.processes.rank)
        weights = self.extraction.weights if self.extraction else None
        index = self.dataset.draw(self._batch_size, self._generator, weights)
        batch = self._augmented(self.dataset.batch(index))
        try:
            scalars = self.learner.update(batch, self.rate)
        except Diverged as error:
            if not error.elsewhere:
                self._explain(error, index, batch)
            raise
        took = time.perf_counter() - start
        self.updates, self.learned_in_bf16 = self.updates + 1, self.bf16
        self.seconds = self.processes.from_leader(self.seconds + took, self.device)
        return scalars | {"time/update_ms": 1e3 * took}

    @property
    def has_policy(self) -> bool:
        """False while values come first: the actor is not yet what it will be."""
        return self.extraction is not None or not self.learner.agent.values_first

    @property
    def rate(self) -> float:
        """The next update's share of the learning rate: up, and down again, in each part of the run."""
        part, first = self.extraction, self.learner.agent.values_first
        begun, ends = (part.progress, 1.0) if part else (0.0, first or 1.0)
        done = min(1.0, max(0.0, self.progress - begun) / (ends - begun)) if begun < ends else 1.0
        warm = min(1.0, (self.updates - (part.update if part else 0) + 1) / WARM_UP_UPDATES)
        return warm * (0.5 * (1 + math.cos(math.pi * done)) if self.config.schedule == "cosine" else 1.0)

    def _weigh(self) -> Tensor:
        self._seed(rank=0)  # all processes draw by the same weights
        try:
            views = 1 if self.config.augmentation == "none" else VIEWS
            return weigh(self.learner.agent, self.dataset, self._augmented, views)
        except Diverged as error:
            cause = "advantages lie too many temperatures below 0, or are no numbers"
            remedy = f"a larger {TEMPERATURE[self.config.algo]}, or, where they are no numbers, a lower --learning-rate"
            self._diagnose(error, {}, cause, remedy)
            raise

    def _rest_values(self, extraction: Extraction) -> None:
        self.extraction, self.learner.agent.values_rest = extraction, True

    def _seed(self, rank: int) -> None:
        entropy = (self.config.seed, self.updates, rank)
        ours, torchs = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        self._generator.manual_seed(int(ours))
        torch.manual_seed(int(torchs))

    def _augmented(self, batch: Batch) -> Batch:
        how = self.config.augmentation
        if how == "none":
            return batch
        shift_m = self.config.shift_m if how == "se2" else 0.0
        return randomly(batch, self.dataset.spec, self._generator, reflections=how == "o2", shift_m=shift_m)

    def _explain(self, error: Diverged, index: Tensor, batch: Batch) -> None:
        """Find what is wrong with the batch on which `error` was raised."""
        where = self.dataset.where(index)
        tensors = {"depth": batch.state.depth, "action": batch.action, "reward": batch.reward}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        seen = {
            "not finite in the batch": broken,
            "batch": [{"episode": episode, "step": step} for episode, step in where],
        }
        cause = f"the batch's {' and '.join(broken)} are not finite" if broken else "the data of the batch are finite"
        check = f"check the data (python -m training.data validate {self.config.dataset})"
        self._diagnose(error, seen, cause, f"a lower --learning-rate, or {check}")

    def _diagnose(self, error: Diverged, seen: dict[str, Any], cause: str, remedy: str) -> None:
        """Add to `error`, and write to a file, what a person needs to find the cause and to go on."""
        diagnosis = {
            "update": self.updates,
            "what": str(error),
            "scalars": {name: repr(value) for name, value in error.scalars.items()},
            **seen,
        }
        path = self.config.output / DIAGNOSIS
        try:
            write_atomically(path, (json.dumps(diagnosis, indent=2) + "\n").encode())
            named = f"{path} has {'the batch and all losses' if seen else 'what was measured'}"
        except OSError as full:  # the disk's, and no reason to keep quiet about the losses
            named = f"{path} could not be written: {full}"
        error.args = (
            f"{error} at update {self.updates}; {cause}. {named}. Start a new run with {remedy}{self._last_good()}",
        )

    def _last_good(self) -> str:
        """The way to a policy from the checkpoint; nothing where there is none."""
        try:
            state = self._checkpoint()
        except (Rejected, OSError):
            return ""
        kept = f". The last good checkpoint, of update {state['updates']}, is kept"
        if not state["updates"] or (self.learner.agent.values_first and not state.get("extraction")):
            return kept  # it has no policy yet
        return f"{kept}; to a policy from it: {self.to_policy('--updates', str(state['updates']))}"

    def to_policy(self, *flags: str) -> str:
        """The command that goes on with the run, without evaluations, to a policy from its last weights."""
        config = self.config
        flags += ("--eval-every", "None") if config.eval_every else ()
        flags += ("--patience", "None") if config.patience else ()
        return to_resume(config.output, *flags)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. Raises Diverged where weights are NaN; the one before stays."""
        if not self.learner.finite:
            raise Diverged(
                f"weights are not finite after update {self.updates}, though every loss was: a gradient overflowed. "
                f"They were not saved. Start a new run with a lower --learning-rate{self._last_good()}",
                {},
            )
        extraction = self.extraction and vars(self.extraction)
        state = {"learner": self.learner.state_dict(), "dataset_sha256": self.dataset.sha256, "extraction": extraction}
        about = {"processes": self.learned_by, "code_version": self.code_version, "bf16": self.learned_in_bf16}
        self.write(CHECKPOINT, state | about)
        self._forget_a_divergence()

    def _forget_a_divergence(self) -> None:
        """The diagnosis of an update that went well when the run was resumed, which would look like one of now."""
        path = self.config.output / DIAGNOSIS
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is somebody else's
            if json.loads(path.read_text())["update"] < self.updates:
                path.unlink()

    def write(self, name: str, state: dict[str, Any]) -> None:
        """`state` and how far the run has come, to a file of the run's directory."""
        buffer = io.BytesIO()
        torch.save(state | {"updates": self.updates, "seconds": self.seconds}, buffer)
        write_atomically(self.config.output / name, buffer.getvalue())

    def restore(self) -> None:
        """Continue where the last checkpoint was taken.

        Raises Rejected when it was taken on other data or by another number of processes.
        """
        path = self.config.output / CHECKPOINT
        if path.exists():  # else stopped before its first checkpoint: begin again
            self._read(path)
        if self.processes.anywhere(self.processes.from_leader(self.updates, self.device) != self.updates, self.device):
            expected = "the same checkpoint for all processes, on every machine"
            raise Rejected(str(path), expected, f"update {self.updates} here", "share --output between the machines")

    def _checkpoint(self) -> dict[str, Any]:
        holds = {"learner", "dataset_sha256", "updates", "seconds"}
        path = self.config.output / CHECKPOINT
        return saved(path, "a checkpoint of training.run", "start a new run", self.device, holds)

    def _read(self, path: Path) -> None:
        state = self._checkpoint()
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.code_version = state.get("code_version", self.code_version)  # older checkpoints have none, nor the next
        self.learned_in_bf16 = state.get("bf16", self.bf16)
        count = self.learned_by = state.get("processes", self.processes.count)
        if count != self.processes.count and self.progress < 1:  # else there is only the export left, which is one's
            remedy = f"resume with torchrun --nproc-per-node {count}" if count > 1 else "resume without torchrun"
            raise Rejected("processes", f"{count}, as the run was started", str(self.processes.count), remedy)
        if state["dataset_sha256"] != self.dataset.sha256:
            raise Rejected(
                "dataset", f"sha256 {state['dataset_sha256']}", self.dataset.sha256, "resume with the same data"
            )
        try:
            self.learner.load_state_dict(state["learner"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise Rejected(
                str(path), "a checkpoint of this version's networks", str(error).splitlines()[0], "start a new run"
            ) from error
        if extraction := state.get("extraction"):  # older checkpoints have none
            self._rest_values(Extraction(**extraction | {"weights": extraction["weights"].cpu()}))


def saved(
    path: Path, expected: str, remedy: str, device: torch.device, holds: Set[str] = frozenset()
) -> dict[str, Any]:
    """What `Run.write` wrote, if it has the parts named in `holds`.

    Raises Rejected where the file is none of those, OSError where it cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except OSError:
        raise
    except Exception as error:  # of other bytes, torch says RuntimeError, EOFError, UnpicklingError, IndexError ...
        raise Rejected(str(path), expected, repr(error)[:200], remedy) from error
    if not (isinstance(state, dict) and holds <= state.keys()):
        raise Rejected(str(path), expected, "a file of another kind", remedy)
    return state


def _bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
