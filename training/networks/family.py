"""What the two families of networks, steerable and plain, have in common: plain tensors in and out, and their sizes."""

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from protos.errors import Rejected
from protos.spaces import ObservationSpec
from protos.symmetry import Group

ROLES = frozenset({"actor", "critic", "value"})
EQUIVARIANCE: dict[str, frozenset[str]] = {
    "both": ROLES,
    "actor": frozenset({"actor"}),
    "critic": frozenset({"critic", "value"}),
    "none": frozenset(),
}
"""--equivariance -> the roles whose networks are steerable; the paper's ablations are these four sets."""

NARROWEST = 8
"""The image side at which pooling ends: 8 -> 6 (valid 3x3) -> 3 (pool) -> 1 (valid 3x3) tiles evenly, so that quarter
turns are exact."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the networks. A plain one gets as many channels as make its parameter count like a steerable one."""

    group: str = "C8"
    """What steerable networks are built for: rotations, C4, C8 or C16, or rotations and reflections, D4, D8."""
    fields: tuple[int, ...] = (4, 12, 24, 32, 48)
    """Regular fields after each convolution of the encoder; one field is as many channels as the group has elements.
    Each halves the image until it is 8 pixels wide; more of them than that takes work there."""
    hidden: int = 48
    """Regular fields of a head's hidden layer."""
    critic_width: float = 1.0
    """Fields of critics and values, as a share of the actor's: a robot is moved by the actor alone, and in offline
    training critics take most of the time."""
    pool: int = 2
    """Average pooling of the image before the first convolution: 2 turns 128 x 128 into 64 x 64."""

    def __post_init__(self) -> None:
        group = Group.parse(self.group)
        if group.order % 4:  # the server proves quarter turns
            raise ValueError(f"group must hold the quarter turns: C4, C8, C16, D4, D8, ..., got {self.group}")
        if min(self.fields, default=0) < 1 or self.hidden < 1 or self.pool < 1:
            raise ValueError(f"fields, hidden and pool must be positive, got {self.fields}, {self.hidden}, {self.pool}")
        if not 0 < self.critic_width < math.inf:
            raise ValueError(f"critic_width must be positive and finite, got {self.critic_width}")

    @property
    def of_critics(self) -> "NetworkConfig":
        """The sizes of critics and values."""
        fields = tuple(math.ceil(count * self.critic_width) for count in self.fields)
        return replace(self, fields=fields, hidden=math.ceil(self.hidden * self.critic_width), critic_width=1.0)


@dataclass(frozen=True)
class Stage:
    """One 3x3 convolution of an encoder, and whether a 2x2 max pooling follows it."""

    fields: int
    padding: int
    pool: bool


def stages(cfg: NetworkConfig, spec: ObservationSpec) -> tuple[Stage, ...]:
    """The encoder's convolutions, from the pooled image to 1 x 1.

    Raises Rejected when the image does not tile, or `cfg.fields` has not one entry per convolution.
    """
    side = spec.height / cfg.pool
    halvings = _halvings(side)
    poolings = {pool: _halvings(spec.height / pool) for pool in range(1, spec.height)}
    if halvings is None:
        tiling = f"a pooled image {NARROWEST} times a power of two pixels wide"
        fitting = ", ".join(str(pool) for pool, count in poolings.items() if count is not None)
        nothing = f"no pooling does that: make views of a multiple of {NARROWEST} pixels"
        remedy = f"for this view: {fitting}" if fitting else nothing
        raise Rejected("network.pool", tiling, f"{spec.height} / {cfg.pool} = {side:g}", remedy)
    if len(cfg.fields) < halvings + 2:
        entries = f"{halvings + 2} or more entries, one for each convolution of a {side:g} x {side:g} image"
        fits = [pool for pool, count in poolings.items() if count == len(cfg.fields) - 2]
        remedy = f"or fit the image to the fields: --network.pool {fits[0]}" if fits else ""
        raise Rejected("network.fields", entries, str(cfg.fields), remedy)
    *padded, second_last, last = cfg.fields
    halved, kept = padded[:halvings], padded[halvings:]
    return (
        *(Stage(f, 1, True) for f in halved),
        *(Stage(f, 1, False) for f in kept),
        Stage(second_last, 0, True),
        Stage(last, 0, False),
    )


def _halvings(side: float) -> int | None:
    """How often an image halves until it is NARROWEST wide; None where it never is."""
    halvings = math.log2(side / NARROWEST)
    return int(halvings) if halvings >= 0 and halvings == int(halvings) else None


class Encoder(Protocol):
    """An image to a feature vector."""

    features: int

    def __call__(self, image: Float[Tensor, "B 2 S S"]) -> Float[Tensor, "B F"]: ...

    def export(self) -> nn.Module:
        """The same function as ordinary torch layers."""
        ...


class Head(Protocol):
    """Features, and perhaps an action, to predicted fields.

    Given actions may carry leading sample axes: the features enter once, however many actions are scored against them.
    """

    def __call__(self, features: Float[Tensor, "B F"], given: Float[Tensor, "*S B A"] | None = None) -> Tensor: ...

    def export(self) -> nn.Module:
        """The same function as ordinary torch layers, without sample axes."""
        ...


def family(steerable: bool) -> ModuleType:
    """The module with `Encoder(cfg, spec)` and `Head(cfg, spec, given, predict)`; e2cnn is imported only if used."""
    if steerable:
        from training.networks import steerable as chosen
    else:
        from training.networks import plain as chosen  # type: ignore[no-redef]
    return chosen
