"""What the curves show beside the losses: values on and off the data, entropy, equivariance, on a fixed probe."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from protos.symmetry import QUARTER_TURNS
from training.agents.agent import Agent
from training.batch import State
from training.data.dataset import Dataset
from training.networks.distribution import Uniform

PROBE = 64
DRAWS = 4
"""Actions per state where an expectation over actions is sampled."""


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """On a GPU, torch rounds what convolutions multiply to 10 bits (TF32) unless told otherwise: by itself a thousand
    times what an equivariant network is off by."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Probe:
    """The same recorded transitions at every look, so that curves show the agent's change and nothing else."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._spec = dataset.spec
        self.batch = dataset.sample(PROBE, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def look(self, agent: Agent) -> dict[str, float]:
        """Scalars by the name of their curve. Takes random numbers, so seed before the next update."""
        with exact_convolutions():
            return self._look(agent)

    def _look(self, agent: Agent) -> dict[str, float]:
        state, action = self.batch.state, self.batch.action
        pi = agent.actor(state)
        _, log_prob = pi.sample(DRAWS)
        seen = {
            "policy/entropy": -log_prob.mean(),
            "policy/log_prob": pi.log_prob(action).mean(),
            "policy/equivariance_error": self._equivariance_error(agent, pi.mode()),
        }
        critic = agent.q_function
        if critic is not None:
            features = critic.encode(state)
            turned = torch.stack([_turned(action, turn, self._spec) for turn in QUARTER_TURNS])
            elsewhere, _ = Uniform(self._spec.action).sample(DRAWS, action)
            seen |= {
                "values/q_on_data": critic.score(features, action).mean(),
                "values/q_off_data": critic.score(features, elsewhere).mean(),
                "values/q_on_turned_data": critic.score(features, turned).mean(),
            }
        names, values = zip(*seen.items(), strict=True)
        return dict(zip(names, torch.stack(values).tolist(), strict=True))

    def _equivariance_error(self, agent: Agent, before: torch.Tensor) -> torch.Tensor:
        """max |pi(g s) - rho(g) pi(s)| over a quarter turn, normalised units."""
        turn = QUARTER_TURNS[0]
        depth = turn.image(self.batch.state.depth.cpu().numpy(), self._spec.observation)
        there = State(torch.from_numpy(np.ascontiguousarray(depth)).to(before.device), self.batch.state.gripper)
        return (agent.actor(there).mode() - _turned(before, turn, self._spec)).abs().max()


def _turned(action: torch.Tensor, turn: Any, spec: Any) -> torch.Tensor:
    return torch.from_numpy(turn.action(action.cpu().numpy(), spec.action)).to(action.device)
