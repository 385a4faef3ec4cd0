"""Several processes that train one agent, as torchrun starts them; one process where it did not."""

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from protos.errors import Rejected


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one logs, saves and exports for all."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """This process's part of a batch. Raises Rejected when the batch does not divide."""
        if batch_size % self.count:
            raise Rejected(
                "--batch-size", f"a multiple of the {self.count} processes", str(batch_size), "it is the whole batch"
            )
        return batch_size // self.count

    def from_leader(self, value: float, device: torch.device) -> float:
        """The leader's `value`, in every process; in one process, `value`."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(shared, src=0)
        return float(shared)

    def begin_alike(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take the leader's: seeds are the same, but another processor may round otherwise."""
        for parameter in parameters:
            distributed.broadcast(parameter.detach(), src=0)

    def anywhere(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in any of the processes."""
        if self.count == 1:
            return here
        shared = torch.tensor(float(here), device=device)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return bool(shared)

    def meet(self) -> None:
        """Wait until every process is here; call it after the last update, before any of them may end.

        gloo's threads outlive destroy_process_group, and let go of a collective's tensors only some time after it is
        done. A process that ends in that time aborts ("terminate called without an active exception"), and torchrun
        then stops the leader in the middle of its export. A barrier has no tensors.
        """
        if self.count > 1:
            distributed.barrier()


ALONE = Processes()


def join(device: str) -> tuple[Processes, torch.device]:
    """Meet the other processes that torchrun started, if any, and take a device.

    Args:
        device: auto, cpu or cuda.
    """
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    taken = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if count > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if taken.type == "cuda" else "gloo")
    return Processes(rank, count), taken


def to_resume(output: Path, *flags: str) -> str:
    """The command that goes on with the run in `output`, by as many processes as there are now."""
    count, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    started = "python"
    if count > 1:  # where the machines meet, who started them knows
        machines = "--standalone" if here == count else f"--nnodes {count // here} ..."
        started = f"torchrun {machines} --nproc-per-node {here}"
    return f"{started} -m training.run --resume {shlex.join(('--output', str(output), *flags))}"


def lost_another(error: RuntimeError) -> bool:
    """Whether it comes of how processes talk: mostly another has ended, which then says why itself."""
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def leave() -> None:
    """Take leave of the others; nothing where there are none."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Rejected(
            "--device", "a CUDA device that torch can use", "none", "add --device cpu, or install a CUDA torch"
        )
    if local_rank >= (there := torch.cuda.device_count()):
        wanted = f"{local_rank + 1} or more processes"
        raise Rejected(
            "--nproc-per-node", f"at most {there}, a GPU for each", wanted, "start fewer, or add --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
