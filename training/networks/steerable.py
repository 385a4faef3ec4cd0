"""SO(2)-steerable encoder and head on e2cnn. GeometricTensor never leaves this file.

The body maps regular fields to regular fields with pointwise nonlinearities, which commute with the group; vectors
(irrep 1) and scalars (trivial) appear only where a head is given or predicts them, at its linear layers.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import e2cnn.nn as enn
import numpy as np
import torch
from e2cnn import gspaces
from e2cnn.nn.init import _generalized_he_init_variances
from jaxtyping import Float
from torch import Tensor, nn

from protos.spaces import Kind, ObservationSpec
from protos.symmetry import Group
from training.networks import harmonic
from training.networks.e2cnn_compat import mend
from training.networks.family import NetworkConfig, stages
from training.networks.harmonic import Harmonics

mend()

_SPREADS: dict[tuple[enn.FieldType, enn.FieldType, int], Tensor] = {}
"""The initial spread of every weight of a convolution, by input, output and size; two thirds of the time to build."""
_HARMONICS: dict[gspaces.GSpace, Harmonics] = {}
"""Of every group, on the CPU: each layer has a copy, which goes where its network goes."""


class Encoder(nn.Module):
    """Image [B, 2, S, S] of trivial fields -> features [B, F], regular fields."""

    def __init__(self, cfg: NetworkConfig, spec: ObservationSpec) -> None:
        super().__init__()
        space = _space(cfg.group)
        self._in = current = _type(space, [Kind.SCALAR, Kind.SCALAR])
        layers: list[enn.EquivariantModule] = []
        for stage in stages(cfg, spec):
            wider = _regular(space, stage.fields)
            layers.append(_conv(current, wider, 3, padding=stage.padding))
            if stage.pool:
                layers.append(enn.PointwiseMaxPool(wider, 2))
            layers.append(enn.ReLU(wider, inplace=True))  # commutes with the pooling, which leaves a quarter to do
            current = wider
        self.body = enn.SequentialModule(*layers)
        self.features = current.size

    def forward(self, image: Float[Tensor, "B 2 S S"]) -> Float[Tensor, "B F"]:
        return self.body(enn.GeometricTensor(image, self._in)).tensor.flatten(1)

    def export(self) -> nn.Module:
        return nn.Sequential(_exported(self.body), nn.Flatten(1))


class Head(nn.Module):
    """Features [B, F] and given fields [*S, B, A] -> predicted fields [*S, B, P].

    Where everything predicted is a scalar, the hidden layer is pooled over the group first: invariant by construction.
    """

    _given_to_display: Tensor
    _display_to_world: Tensor

    def __init__(
        self, cfg: NetworkConfig, spec: ObservationSpec, given: Sequence[Kind], predict: Sequence[Kind]
    ) -> None:
        super().__init__()
        space = _space(cfg.group)
        self._features = _regular(space, cfg.fields[-1])
        hidden = _regular(space, cfg.hidden)
        self.from_features = _conv(self._features, hidden, 1)
        self._given = _type(space, given) if given else None
        self.from_given = _conv(self._given, hidden, 1, bias=False) if given else None
        self.relu = enn.ReLU(hidden)
        invariant = all(kind is Kind.SCALAR for kind in predict)
        self.pool = enn.GroupPooling(hidden) if invariant else None
        self._max = _MaxOfFields(space.regular_repr.size)
        self.last = _conv(self.pool.out_type if self.pool else hidden, _type(space, predict), 1)
        self.register_buffer("_given_to_display", _to_display(spec, given), persistent=False)
        self.register_buffer("_display_to_world", _to_display(spec, predict).T, persistent=False)

    def forward(self, features: Float[Tensor, "B F"], given: Float[Tensor, "*S B A"] | None = None) -> Tensor:
        hidden = self.from_features(_points(features, self._features))
        leading = features.shape[:-1]
        if given is not None:
            display = given @ self._given_to_display.T
            leading = display.shape[:-1]
            acted = self.from_given(_points(display.flatten(0, -2), self._given)).tensor  # type: ignore[misc]
            joint = acted.unflatten(0, leading) + hidden.tensor  # the features, once, against every action
            hidden = enn.GeometricTensor(joint.flatten(0, -4), hidden.type)
        hidden = self.relu(hidden)
        if self.pool is not None:  # e2cnn's own asks a GPU for indices, and waits for them
            hidden = enn.GeometricTensor(self._max(hidden.tensor), self.pool.out_type)
        predicted = self.last(hidden).tensor.flatten(1)
        return (predicted @ self._display_to_world.T).unflatten(0, leading)

    def export(self) -> nn.Module:
        hidden = _exported(self.from_features)
        given = None if self.from_given is None else _exported(self.from_given)
        pool = None if self.pool is None else self._max
        return _ExportedHead(hidden, given, pool, _exported(self.last), self._given_to_display, self._display_to_world)


class _ExportedHead(nn.Module):
    """A head as plain layers over single points: features [B, F] and given fields [B, A] -> predictions [B, P]."""

    _given_to_display: Tensor
    _display_to_world: Tensor

    def __init__(
        self,
        from_features: nn.Module,
        from_given: nn.Module | None,
        pool: nn.Module | None,
        last: nn.Module,
        given_to_display: Tensor,
        display_to_world: Tensor,
    ) -> None:
        super().__init__()
        self.from_features, self.from_given, self.pool, self.last = from_features, from_given, pool, last
        self.register_buffer("_given_to_display", given_to_display.clone())
        self.register_buffer("_display_to_world", display_to_world.clone())

    def forward(self, features: Float[Tensor, "B F"], given: Float[Tensor, "B A"] | None = None) -> Tensor:
        hidden = self.from_features(features[..., None, None])
        if self.from_given is not None and given is not None:
            hidden = hidden + self.from_given((given @ self._given_to_display.T)[..., None, None])
        hidden = torch.relu(hidden)
        if self.pool is not None:
            hidden = self.pool(hidden)
        return self.last(hidden).flatten(1) @ self._display_to_world.T


class _MaxOfFields(nn.Module):
    """What group pooling is, [B, fields * size, 1, 1] -> [B, fields, 1, 1]; e2cnn exports it as a module of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, channels: Float[Tensor, "B C 1 1"]) -> Float[Tensor, "B fields 1 1"]:
        return channels.unflatten(1, (-1, self._size)).amax(dim=2)


