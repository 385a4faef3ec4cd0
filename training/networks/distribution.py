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

    def sample(self, count: int) -> tuple[Float[Tensor, "S B A"], Float[Tensor, "S B"]]:
        """`count` draws a state and their log-probabilities; differentiable through motions, not through commands."""
        parts, total = [], torch.zeros(())
        for field, loc in self._located():
            wide = loc.expand(count, *loc.shape)
            if is_command(field):
                part = 2 * torch.bernoulli(torch.sigmoid(wide)) - 1
                log_prob = _command_log_prob(part, loc)
            else:
                log_scale = self._log_scale[field.name]
                u = wide + log_scale.exp()[..., None] * torch.randn_like(wide)
                part, log_prob = _squash(u), _motion_log_prob(u, loc, log_scale)
            parts.append(part)
            total = total + log_prob
        return torch.cat(parts, dim=-1), total

    def with_every_command(
        self, action: Float[Tensor, "S B A"], log_prob: Float[Tensor, "S B"]
    ) -> tuple[Float[Tensor, "K*S B A"], Float[Tensor, "K*S B"], Float[Tensor, "K*S B"]]:
        """Draws, repeated with every combination of commands: actions, log-probabilities and weights.

        The weights sum to 1 over the first axis: expectations are exact over commands and sampled over motions.
        """
        shares = torch.full_like(log_prob, 1 / len(log_prob))
        for field, loc in self._located():
            if is_command(field):
                place = self._spec.slice_of(field.name)
                log_prob = log_prob - _command_log_prob(action[..., place], loc)
                branches = []
                for command in (-1.0, 1.0):
                    branch = action.clone()
                    branch[..., place] = command
                    branches.append((branch, _command_log_prob(branch[..., place], loc)))
                action = torch.cat([branch for branch, _ in branches])
                shares = torch.cat([shares * added.exp() for _, added in branches])
                log_prob = torch.cat([log_prob + added for _, added in branches])
        return action, log_prob, shares

    def log_prob(self, action: Float[Tensor, "*S B A"]) -> Float[Tensor, "*S B"]:
        """Log-density of normalised actions; of a command, the log-likelihood of its expectation."""
        total = torch.zeros(action.shape[:-1], dtype=action.dtype, device=action.device)
        for field, loc in self._located():
            a = action[..., self._spec.slice_of(field.name)]
            if is_command(field):
                total = total + _command_log_prob(a, loc)
            else:
                total = total + _motion_log_prob(_unsquash(a), loc, self._log_scale[field.name])
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


class Uniform:
    """The uniform distribution over normalised actions: motions over their ball, commands over their two ends."""

    def __init__(self, spec: ActionSpec) -> None:
        self._spec = spec
        # A ball of n dimensions has the volume pi^(n/2) / Gamma(n/2 + 1); two ends count as 2.
        sizes = [len(f.components) for f in spec.fields if not is_command(f)]
        volumes = [math.pi ** (n / 2) / math.gamma(n / 2 + 1) for n in sizes]
        self.log_volume = math.log(math.prod(volumes) * 2 ** (len(spec.fields) - len(sizes)))

    def sample(self, count: int, like: Float[Tensor, "B A"]) -> tuple[Float[Tensor, "S B A"], Float[Tensor, "S B"]]:
        """`count` draws for each row of `like`, and their log-probability, which is everywhere the same."""
        batch = like.shape[:-1]
        parts = []
        for field in self._spec.fields:
            if is_command(field):
                parts.append(2 * torch.randint(2, (count, *batch, 1), device=like.device).to(like.dtype) - 1)
            else:
                n = len(field.components)
                direction = torch.randn(count, *batch, n, dtype=like.dtype, device=like.device)
                radius = torch.rand(count, *batch, 1, dtype=like.dtype, device=like.device) ** (1 / n)
                parts.append(direction / _norm(direction) * radius)
        action = torch.cat(parts, dim=-1)
        return action, torch.full_like(action[..., 0], -self.log_volume)


def _command_log_prob(command: Float[Tensor, "*S B 1"], loc: Float[Tensor, "B 1"]) -> Float[Tensor, "*S B"]:
    share = (command[..., 0] + 1) / 2
    return share * F.logsigmoid(loc[..., 0]) + (1 - share) * F.logsigmoid(-loc[..., 0])


def _motion_log_prob(
    u: Float[Tensor, "*S B n"], loc: Float[Tensor, "B n"], log_scale: Float[Tensor, " B"]
) -> Float[Tensor, "*S B"]:
    """Log-density of squash(u) where u ~ N(loc, scale^2 I)."""
    n = u.shape[-1]
    gaussian = -((u - loc).square().sum(dim=-1) / (2 * torch.exp(2 * log_scale)))
    gaussian = gaussian - n * (log_scale + 0.5 * math.log(2 * math.pi))
    # |da/du| = (1 - tanh^2 r) (tanh(r) / r)^(n - 1): one radial direction, n - 1 tangential ones.
    radius = _norm(u)[..., 0]
    log_det = 2 * (math.log(2) - radius - F.softplus(-2 * radius))  # log(1 - tanh^2 r), where it underflows too
    if n > 1:
        log_det = log_det + (n - 1) * torch.log(torch.tanh(radius) / radius)
    return gaussian - log_det


def _squash(u: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    """u tanh(|u|) / |u|: into the unit ball along the radius; for n = 1, tanh."""
    radius = _norm(u)
    return u * (torch.tanh(radius) / radius)


def _unsquash(a: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    """The inverse of `_squash`, from inside the bound."""
    radius = _norm(a)
    return a * (torch.atanh(radius.clamp(max=INSIDE)) / radius)


def _norm(u: Tensor) -> Tensor:
    # The square root of what is never 0: at 0 a norm has no gradient. Not by adding a little, which ONNX's optimiser
    # takes for adding nothing: the exported policy would then divide 0 by 0.
    return u.square().sum(dim=-1, keepdim=True).clamp(min=_TINY**2).sqrt()
