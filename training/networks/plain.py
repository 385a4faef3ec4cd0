"""An ordinary CNN, the baseline: interface, layers and about the parameter count of the steerable family."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from protos.spaces import Kind, ObservationSpec
from protos.symmetry import Group
from training.networks.family import NetworkConfig, stages


class Encoder(nn.Module):
    """Image [B, 2, S, S] -> features [B, F]."""

    def __init__(self, cfg: NetworkConfig, spec: ObservationSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        current = 2
        for stage in stages(cfg, spec):
            layers.append(nn.Conv2d(current, _channels(cfg, stage.fields), 3, padding=stage.padding))
            if stage.pool:
                layers.append(nn.MaxPool2d(2))
            layers.append(nn.ReLU(inplace=True))
            current = _channels(cfg, stage.fields)
        self.body = nn.Sequential(*layers, nn.Flatten(1))
        self.features = current

    def forward(self, image: Float[Tensor, "B 2 S S"]) -> Float[Tensor, "B F"]:
        return self.body(image)

    def export(self) -> nn.Module:
        return self.body


class Head(nn.Module):
    """Features [B, F] and given fields [*S, B, A] -> predicted fields [*S, B, P]."""

    def __init__(
        self, cfg: NetworkConfig, spec: ObservationSpec, given: Sequence[Kind], predict: Sequence[Kind]
    ) -> None:
        super().__init__()
        hidden = _channels(cfg, cfg.hidden)
        self.from_features = nn.Linear(_channels(cfg, cfg.fields[-1]), hidden)
        self.from_given = nn.Linear(_size(given), hidden, bias=False) if given else None
        self.relu = nn.ReLU()
        self.last = nn.Linear(hidden, _size(predict))

    def forward(self, features: Float[Tensor, "B F"], given: Float[Tensor, "*S B A"] | None = None) -> Tensor:
        hidden = self.from_features(features)
        if given is not None and self.from_given is not None:
            hidden = hidden + self.from_given(given)
        return self.last(self.relu(hidden))

    def export(self) -> nn.Module:
        return self


def _channels(cfg: NetworkConfig, fields: int) -> int:
    """A steerable 3x3 filter between two regular fields has 6 free weights per group element where a plain one has 9
    per channel pair: sqrt(6 |G| / 9) channels a field make the counts alike (a test compares them)."""
    return math.ceil(fields * math.sqrt(6 * len(list(Group.parse(cfg.group))) / 9))


def _size(kinds: Sequence[Kind]) -> int:
    return sum(2 if kind is Kind.VECTOR else 1 for kind in kinds)
