"""The second part of a run in which values came first: values rest, and the actor learns alone.

It draws recorded actions in proportion to what values say they are worth, as a weighted likelihood would count them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from training.agents.agent import Agent, Diverged
from training.batch import Batch
from training.data.dataset import Dataset

VIEWS, MOST_LOOKS = 8, 16_000
"""In how many augmented views each action is looked at; in fewer, down to one, where the data would need more looks."""
BATCH = 64


@dataclass(frozen=True)
class Extraction:
    """How transitions are drawn, and since which update and share of the budget."""

    weights: Float[Tensor, " T"]
    """On the CPU, where what is random is drawn."""
    update: int
    progress: float


@torch.no_grad()
def weigh(
    agent: Agent, dataset: Dataset, augmented: Callable[[Batch], Batch], views: int = VIEWS
) -> Float[Tensor, " T"]:
    """The weight of every recorded action by the mean of its advantages in up to `views` augmented views.

    Raises Diverged when they are no weights to draw by.
    """
    count = len(dataset)
    views = max(1, min(views, MOST_LOOKS // count))
    index = torch.arange(count, device=dataset.action.device).repeat(views)
    seen = (augmented(dataset.batch(part)) for part in index.split(BATCH))
    advantage = torch.cat([agent.advantage(part.state, part.action).float() for part in seen]).view(views, count)
    weights = agent.weight(advantage.mean(dim=0)).cpu()
    if not (weights.isfinite().all() and weights.any()):
        told = {"values/advantage": advantage.mean().item(), "values/weight": weights.mean().item()}
        raise Diverged("the weights of recorded actions are not finite, or all 0", told)
    return weights
