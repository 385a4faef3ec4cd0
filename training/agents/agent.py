"""What all agents share: an optimiser, target networks that follow, checkpoints. Nothing mathematical."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.batch import Batch
from training.networks.roles import Actor, Value


class Agent(nn.Module):
    """Learns from batches. An agent defines `losses`; `update` takes one optimiser step on their sum.

    Each loss must reach its own parameters alone (detach what it borrows), so that their sum has the gradients that
    separate optimisers would see.
    """

    actor: Actor

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name ("losses/actor") to minimise, and other scalars ("values/q") to log."""
        raise NotImplementedError

    def follow(self) -> None:
        """Move target networks; most agents have none."""

    @property
    def value_function(self) -> Value | None:
        """What the exported policy reports as the value of an observation, if the algorithm learns one."""
        return None


class Learner:
    """An agent with its optimiser: one `update` per batch, and everything that a resumed run needs."""

    def __init__(self, agent: Agent, learning_rate: float, *, bf16: bool) -> None:
        self.agent, self._learning_rate, self._bf16 = agent, learning_rate, bf16
        trained = [p for p in agent.parameters() if p.requires_grad]
        self._optimiser = torch.optim.Adam(trained, lr=learning_rate)

    def update(self, batch: Batch, rate: float = 1.0) -> dict[str, float]:
        """One step at `rate` times the learning rate; returns every loss and value by name.

        Raises Diverged when a loss is not finite; no parameter has been touched then.
        """
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate * rate
        device = batch.action.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self._bf16):
            named = self.agent.losses(batch)
        scalars = {name: float(value.detach()) for name, value in named.items()}
        bad = [name for name, value in scalars.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(bad, scalars)
        self._optimiser.zero_grad(set_to_none=True)
        total = torch.stack([value for name, value in named.items() if name.startswith("losses/")]).sum()
        total.backward()
        self._optimiser.step()
        self.agent.follow()
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return {"agent": self.agent.state_dict(), "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self._optimiser.load_state_dict(state["optimiser"])


class Diverged(RuntimeError):
    """A loss is NaN or infinite."""

    def __init__(self, names: list[str], scalars: dict[str, float]) -> None:
        super().__init__(
            f"{', '.join(names)} not finite; all scalars of this update: {scalars}. "
            "Lower --learning-rate, or check the dataset's rewards and actions"
        )


def frozen_copy_of(network: nn.Module, like: nn.Module) -> nn.Module:
    """Give `network` the weights of `like` and freeze it. Targets are made by the same maker, never by deepcopy."""
    network.load_state_dict(like.state_dict())
    return network.requires_grad_(False)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.lerp_(new, tau)
