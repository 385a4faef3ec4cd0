"""The terms of the algorithms as pure functions of tensors; every input and result is stated with its shape."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def expectile_loss(difference: Float[Tensor, " B"], expectile: float) -> Float[Tensor, ""]:
    """Mean of |tau - 1(d < 0)| d^2: the asymmetric square whose minimiser is the tau-expectile (IQL, eq. 3)."""
    weight = (difference < 0).to(difference.dtype).sub(expectile).abs()
    return (weight * difference.square()).mean()


def advantage_weight(
    advantage: Float[Tensor, " B"], temperature: float, largest: float, *, warm: Tensor | None = None
) -> Float[Tensor, " B"]:
    """exp(A / beta), clipped so that no single sample owns the batch (IQL, eq. 7); 1 for all until `warm` is true."""
    weight = (advantage / temperature).exp().clamp(max=largest)
    return weight if warm is None else torch.where(warm, weight, torch.ones_like(weight))


def log_mean_exp(
    q: Float[Tensor, "2 N B"], log_density: Float[Tensor, "N B"], temperature: float
) -> Float[Tensor, "2 B"]:
    """T log of the integral of exp(Q(s, a) / T) over actions, from N proposals weighted by their own densities.

    The importance-sampled soft maximum of CQL(H) (Kumar et al., 2020, appendix F).
    """
    return temperature * (torch.logsumexp(q / temperature - log_density, dim=1) - math.log(q.shape[1]))


def conservative_gap(
    proposed: Float[Tensor, "2 N B"],
    log_density: Float[Tensor, "N B"],
    recorded: Float[Tensor, "2 B"],
    temperature: float,
) -> Float[Tensor, "2"]:
    """How far the soft maximum of Q over all actions lies above Q of the recorded ones (CQL, eq. 4)."""
    return (log_mean_exp(proposed, log_density, temperature) - recorded).mean(dim=1)
