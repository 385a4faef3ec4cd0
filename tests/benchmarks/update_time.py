"""How near an update is to its arithmetic. Prints docs/performance.md's table on training.

    python -m tests.benchmarks.update_time --presets paper cpu --algos bc iql cql --precisions fp32 bf16
    python -m tests.benchmarks.update_time --presets paper gpu --device cuda

The convolutions of one update are recorded and then made again alone, on random numbers, in turns with the update.
Their floating-point operations, counted from the shapes, over the rate that the machine reaches on the best of them is
the floor; the time that all of them take alone is what plain convolutions leave possible. Both are of plain ones also
where an update goes by harmonics (training.networks.harmonic), which can therefore be below; an update done plainly
has none.

On a GPU an update is one CUDA graph; done plainly, it is launched kernel by kernel. There the rate is that of a large
matrix product in the same precision, so the floor over the update is the share of the GPU that is used, and what
the convolutions take is read off the profiler, as each takes less than its launch.
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
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from protos.spaces import SPEC
from training import gpu
from training.agents.agent import Learner
from training.batch import Batch, State
from training.config import parse
from training.loop import make_agent
from training.memory import keep_freed_memory
from training.networks.harmonic import Harmonics

Shape = tuple[int, ...]
PRODUCT = 8192


@dataclass(frozen=True)
class Benchmark:
    """Time whole updates against the convolutions that they cannot do without."""

    presets: tuple[str, ...] = ("paper", "cpu")
    """Which sizes."""
    algos: tuple[Literal["bc", "iql", "cql"], ...] = ("bc", "iql", "cql")
    """Which algorithms."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Which precisions. On a GPU, fp32 is without TF32, as in training.run."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
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


def random_batch(size: int, device: str) -> Batch:
    def state() -> State:
        depth = 0.1 + 0.3 * torch.rand(size, 1, *SPEC.observation.shape)
        return State(depth.to(device), torch.randint(0, 2, (size, 1)).float().to(device))

    action = torch.rand(size, SPEC.action.size).to(device) - 0.5
    return Batch(state(), action, torch.zeros_like(action[:, 0]), torch.full_like(action[:, 0], 0.99), state())


def seconds(work: Callable[[], Any]) -> float:
    """Of `work`, until the GPU, if there is one, has done it."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpu_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda").to(dtype) for _ in range(2))
    return 2.0 * PRODUCT**3 / min(seconds(lambda: a @ b) for _ in range(10))


def gpu_convolutions(learner: Learner, batch: Batch) -> float:
    """Seconds that an update's convolutions, launched one by one, take with what they do to their images' formats."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        learner.update(batch)
        wait()
    convolutions = ("aten::cudnn_convolution", "aten::convolution_backward")
    return sum(row.device_time_total for row in profiler.key_averages() if row.key in convolutions) / 1e6


def measure(preset: str, algo: str, precision: str, rounds: int, device: str) -> str:
    """A row of the table."""
    config = parse(["--dataset", "none", "--output", "none", "--preset", preset, "--algo", algo])
    torch.manual_seed(0)
    if device == "cuda":
        gpu.prepare(precision)

    def learner_on(device: str) -> Learner:
        return Learner(make_agent(config, SPEC).to(device), config.learning_rate, bf16=precision == "bf16")

    with Recorder() as recorder, plain_convolutions():  # on a CPU: a GPU only replays what it once did
        learner_on("cpu").update(random_batch(config.batch_size, "cpu"))
    learner, plainly, batch = learner_on(device), learner_on(device), random_batch(config.batch_size, device)
    plainly.records = False
    learner.update(batch)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    flop = sum(count * call.flop for call, count in recorder.calls.items())
    alone = {call: call.alone(dtype) for call in recorder.calls} if device == "cpu" else {}
    update, plain, bare, fastest = [], [], [], dict.fromkeys(alone, float("inf"))
    for _ in range(rounds):
        update.append(seconds(lambda: learner.update(batch)))
        with plain_convolutions():
            plain.append(seconds(lambda: plainly.update(batch)))
        took = {call: seconds(work) for call, work in alone.items()}
        bare.append(sum(recorder.calls[call] * took[call] for call in took))
        fastest = {call: min(fastest[call], took[call]) for call in took}
    on_gpu = device == "cuda"
    rate = gpu_rate(dtype) if on_gpu else max(call.flop / fastest[call] for call in fastest)
    floor = flop / rate
    took_s, plain_s = statistics.median(update), statistics.median(plain)
    bare_s = gpu_convolutions(plainly, batch) if on_gpu else statistics.median(bare)
    return (
        f"| {preset} | {algo} | {precision} | {flop / 1e9:.0f} | {rate / 1e9:.0f} | {floor:.3g} | {bare_s:.3g} | "
        f"{plain_s:.3g} | {took_s:.3g} | {took_s / floor:.2f} | {took_s / bare_s:.2f} |"
    )


def plain_convolutions() -> Any:
    """Inside it no convolution goes by harmonics."""
    return mock.patch.object(Harmonics, "pays", return_value=False)


def main() -> None:
    config = tyro.cli(Benchmark, description=Benchmark.__doc__)
    if config.keep_memory:
        keep_freed_memory()
    print(
        "| preset | algorithm | precision | GFLOP per update | best rate, GFLOP/s | floor, s | bare convolutions, s | "
        "update done plainly, s | update, s | update / floor | update / bare |"
    )
    print("|" + "---|" * 11)
    for preset in config.presets:
        for algo in config.algos:
            for precision in config.precisions:
                print(measure(preset, algo, precision, config.rounds, config.device), flush=True)


if __name__ == "__main__":
    main()
