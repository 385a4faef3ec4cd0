"""What is asked of a GPU, and how: its precision, and kernels that are recorded once and launched together."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
WARM_UPS = 3


def prepare(precision: str) -> None:
    """Set up this process's GPU for updates in `precision`: fp32 means it, without TF32."""
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = True  # an update's shapes stay, so it pays to look for their fastest kernels


class Recorded(Generic[T]):
    """`work` as a CUDA graph: a call does it again on whatever its tensors hold by then, and returns the same tensors.

    An update is a thousand kernels of microseconds each; launched one by one they keep a GPU waiting for Python. `work`
    must not wait for the GPU itself. What it draws at random is drawn anew at each call, by the device's generator.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work  # and with it the tensors that it reads: the graph knows their addresses, no more
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        with torch.random.fork_rng(devices=[here.device]):  # the first call draws as if nothing came before
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):  # libraries choose their kernels and take their workspaces
                    work()
            here.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._made = work()

    def __call__(self) -> T:
        self._graph.replay()
        return self._made
