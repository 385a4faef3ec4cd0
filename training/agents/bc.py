"""Behaviour cloning: maximum likelihood of the recorded actions. The baseline that every user asks for."""

from dataclasses import dataclass

from torch import Tensor

from protos.spaces import PolicySpec
from training.agents.agent import Agent
from training.batch import Batch
from training.networks.family import NetworkConfig
from training.networks.roles import make_actor


@dataclass(frozen=True)
class BCConfig:
    """Behaviour cloning has no knobs of its own."""


class BC(Agent):
    """max_pi E log pi(a | s)"""

    def __init__(
        self, networks: NetworkConfig, spec: PolicySpec, equivariant: frozenset[str], config: BCConfig
    ) -> None:
        super().__init__()
        del config
        self.actor = make_actor(networks, spec, equivariant)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"losses/actor": -self.actor(batch.state).log_prob(batch.action).mean()}
