"""The terms of the algorithms as pure functions of tensors; every input and result is stated with its shape."""

from jaxtyping import Float
from torch import Tensor


def expectile_loss(difference: Float[Tensor, " B"], expectile: float) -> Float[Tensor, ""]:
    """Mean of |tau - 1(d < 0)| d^2: the asymmetric square whose minimiser is the tau-expectile (IQL, eq. 3)."""
    weight = (difference < 0).to(difference.dtype).sub(expectile).abs()
    return (weight * difference.square()).mean()


def advantage_weight(advantage: Float[Tensor, " B"], temperature: float, largest: float) -> Float[Tensor, " B"]:
    """exp(A / beta), clipped so that no single sample owns the batch (IQL, eq. 7)."""
    return (advantage / temperature).exp().clamp(max=largest)
