"""The policy's distribution over one action: one class owns sample, log_prob and mode.

Every part commutes with rotations about +z: a planar motion is squashed by its radius and has one scale.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from protos.spaces import ActionSpec, Field, Kind

INSIDE = 0.98
"""Dataset actions are clamped to this radius before the squash is inverted: expert motions lie on the bound itself,
where the inverse is infinite, and atanh(0.98) = 2.3 keeps their share of the likelihood in proportion."""
LOG_SCALE_LOW, LOG_SCALE_HIGH = -1.5, 0.5
_TINY = 1e-6


def is_command(field: Field) -> bool:
    """Whether a field is a two-ended command, such as the gripper's, rather than a motion around zero.

    Experts command the ends, 0 or 1, where the density of any squashed Gaussian is unbounded; so a command has a
    Bernoulli likelihood between its ends. Its greedy action is the expected command.
    """
    return field.limit is None


def parameter_kinds(spec: ActionSpec) -> tuple[Kind, ...]:
    """What a network must predict: a location per field, then a log-scale per motion field."""
    scales = [Kind.SCALAR for f in spec.fields if not is_command(f)]
    return (*(f.kind for f in spec.fields), *scales)


class SquashedGaussian:
    """Motions: a = u tanh(r) / r with u ~ N(location, scale^2 I) and r = |u|. Commands: Bernoulli. All normalised.

    Args:
        parameters: [B, size + motion fields], laid out as `parameter_kinds` says.
    """

    def __init__(self, parameters: Float[Tensor, "B P"], spec: ActionSpec) -> None:
        self._spec = spec
        self._location = parameters[..., : spec.size]
        # Smooth bounds: a clamp would stop the gradient of a scale that has left them.
        span = torch.sigmoid(parameters[..., spec.size :])
        log_scales = iter((LOG_SCALE_LOW + (LOG_SCALE_HIGH - LOG_SCALE_LOW) * span).unbind(dim=-1))
        self._log_scale = {f.name: next(log_scales) for f in spec.fields if not is_command(f)}  # each [B]

    def mode(self) -> Float[Tensor, "B A"]:
        """The squashed location of every motion and the expected value of every command."""
        parts = [
            torch.tanh(loc / 2) if is_command(field) else _squash(loc)  # tanh(l / 2) = 2 sigmoid(l) - 1
            for field, loc in self._located()
        ]
        return torch.cat(parts, dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B A"]:
        """One draw per state, differentiable through motions, not through commands."""
        parts = []
        for field, loc in self._located():
            if is_command(field):
                parts.append(2 * torch.bernoulli(torch.sigmoid(loc), generator=generator) - 1)
            else:
                noise = torch.randn(loc.shape, generator=generator, dtype=loc.dtype, device=loc.device)
                parts.append(_squash(loc + self._log_scale[field.name].exp()[..., None] * noise))
        return torch.cat(parts, dim=-1)

    def log_prob(self, action: Float[Tensor, "*S B A"]) -> Float[Tensor, "*S B"]:
        """Log-density of normalised actions; of a command, the log-likelihood of its expectation."""
        total = torch.zeros(action.shape[:-1], dtype=action.dtype, device=action.device)
        for field, loc in self._located():
            a = action[..., self._spec.slice_of(field.name)]
            if is_command(field):
                share = (a[..., 0] + 1) / 2
                total = total + share * F.logsigmoid(loc[..., 0]) + (1 - share) * F.logsigmoid(-loc[..., 0])
            else:
                total = total + self._motion_log_prob(a, loc, self._log_scale[field.name])
        return total

    def std(self) -> Float[Tensor, "B A"]:
        """Per component: a motion's scale before the squash, a command's standard deviation (as a normalised value)."""
        parts = []
        for field, loc in self._located():
            if is_command(field):
                open_share = torch.sigmoid(loc)
                parts.append(2 * (open_share * (1 - open_share)).sqrt())
            else:
                parts.append(self._log_scale[field.name].exp()[..., None].expand_as(loc))
        return torch.cat(parts, dim=-1)

    def _located(self) -> list[tuple[Field, Tensor]]:
        return [(f, self._location[..., self._spec.slice_of(f.name)]) for f in self._spec.fields]

    @staticmethod
    def _motion_log_prob(
        a: Float[Tensor, "*S B n"], loc: Float[Tensor, "B n"], log_scale: Float[Tensor, " B"]
    ) -> Float[Tensor, "*S B"]:
        n = a.shape[-1]
        radius = _norm(a)  # [*S, B, 1], |a| = tanh |u|
        squashed = radius.clamp(max=INSIDE)
        unsquashed = torch.atanh(squashed)
        u = a * (unsquashed / radius)
        gaussian = -((u - loc).square().sum(dim=-1) / (2 * torch.exp(2 * log_scale)))
        gaussian = gaussian - n * (log_scale + 0.5 * math.log(2 * math.pi))
        # |da/du| = (1 - tanh^2 r) (tanh(r) / r)^(n - 1): one radial direction, n - 1 tangential ones.
        log_det = torch.log1p(-squashed.square()) + (n - 1) * torch.log(squashed / unsquashed)
        return gaussian - log_det[..., 0]


def _squash(u: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    """u tanh(|u|) / |u|: into the unit ball along the radius; for n = 1, tanh."""
    radius = _norm(u)
    return u * (torch.tanh(radius) / radius)


def _norm(u: Tensor) -> Tensor:
    # The square root of a sum that is never 0: the gradient of a plain norm at 0 is NaN.
    return (u.square().sum(dim=-1, keepdim=True) + _TINY**2).sqrt()
