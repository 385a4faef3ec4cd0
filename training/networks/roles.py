"""Actor, critic and value: an encoder and heads each. Which family plays which role is a set of names."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protos.spaces import Kind, PolicySpec
from training.batch import State
from training.networks.distribution import SquashedGaussian, parameter_kinds
from training.networks.family import NetworkConfig, family
from training.networks.stem import Stem


class _Role(nn.Module):
    """A stem, an encoder and `heads` heads of one family."""

    def __init__(
        self, cfg: NetworkConfig, spec: PolicySpec, steerable: bool, given: Any, predict: Any, heads: int = 1
    ) -> None:
        super().__init__()
        made = family(steerable)
        self.spec, self.steerable = spec, steerable
        self.stem = Stem(spec.observation, cfg.pool)
        self.encoder = made.Encoder(cfg, spec.observation)
        self.heads = nn.ModuleList(made.Head(cfg, spec.observation, given, predict) for _ in range(heads))

    def encode(self, state: State) -> Float[Tensor, "B F"]:
        """The image, once per state; heads may then score many actions against it."""
        return self.encoder(self.stem(state).contiguous(memory_format=torch.channels_last)).float()

    def export(self) -> nn.Module:
        """The role as ordinary torch layers."""
        return Exported(self.stem, self.encoder.export(), [head.export() for head in self.heads])  # type: ignore[operator]


class Exported(nn.Module):
    """What a role becomes without e2cnn: depth [B, 1, H, W], gripper [B, 1], a critic's actions [B, A] -> [B, P].

    Of several heads, the lowest prediction.
    """

    def __init__(self, stem: Stem, encoder: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.encoder, self.heads = stem, encoder, nn.ModuleList(heads)

    def forward(
        self, depth: Float[Tensor, "B 1 H W"], gripper: Float[Tensor, "B 1"], given: Float[Tensor, "B A"] | None = None
    ) -> Float[Tensor, "B P"]:
        features = self.encoder(self.stem.image(depth, gripper))
        first, *others = (head(features, given) for head in self.heads)
        return torch.stack([first, *others]).amin(dim=0) if others else first


class Actor(_Role):
    """pi(. | s)"""

    def __init__(self, cfg: NetworkConfig, spec: PolicySpec, steerable: bool) -> None:
        super().__init__(cfg, spec, steerable, given=(), predict=parameter_kinds(spec.action))

    def forward(self, state: State) -> SquashedGaussian:
        return SquashedGaussian(self.heads[0](self.encode(state)).float(), self.spec.action)


class Critic(_Role):
    """Twin Q(s, a): [2, *S, B] for actions [*S, B, A]."""

    def __init__(self, cfg: NetworkConfig, spec: PolicySpec, steerable: bool) -> None:
        given = tuple(f.kind for f in spec.action.fields)
        super().__init__(cfg, spec, steerable, given=given, predict=(Kind.SCALAR,), heads=2)

    def forward(self, state: State, action: Float[Tensor, "*S B A"]) -> Float[Tensor, "2 *S B"]:
        return self.score(self.encode(state), action)

    def score(self, features: Float[Tensor, "B F"], action: Float[Tensor, "*S B A"]) -> Float[Tensor, "2 *S B"]:
        """Q of encoded states: however many actions, the image has been looked at once."""
        return torch.stack([head(features, action)[..., 0].float() for head in self.heads])


class Value(_Role):
    """V(s): [B]."""

    def __init__(self, cfg: NetworkConfig, spec: PolicySpec, steerable: bool) -> None:
        super().__init__(cfg, spec, steerable, given=(), predict=(Kind.SCALAR,))

    def forward(self, state: State) -> Float[Tensor, " B"]:
        return self.heads[0](self.encode(state))[..., 0].float()


def make_actor(cfg: NetworkConfig, spec: PolicySpec, equivariant: frozenset[str]) -> Actor:
    return Actor(cfg, spec, steerable="actor" in equivariant)


def make_critic(cfg: NetworkConfig, spec: PolicySpec, equivariant: frozenset[str]) -> Critic:
    return Critic(cfg.of_critics, spec, steerable="critic" in equivariant)


def make_value_head(cfg: NetworkConfig, spec: PolicySpec, equivariant: frozenset[str]) -> nn.Module:
    """V(s) on the features of a critic that was made alike: [B, F] -> [B, 1]."""
    return family("critic" in equivariant).Head(cfg.of_critics, spec.observation, (), (Kind.SCALAR,))


def make_value(cfg: NetworkConfig, spec: PolicySpec, equivariant: frozenset[str]) -> Value:
    return Value(cfg.of_critics, spec, steerable="value" in equivariant)
