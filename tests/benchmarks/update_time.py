"""How near an update is to its arithmetic. Prints docs/performance.md's table on training.

    python -m tests.benchmarks.update_time --presets paper cpu --algos bc iql cql --precisions fp32 bf16

The convolutions of one update are recorded and then made again alone, on random numbers, in turns with the update.
Their floating-point operations, counted from the shapes, over the rate that the machine reaches on the best of them is
the floor; the time that all of them take alone is what plain convolutions leave possible. Both are of plain ones also
where an update goes by harmonics (training.networks.harmonic), which can therefore be below.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

from protos.spaces import SPEC
from training.agents.agent import Learner
from training.batch import Batch, State
from training.config import parse
from training.loop import make_agent
from training.memory import keep_freed_memory
from training.networks.harmonic import Harmonics

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Benchmark:
    """Time whole updates against the convolutions that they cannot do without."""

    presets: tuple[str, ...] = ("paper", "cpu")
    """Which sizes."""
    algos: tuple[Literal["bc", "iql", "cql"], ...] = ("bc", "iql", "cql")
    """Which algorithms."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Which precisions."""
    keep_memory: bool = True
    """Ask the allocator to keep freed memory, as training.run does."""
    rounds: int = 8
    """Updates of each; the median is reported."""


@dataclass(frozen=True)
class Call:
    """One convolution of an update: shapes, padding, and which gradients a backward call makes (none: a forward)."""

    image: Shape
    filter: Shape
    padding: int
    gradients: tuple[bool, bool] | None

    @property
    def flop(self) -> float:
        """Two for each multiply-add; a backward call does one such pass for each gradient."""
        (batch, _, height, width), (outputs, inputs, k, _) = self.image, self.filter
        area = (height + 2 * self.padding - k + 1) * (width + 2 * self.padding - k + 1)
        return 2.0 * batch * outputs * inputs * k * k * area * (1 if self.gradients is None else sum(self.gradients))

    def alone(self, dtype: torch.dtype) -> Callable[[], Any]:
        """The same call on random numbers, with nothing around it."""
        nhwc = torch.channels_last
        image = torch.randn(self.image).to(dtype, memory_format=nhwc)
        weights = torch.randn(self.filter).to(dtype, memory_format=nhwc)
        padding, one, zero = [self.padding] * 2, [1, 1], [0, 0]
        if self.gradients is None:
            return lambda: torch.ops.aten.convolution(image, weights, None, one, padding, one, False, zero, 1)
        out = torch.ops.aten.convolution(image, weights, None, one, padding, one, False, zero, 1)
        mask = [*self.gradients, False]
        return lambda: torch.ops.aten.convolution_backward(
            out, image, weights, None, one, padding, one, False, zero, 1, mask
        )


class Recorder(TorchDispatchMode):
    """Counts the spatial convolutions that are made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[1].shape[-1] > 1:
            self.calls[Call(tuple(args[0].shape), tuple(args[1].shape), args[4][0], None)] += 1
        if func is torch.ops.aten.convolution_backward.default and args[2].shape[-1] > 1:
            gradients = (args[10][0], args[10][1])
            self.calls[Call(tuple(args[1].shape), tuple(args[2].shape), args[5][0], gradients)] += 1
        return func(*args, **(kwargs or {}))


def random_batch(size: int) -> Batch:
    def state() -> State:
        return State(0.1 + 0.3 * torch.rand(size, 1, *SPEC.observation.shape), torch.randint(0, 2, (size, 1)).float())

    action = torch.rand(size, SPEC.action.size) - 0.5
    return Batch(state(), action, torch.zeros(size), torch.full((size,), 0.99), state())


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(preset: str, algo: str, precision: str, rounds: int) -> str:
    """A row of the table."""
    config = parse(["--dataset", "none", "--output", "none", "--preset", preset, "--algo", algo])
    torch.manual_seed(0)
    learner = Learner(make_agent(config, SPEC), config.learning_rate, bf16=precision == "bf16")
    batch = random_batch(config.batch_size)
    with Recorder() as recorder, without_harmonics():
        learner.update(batch)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    alone = [(call, count, call.alone(dtype)) for call, count in recorder.calls.items()]
    update, plain, bare, fastest = [], [], [], dict.fromkeys(recorder.calls, float("inf"))
    for _ in range(rounds):
        update.append(seconds(lambda: learner.update(batch)))
        with without_harmonics():
            plain.append(seconds(lambda: learner.update(batch)))
        took = {call: seconds(work) for call, _, work in alone}
        bare.append(sum(count * took[call] for call, count, _ in alone))
        fastest = {call: min(fastest[call], took[call]) for call in took}
    flop = sum(count * call.flop for call, count, _ in alone)
    rate = max(call.flop / fastest[call] for call in fastest)
    floor = flop / rate
    took_s, plain_s, bare_s = (statistics.median(times) for times in (update, plain, bare))
    return (
        f"| {preset} | {algo} | {precision} | {flop / 1e9:.0f} | {rate / 1e9:.0f} | {floor:.3f} | {bare_s:.3f} | "
        f"{plain_s:.3f} | {took_s:.3f} | {took_s / floor:.2f} | {took_s / bare_s:.2f} |"
    )


def without_harmonics() -> Any:
    """Inside it every convolution is a plain one."""
    return mock.patch.object(Harmonics, "pays", return_value=False)


def main() -> None:
    config = tyro.cli(Benchmark, description=Benchmark.__doc__)
    if config.keep_memory:
        keep_freed_memory()
    print(
        "| preset | algorithm | precision | GFLOP per update | best rate, GFLOP/s | floor, s | bare convolutions, s | "
        "update by plain ones, s | update, s | update / floor | update / bare |"
    )
    print("|" + "---|" * 11)
    for preset in config.presets:
        for algo in config.algos:
            for precision in config.precisions:
                print(measure(preset, algo, precision, config.rounds), flush=True)


if __name__ == "__main__":
    main()
