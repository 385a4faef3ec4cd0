"""A steerable convolution by way of the group's irreps: a sixth of the multiplications for C8, a twelfth for C16.

A filter from F regular fields to F' is a mixture of n basis filters, the same for every pair of fields, so

    conv(w, x) = S . w' . (A * x)

    A  analysis   a few fixed filters, alike for every field in: what of an image the basis can see
    w' mixing     the weights, block by block: what an irrep of the output takes from its own features
    S  synthesis  irreps back to the regular representation

C8 and 3x3: 48 features of a field's 72 numbers, in 4 blocks of 12 that make 2 rows each. A pair of fields costs
4 * 12 * 2 = 96 multiplications a pixel instead of 8 * 8 * 9, the analysis of a field 48 * 8 * 9, so it pays where many
fields come out. (Irreps of a steerable filter: Weiler and Cesa, arXiv 1911.08251.)
"""

import numpy as np
import torch
from e2cnn.group import Representation
from jaxtyping import Float
from torch import Tensor, nn

SIZE = 3
"""The filters' side."""
_ANALYSIS, _MIXING = 3.5, 1.3
"""What a multiplication takes here, of one in a plain convolution: measured with fp32 on two CPUs, for C8."""


class Harmonics(nn.Module):
    """What convolutions between regular fields of one group share: A, S, and how weights become w'."""

    analysis: Tensor
    mixing: Tensor
    synthesis: Tensor

    def __init__(self, basis: Float[Tensor, "n G G kk"], regular: Representation) -> None:
        """`basis`: e2cnn's sampled filters from one field to one field."""
        super().__init__()
        order = regular.size
        to_irreps = torch.from_numpy(np.linalg.inv(regular.change_of_basis))
        seen = torch.einsum("rg,ngik->nrik", to_irreps, basis.double()).flatten(2)  # an irrep's row, of a field's patch
        analysis, mixing = [], []
        blocks = _blocks(regular)
        for rows in blocks:
            needed = seen[:, rows]
            _, strength, features = torch.linalg.svd(needed.flatten(0, 1), full_matrices=False)
            features = features[strength > 1e-6 * strength[0]]
            analysis.append(features)
            mixing.append(needed @ features.T)
        self.register_buffer("analysis", torch.cat(analysis).view(-1, order, SIZE, SIZE).float(), persistent=False)
        self.register_buffer("mixing", torch.stack(mixing, dim=1).float(), persistent=False)  # [n, blocks, rows, each]
        synthesis = torch.from_numpy(regular.change_of_basis)[:, [row for rows in blocks for row in rows]]
        self.register_buffer("synthesis", synthesis.float(), persistent=False)

    def pays(self, fields: int, trained: bool) -> bool:
        """Whether this is faster than a plain convolution to so many fields, on a CPU in fp32."""
        order, (_, blocks, rows, each) = len(self.synthesis), self.mixing.shape
        analysis = _ANALYSIS * len(self.analysis) * order * SIZE**2 * (2 if trained else 1)  # and x's gradient
        passes = fields * (3 if trained else 1)
        return analysis + passes * _MIXING * blocks * rows * each < passes * order**2 * SIZE**2

    def convolve(
        self, image: Float[Tensor, "B I H W"], weights: Float[Tensor, "O I n"], padding: int
    ) -> Float[Tensor, "B O H2 W2"]:
        """`image` of I regular fields, `weights` of every pair of fields -> O regular fields, channels last."""
        (to, of, _), (_, blocks, rows, each) = weights.shape, self.mixing.shape
        mixed = (weights @ self.mixing.flatten(1)).view(to, of, blocks, rows, each)
        mixed = mixed.permute(2, 3, 0, 4, 1).reshape(blocks, rows * to, each * of)
        # The fields of an image lie below one another, so that the group's elements are all there is of channels. With
        # padding a row of zeros parts them; without, the rows at which two of them met are left out at the end.
        fields = image.unflatten(1, (of, -1)).transpose(1, 2)
        tall = nn.functional.pad(fields, (0, 0, 0, padding)).flatten(2, 3)
        features = nn.functional.conv2d(tall, self.analysis, padding=(1, padding))
        pixels = features.unflatten(1, (blocks, -1)).unflatten(3, (of, -1))  # [B, blocks, each, I, H + padding, W2]
        irreps = mixed @ pixels.flatten(2, 3).flatten(3)
        regular = self.synthesis @ irreps.unflatten(2, (rows, to)).flatten(1, 2).flatten(2)
        whole = regular.unflatten(2, (to, *pixels.shape[-2:]))
        height = image.shape[2]
        whole = whole[..., :height, :] if padding else whole[..., 1 : height - 1, :]
        return whole.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)


def _blocks(regular: Representation) -> list[list[int]]:
    """Rows of the irreps that see the same features: those of one kind, and all that have one dimension."""
    blocks: dict[str, list[int]] = {}
    start = 0
    for name in regular.irreps:
        size = regular.group.irreps[name].size
        blocks.setdefault(name if size > 1 else "one-dimensional", []).extend(range(start, start + size))
        start += size
    return list(blocks.values())
