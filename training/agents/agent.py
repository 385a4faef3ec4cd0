"""What all agents share: an optimiser, target networks that follow, checkpoints. Nothing mathematical."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.batch import Batch, State
from training.distributed import ALONE, Processes
from training.gpu import Recorded
from training.networks.roles import Actor, Critic


class Agent(nn.Module):
    """Learns from batches. An agent defines `losses`; `update` takes one optimiser step on their sum.

    Each loss must reach its own parameters alone (detach what it borrows), so that their sum has the gradients that
    separate optimisers would see.
    """

    actor: Actor
    values_first: float = 0.0
    """The share of a run after which values rest; 0, as for most agents: they never do."""
    values_rest: bool = False
    """Whether only the actor still learns, from recorded actions drawn in proportion to the `weight` they have: see
    `training.extraction`."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name ("losses/actor") to minimise, and other scalars ("values/q") to log."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses, under the name by which torch's data parallelism calls them."""
        return self.losses(batch)

    def follow(self) -> None:
        """Move target networks; most agents have none."""

    def faster(self) -> dict[nn.Parameter, float]:
        """Parameters that learn at so many times the learning rate; most agents have none."""
        return {}

    def advantage(self, state: State, action: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """How much better than others a recorded action is. Agents with `values_first` know it."""
        raise NotImplementedError

    def weight(self, advantage: Float[Tensor, " B"], *, warm: Tensor | None = None) -> Float[Tensor, " B"]:
        """How much an action of such an advantage is worth imitating; 1 for all until `warm` is true."""
        raise NotImplementedError

    @property
    def q_function(self) -> Critic | None:
        """Q(s, a), if the algorithm learns one."""
        return None

    def state_value(self, state: State) -> Float[Tensor, " B"] | None:
        """What the exported policy reports as the value of an observation, if the algorithm knows one."""
        return None

    def export_value(self) -> nn.Module | None:
        """`state_value` as ordinary torch layers: (depth, gripper, greedy normalised action) -> [B]."""
        return None


class Learner:
    """An agent with its optimiser: one `update` per batch, and everything that a resumed run needs."""

    def __init__(
        self,
        agent: Agent,
        learning_rate: float,
        *,
        bf16: bool,
        value_bound: float = math.inf,
        processes: Processes = ALONE,
    ) -> None:
        """`value_bound`: values further from zero than this have exploded. `processes`: average their gradients."""
        self.agent, self._learning_rate, self._bf16, self._value_bound = agent, learning_rate, bf16, value_bound
        self._losses: nn.Module = agent
        self._processes = processes
        if processes.count > 1:
            # Not by torch's init_sync, which knows buffers by their order: e2cnn takes that from the hashes of texts,
            # and those are each process's own. And where values learn first, a part of a run leaves parameters out.
            processes.begin_alike(agent.parameters())
            self._losses = DistributedDataParallel(
                agent, init_sync=False, forward_sync_buffers=False, find_unused_parameters=agent.values_first > 0
            )
        faster = agent.faster()
        groups = [{"params": [p for p in agent.parameters() if p.requires_grad and p not in faster], "times": 1.0}]
        groups += [{"params": [parameter], "times": times} for parameter, times in faster.items()]
        self._optimiser = torch.optim.Adam(groups, lr=learning_rate, fused=True)
        self.records = processes.count == 1
        """Whether a GPU replays what it once recorded; not where processes wait for each other. To be changed before
        the first update alone: a replay writes into its recording's gradients, whatever the parameters have by then."""
        self._recorded: tuple[bool, Batch, Recorded[tuple[list[str], Tensor]]] | None = None

    def update(self, batch: Batch, rate: float = 1.0) -> dict[str, float]:
        """One step at `rate` times the learning rate; returns every loss and value by name.

        Raises Diverged when a loss is not finite or a value has exploded; no parameter has been touched then.
        """
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate * rate * group.get("times", 1.0)  # older checkpoints have none
        on_gpu = batch.action.device.type == "cuda"
        names, values = self._replay(batch) if on_gpu and self.records else self._differentiate(batch)
        # One transfer for all: on a GPU each would wait for the whole update.
        scalars = dict(zip(names, values.tolist(), strict=True))
        self._require_sane(scalars, batch.action.device)
        self._optimiser.step()
        if not self.agent.values_rest:
            self.agent.follow()
        return scalars

    def _differentiate(self, batch: Batch) -> tuple[list[str], Tensor]:
        """Every loss and value by name; the gradients of the losses' sum are the parameters' then."""
        self._optimiser.zero_grad(set_to_none=True)
        with torch.autocast(batch.action.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            named = self._losses(batch)
        torch.stack([value for name, value in named.items() if name.startswith("losses/")]).sum().backward()
        return list(named), torch.stack([value.detach().float() for value in named.values()])

    def _replay(self, batch: Batch) -> tuple[list[str], Tensor]:
        """The same, from a recording that is made once; and once more when values rest, as less is computed then."""
        rest = self.agent.values_rest
        if self._recorded is None or self._recorded[0] != rest:
            self._recorded = None  # first: the GPU may have no room for both
            own = copy.deepcopy(batch)
            self._recorded = rest, own, Recorded(lambda: self._differentiate(own))
        _, own, recorded = self._recorded
        own.copy_(batch)
        return recorded()

    @property
    def finite(self) -> bool:
        """Whether every weight is a number."""
        return bool(torch.stack([p.isfinite().all() for p in self.agent.parameters()]).all())

    def _require_sane(self, scalars: dict[str, float], device: torch.device) -> None:
        wrong = self._what_is_wrong(scalars)
        anywhere = self._processes.anywhere(wrong is not None, device)
        if wrong is not None:
            raise Diverged(wrong, scalars)
        if anywhere:  # all stop, or the others would wait for this one's next gradients
            raise Diverged("another process's share of the batch has diverged", scalars, elsewhere=True)

    def _what_is_wrong(self, scalars: dict[str, float]) -> str | None:
        bad = [name for name, value in scalars.items() if not math.isfinite(value)]
        if bad:
            return f"{', '.join(bad)} not finite"
        for name in ("values/q", "values/v"):
            if abs(scalars.get(name, 0.0)) > self._value_bound:
                beyond = (
                    f"{self._value_bound:.3g}: ten times the largest reward earned again and again, and at least 10"
                )
                return f"{name} exploded: {scalars[name]:.3g} is beyond {beyond}"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"agent": self.agent.state_dict(), "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self._optimiser.load_state_dict(state["optimiser"])


class Diverged(RuntimeError):
    """A loss is NaN or infinite, or a value is larger than rewards allow."""

    def __init__(self, what: str, scalars: dict[str, float], *, elsewhere: bool = False) -> None:
        super().__init__(what)
        self.scalars, self.elsewhere = scalars, elsewhere
        """elsewhere: in another process, which says what."""


def frozen_copy_of(network: nn.Module, like: nn.Module) -> nn.Module:
    """Give `network` the weights of `like` and freeze it. Targets are made by the same maker, never by deepcopy."""
    network.load_state_dict(like.state_dict())
    return network.requires_grad_(False)


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """What is computed inside passes gradients through `network` to its inputs, not into its parameters."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.lerp_(new, tau)
