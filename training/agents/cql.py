"""Conservative Q-learning (Kumar et al., 2020, arXiv 2006.04779) over soft actor-critic (Haarnoja et al., 2018)."""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protos.spaces import PolicySpec
from training.agents.agent import Agent, frozen, frozen_copy_of, polyak
from training.agents.losses import advantage_weight, conservative_gap, expectile_loss
from training.batch import Batch, State
from training.networks.distribution import SquashedGaussian, Uniform
from training.networks.family import NetworkConfig
from training.networks.roles import Critic, Value, make_actor, make_critic, make_value, make_value_head

LARGEST_LOG_MULTIPLIER = math.log(1e6)
"""Where a gap that cannot be reached drives the conservative weight, and from where it can come back."""


@dataclass(frozen=True)
class CQLConfig:
    """Knobs of conservative Q-learning: the paper's for this method, where no preset has others."""

    conservative_weight: float = 1.0
    """Of the conservative gap beside the temporal-difference error; with --cql.gap, only where it starts."""
    gap: float | None = None
    """The Lagrangian variant: adapt the weight so that the conservative gap stays near this. Left out: fixed weight.
    Of a Q that is the same for all actions, the gap is not 0 but --cql.softness times the log-volume of the actions,
    3.2 nats for a planar motion, a lift, a turn and a gripper."""
    gap_rate: float = 1.0
    """How many times faster than the networks that weight learns: at 1, thousands of updates move it by an e-fold."""
    softness: float = 1.0
    """Temperature of the soft maximum over actions."""
    proposals: int = 10
    """Actions drawn from each of: uniform, the policy here, the policy at the next state."""
    entropy: Literal["learned", "fixed"] = "learned"
    """Whether the entropy temperature alpha follows --cql.target-entropy or stays as it starts."""
    entropy_temperature: float = 0.01
    """Where alpha starts: what a unit of entropy is worth, in reward."""
    target_entropy: float | None = None
    """Of the policy, in nats. Left out: minus the number of action components. As scales have a floor, a policy gets
    so low only with motions near their bounds: short of that, alpha only decays."""
    cloning_weight: float = 0.0
    """Of the advantage-weighted log-likelihood of recorded actions in the actor's loss. 0 is CQL as published: the
    actor learns from Q alone, which takes many more updates."""
    cloning_temperature: float = 0.5
    """Advantages of recorded actions are divided by this before exp, as in IQL."""
    cloning_expectile: float = 0.8
    """They are over this expectile of recorded actions' Q, as in IQL. Over Q of the policy's own action, those would
    weigh least just where Q overrates a wrong one."""
    cloning_value: Literal["head", "network"] = "head"
    """What learns it: a head on the critic's features, or, for data of mixed quality, a network as in IQL."""
    cloning_warm_up: int = 0
    """For so many updates every recorded action weighs the same, as in IQL."""
    largest_weight: float = 100.0
    """Those weights are clipped here."""
    values_first: float = 0.0
    """After this share of the budget critics and alpha rest, and the actor clones actions that are drawn by weight."""
    target_rate: float = 5e-3
    """How far the target critic moves towards the critic at each update."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.cloning_expectile < 1.0 or self.cloning_warm_up < 0:
            raise ValueError(f"cql.cloning_expectile must lie in [0.5, 1), cloning_warm_up not below 0, got {self}")
        positive = ("gap_rate", "softness", "proposals", "entropy_temperature", "cloning_temperature", "largest_weight")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"cql.{name} must be positive, got {getattr(self, name)}")
        if self.conservative_weight < 0 or self.cloning_weight < 0:
            raise ValueError(f"cql.conservative_weight and cql.cloning_weight must not be negative, got {self}")
        if not 0 <= self.values_first < 1 or (self.values_first and not self.cloning_weight):
            raise ValueError(f"cql.values_first must lie in [0, 1), and needs cql.cloning_weight, got {self}")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"cql.target_rate must lie in (0, 1], got {self.target_rate}; the paper uses 0.005")


class CQL(Agent):
    """Twin soft Q held down on actions that nobody took; the actor climbs them. A state is encoded once per network."""

    def __init__(
        self, networks: NetworkConfig, spec: PolicySpec, equivariant: frozenset[str], config: CQLConfig
    ) -> None:
        super().__init__()
        self.cfg, self.values_first = config, config.values_first
        self.actor = make_actor(networks, spec, equivariant)
        self.critic = make_critic(networks, spec, equivariant)
        self.target_critic = cast(Critic, frozen_copy_of(make_critic(networks, spec, equivariant), self.critic))
        self.log_alpha = nn.Parameter(torch.tensor(math.log(config.entropy_temperature)))
        self.log_weight = nn.Parameter(torch.tensor(math.log(max(config.conservative_weight, 1e-6))))
        self.log_alpha.requires_grad_(config.entropy == "learned")
        self.log_weight.requires_grad_(config.gap is not None)
        value = make_value if config.cloning_value == "network" else make_value_head
        self.value = value(networks, spec, equivariant) if config.cloning_weight else None
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._uniform = Uniform(spec.action)
        self._target_entropy = -float(spec.action.size) if config.target_entropy is None else config.target_entropy

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        pi = self.actor(batch.state)
        if self.values_rest:  # the batch was drawn by weights; to climb a Q that learns no more is to find its errors
            return {"losses/actor": -pi.log_prob(batch.action).mean()}
        features = self.critic.encode(batch.state)  # [B, F], once, for every action below
        with torch.no_grad():
            next_pi = self.actor(batch.next_state)
            next_value, _ = self._soft_value(self.target_critic, self.target_critic.encode(batch.next_state), next_pi)
            backup = batch.reward + batch.discount * next_value  # [B]
            action, log_density = self._propose(pi, next_pi, batch.action)
        recorded = self.critic.score(features, batch.action)  # [2, B]
        proposed = self.critic.score(features, action)  # [2, N, B]
        gap = conservative_gap(proposed, log_density, recorded, self.cfg.softness)  # [2], eq. 4
        with frozen(self.critic):
            value, entropy = self._soft_value(self.critic, features.detach(), pi)  # [B]
        cloning, learned = self._cloning(pi, batch, features.detach(), recorded.detach().amin(dim=0))
        conservative, multiplier = self._weighed(gap)
        return {
            **learned,
            **multiplier,
            "losses/critic": (recorded - backup).square().mean(dim=1).sum(),
            "losses/conservative": conservative,
            "losses/actor": self.cfg.cloning_weight * cloning - value.mean(),
            "losses/alpha": self.log_alpha.exp() * (entropy.detach() - self._target_entropy).mean(),
            "values/q": recorded.mean(),
            "values/q_elsewhere": proposed.mean(),
            "values/gap": gap.mean(),
            "values/entropy": entropy.mean(),
            "values/alpha": self.log_alpha.exp(),
        }

    def _cloning(
        self, pi: SquashedGaussian, batch: Batch, features: Float[Tensor, "B F"], q: Float[Tensor, " B"]
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The weighted likelihood of recorded actions as in IQL, and the loss of the V that weighs them."""
        if self.value is None:
            return 0.0, {}
        v = self._expectile(batch.state, features)  # [B]
        weight = self.weight(q - v.detach(), warm=self.updates >= self.cfg.cloning_warm_up)
        values = {"losses/value": expectile_loss(q - v, self.cfg.cloning_expectile), "values/v": v.mean()}
        return -(weight * pi.log_prob(batch.action)).mean(), values | {"values/weight": weight.mean()}

    def _expectile(self, state: State, features: Float[Tensor, "B F"]) -> Float[Tensor, " B"]:
        """V, of states that the critic has encoded as `features`."""
        assert self.value is not None
        return self.value(state) if isinstance(self.value, Value) else self.value(features)[..., 0].float()

    def _soft_value(
        self, critic: Critic, features: Float[Tensor, "B F"], pi: SquashedGaussian
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """E_pi[min Q(s, a) - alpha log pi(a | s)] and pi's entropy: one draw of the motions, every command."""
        action, log_prob, share = pi.with_every_command(*pi.sample(1))
        value = critic.score(features, action).amin(dim=0) - self.log_alpha.detach().exp() * log_prob
        return (share * value).sum(dim=0), -(share * log_prob).sum(dim=0)

    def _propose(
        self, pi: SquashedGaussian, next_pi: SquashedGaussian, like: Float[Tensor, "B A"]
    ) -> tuple[Float[Tensor, "N B A"], Float[Tensor, "N B"]]:
        """Actions to hold down, with their log-densities: uniform, the policy's here and its next ones."""
        n = self.cfg.proposals
        parts = (self._uniform.sample(n, like), pi.sample(n), next_pi.sample(n))
        return torch.cat([action for action, _ in parts]), torch.cat([density for _, density in parts])

    def _weighed(self, gap: Float[Tensor, "2"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The conservative loss and, in the Lagrangian variant, the loss that adapts its weight (CQL, appendix F)."""
        if self.cfg.gap is None:
            return self.cfg.conservative_weight * gap.sum(), {}
        weight, excess = self.log_weight.exp(), gap - self.cfg.gap
        return (weight.detach() * excess).sum(), {
            "losses/multiplier": -(weight * excess.detach()).sum(),
            "values/multiplier": weight,
        }

    def follow(self) -> None:
        polyak(self.target_critic, self.critic, self.cfg.target_rate)
        self.log_weight.data.clamp_(max=LARGEST_LOG_MULTIPLIER)
        self.updates += 1

    def faster(self) -> dict[nn.Parameter, float]:
        return {} if self.cfg.gap is None else {self.log_weight: self.cfg.gap_rate}

    def advantage(self, state: State, action: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        features = self.critic.encode(state)
        return self.critic.score(features, action).amin(dim=0) - self._expectile(state, features)

    def weight(self, advantage: Float[Tensor, " B"], *, warm: Tensor | None = None) -> Float[Tensor, " B"]:
        return advantage_weight(advantage, self.cfg.cloning_temperature, self.cfg.largest_weight, warm=warm)

    @property
    def q_function(self) -> Critic:
        return self.critic

    def state_value(self, state: State) -> Float[Tensor, " B"]:
        """Q of the greedy action, whose command, an expectation, may lie between the two that Q learned."""
        return self.critic(state, self.actor(state).mode()).amin(dim=0)

    def export_value(self) -> nn.Module:
        return self.critic.export()
