"""Implicit Q-learning (Kostrikov et al., 2021, arXiv 2110.06169): never asks a Q about an action not in the data."""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protos.spaces import PolicySpec
from training.agents.agent import Agent, frozen_copy_of, polyak
from training.agents.losses import advantage_weight, expectile_loss
from training.batch import Batch, State
from training.networks.family import NetworkConfig
from training.networks.roles import Critic, make_actor, make_critic, make_value


@dataclass(frozen=True)
class IQLConfig:
    """Knobs of implicit Q-learning: the paper's for this method, where no preset has others."""

    expectile: float = 0.8
    """Which expectile of Q over dataset actions V estimates; 0.5 is the mean, towards 1 the best seen action."""
    temperature: float = 0.5
    """Advantages are divided by this before exp; smaller trusts Q more, larger approaches behaviour cloning."""
    largest_weight: float = 100.0
    """Advantage weights are clipped here."""
    target_rate: float = 5e-3
    """How far the target critic moves towards the critic at each update."""
    values_first: float = 0.0
    """For this share of the budget, learn values alone; then they rest, and the actor learns alone, from actions drawn
    in proportion to their weights instead of weighted. For data of mixed quality: batches are then made of what is
    worth imitating, where else few of their samples count. 0: all at once, as published."""
    warm_up: int = 0
    """For so many updates every action weighs the same. Advantages of values not yet learned are noise, which a small
    temperature makes large, and an actor does not recover from it in a few thousand updates."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.expectile < 1.0:
            raise ValueError(f"iql.expectile must lie in [0.5, 1), got {self.expectile}; the paper uses 0.8")
        if not 0 <= self.values_first < 1:
            raise ValueError(f"iql.values_first must be a share of the budget, in [0, 1), got {self.values_first}")
        for name in ("temperature", "largest_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"iql.{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"iql.target_rate must lie in (0, 1], got {self.target_rate}; the paper uses 0.005")
        if self.warm_up < 0:
            raise ValueError(f"iql.warm_up must not be negative, got {self.warm_up}")


class IQL(Agent):
    """V by expectile regression towards Q, Q towards r + gamma V, pi by advantage-weighted likelihood."""

    def __init__(
        self, networks: NetworkConfig, spec: PolicySpec, equivariant: frozenset[str], config: IQLConfig
    ) -> None:
        super().__init__()
        self.cfg, self.values_first = config, config.values_first
        self.actor = make_actor(networks, spec, equivariant)
        self.critic = make_critic(networks, spec, equivariant)
        self.value = make_value(networks, spec, equivariant)
        self.target_critic = cast(Critic, frozen_copy_of(make_critic(networks, spec, equivariant), self.critic))
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if self.values_rest:
            return self._actor_alone(batch)
        with torch.no_grad():
            q = self.target_critic(batch.state, batch.action).amin(dim=0)  # [B]
            backup = batch.reward + batch.discount * self.value(batch.next_state)  # [B]
        v = self.value(batch.state)
        weight = self.weight(q - v.detach(), warm=self.updates >= self.cfg.warm_up)
        values = {
            "losses/value": expectile_loss(q - v, self.cfg.expectile),  # eq. 5
            "losses/critic": (self.critic(batch.state, batch.action) - backup).square().mean(dim=1).sum(),  # eq. 6
            "values/q": q.mean(),
            "values/v": v.mean(),
            "values/weight": weight.mean(),
        }
        if self.values_first:
            return values
        likelihood = self.actor(batch.state).log_prob(batch.action)
        return values | {"losses/actor": -(weight * likelihood).mean()}  # eq. 7

    def _actor_alone(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 7 where the batch was drawn by its weights."""
        return {"losses/actor": -self.actor(batch.state).log_prob(batch.action).mean()}

    def follow(self) -> None:
        polyak(self.target_critic, self.critic, self.cfg.target_rate)
        self.updates += 1

    def advantage(self, state: State, action: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        return self.target_critic(state, action).amin(dim=0) - self.value(state)

    def weight(self, advantage: Float[Tensor, " B"], *, warm: Tensor | None = None) -> Float[Tensor, " B"]:
        return advantage_weight(advantage, self.cfg.temperature, self.cfg.largest_weight, warm=warm)

    @property
    def q_function(self) -> Critic:
        return self.critic

    def state_value(self, state: State) -> Tensor:
        return self.value(state)

    def export_value(self) -> nn.Module:
        return self.value.export()