@functools.cache
def _space(group: str) -> gspaces.GSpace:
    parsed = Group.parse(group)
    if parsed.reflections:
        # About the displayed x axis, as e2cnn's irrep (1, 1) has it: about another, that irrep is in a turned frame.
        return gspaces.FlipRot2dOnR2(parsed.order, axis=0.0)
    return gspaces.Rot2dOnR2(parsed.order)


def _regular(space: gspaces.GSpace, fields: int) -> enn.FieldType:
    return enn.FieldType(space, fields * [space.regular_repr])


def _type(space: gspaces.GSpace, kinds: Sequence[Kind]) -> enn.FieldType:
    """Vectors are irrep 1. Under rotations alone a pseudoscalar is as invariant as a scalar."""
    if isinstance(space, gspaces.FlipRot2dOnR2):  # irreps of D_N: (whether a reflection shows, frequency)
        vector, pseudoscalar = space.irrep(1, 1), space.irrep(1, 0)
    else:
        vector, pseudoscalar = space.irrep(1), space.trivial_repr
    irreps = {Kind.SCALAR: space.trivial_repr, Kind.VECTOR: vector, Kind.PSEUDOSCALAR: pseudoscalar}
    return enn.FieldType(space, [irreps[kind] for kind in kinds])


class _Conv(enn.R2Conv):
    """An R2Conv that computes faster what e2cnn's computes; tests compare them.

    Wide layers are convolved by their harmonics (training.networks.harmonic). Otherwise the filter is expanded faster,
    in the memory format in which it is used: e2cnn gives [O, I, k, k] with k last, which a channels-last convolution
    copies on its way in, forward and backward. Over an image of the filter's size, which leaves one point, it is a
    matrix product, in a third of the time.
    """

    def __init__(self, of: enn.FieldType, to: enn.FieldType, size: int, **options: Any) -> None:
        super().__init__(of, to, size, **options)
        expansion = self.basisexpansion
        self._alike = expansion._n_pairs == 1  # one kind of field in, one out: every pair of fields has the same basis
        self._harmonics = None
        if self._alike:
            (pair,) = expansion._representations_pairs
            basis = getattr(expansion, f"block_expansion_{pair}").sampled_basis  # [n, o, i, k * k]
            self._shape = (len(to), len(of), *basis.shape[1:])
            self.register_buffer("_basis", basis.permute(1, 3, 2, 0).flatten(0, 2).contiguous(), persistent=False)
            regular = of.gspace.regular_repr
            if size == harmonic.SIZE and of.representations[0] == to.representations[0] == regular:
                if of.gspace not in _HARMONICS:
                    _HARMONICS[of.gspace] = Harmonics(basis, regular)
                self._harmonics = copy.deepcopy(_HARMONICS[of.gspace])
        self.train()  # else its caches for evaluation, all zeros, are four fifths of a checkpoint

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *how: Any) -> None:
        for cache in ("filter", "expanded_bias"):  # of checkpoints that still have them
            state_dict.pop(prefix + cache, None)
        super()._load_from_state_dict(state_dict, prefix, *how)

    def forward(self, input: enn.GeometricTensor) -> enn.GeometricTensor:
        image = input.tensor
        if not self.padding and image.shape[-1] == self.kernel_size:
            filter, bias = self.expand_parameters() if self.training else (self.filter, self.expanded_bias)
            points, matrix = (last.permute(0, 2, 3, 1).flatten(1) for last in (image, filter))
            return enn.GeometricTensor(nn.functional.linear(points, matrix, bias)[..., None, None], self.out_type)
        if self._harmonics is not None and self._pay(self._harmonics, image):
            made = self._harmonics.convolve(image, self.weights.view(*self._shape[:2], -1), self.padding)
            return enn.GeometricTensor(made + (self.bias_expansion @ self.bias)[:, None, None], self.out_type)
        return super().forward(input)

    def _pay(self, harmonics: Harmonics, image: Tensor) -> bool:
        measured = image.device.type == "cpu" and not torch.is_autocast_enabled("cpu")  # elsewhere rates are others
        trained = torch.is_grad_enabled() and (self.weights.requires_grad or image.requires_grad)
        return self.training and measured and harmonics.pays(self._shape[0], trained)

    def expand_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The filter [O, I, k, k], channels last, and the bias [O]."""
        if not self._alike:
            with torch.autocast(self.weights.device.type, enabled=False):  # a GPU puts no bfloat16 among float32
                return super().expand_parameters()
        to, of, o, i, k = self._shape
        blocks = torch.matmul(self._basis, self.weights.view(to, of, -1).mT)  # [to, o * k * i, of]
        last = blocks.view(to, o * k, i, of).mT.reshape(to * o, self.kernel_size, self.kernel_size, of * i)
        return last.permute(0, 3, 1, 2), None if self.bias is None else self.bias_expansion @ self.bias


def _conv(of: enn.FieldType, to: enn.FieldType, size: int, **options: Any) -> enn.R2Conv:
    """A convolution with e2cnn's own initialisation, computed once for layers that are alike."""
    conv = _Conv(of, to, size, initialize=False, **options)
    # Not e2cnn's cache: its key hashes the basis by ndarray.tostring, which numpy 2.3 removed.
    if (of, to, size) not in _SPREADS:
        _SPREADS[of, to, size] = _generalized_he_init_variances(conv.basisexpansion)
    conv.weights.data = _SPREADS[of, to, size] * torch.randn_like(conv.weights)
    return conv


def _to_display(spec: ObservationSpec, kinds: Sequence[Kind]) -> Tensor:
    """World components -> those of the displayed image, where e2cnn's irrep 1 lives: x along columns, y up the rows."""
    planar = np.array([spec.col_axis, -np.array(spec.row_axis)], np.float32)
    blocks = [torch.from_numpy(planar) if kind is Kind.VECTOR else torch.eye(1) for kind in kinds]
    return torch.block_diag(*blocks)


def _points(values: Float[Tensor, "B C"], field_type: enn.FieldType) -> enn.GeometricTensor:
    """Vectors of values as fields over a single point."""
    return enn.GeometricTensor(values[..., None, None], field_type)


def _exported(layer: enn.EquivariantModule) -> nn.Module:
    # e2cnn caches the expanded filters when it enters eval mode: entering anew picks up the present weights.
    layer.train()
    layer.eval()
    exported = layer.export()
    layer.train()
    return exported
