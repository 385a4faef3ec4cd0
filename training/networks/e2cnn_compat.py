"""Repairs to e2cnn 0.2.3 for today's numpy and torch; `training.networks.steerable` calls `mend` before it builds.

Each repair replaces names inside one e2cnn module or class; site-packages stays as it is. Remove a repair when upstream
has it.
`ndarray.tostring`, gone since numpy 2.3, cannot be put back on a C type: pyproject.toml caps numpy instead.
"""

import functools
import types
from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Apply the repairs. Calling it again changes nothing."""
    from e2cnn.kernels import utils
    from e2cnn.nn.modules.r2_conv import basisexpansion_blocks as blocks
    from e2cnn.nn.modules.r2_conv import basisexpansion_singleblock as singleblock

    # A basis with one element (a 1x1 convolution to trivial fields) is indexed with a uint8 mask, which torch refuses.
    singleblock.torch = _Overlay(torch, tensor=_boolean_mask, uint8=torch.bool)
    # Without `indexing`, meshgrid means "ij", and warns at every command's start.
    blocks.torch = _Overlay(torch, meshgrid=functools.partial(torch.meshgrid, indexing="ij"))
    # np.array(x, copy=False) meant "copy if needed" before numpy 2; dihedral groups with a standard irrep rely on it.
    utils.np = _Overlay(np, array=_copy_if_needed)
    # A basis is hashed by its numbers, and torch hashes every module at each parameters(): 20 ms for a critic.
    for basis in (blocks.BlocksBasisExpansion, singleblock.SingleBlockBasisExpansion):
        basis.__hash__ = object.__hash__


class _Overlay(types.ModuleType):
    """A module with some names replaced, for one importer alone."""

    def __init__(self, module: types.ModuleType, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _boolean_mask(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    made = torch.tensor(data, *args, **kwargs)
    return made.bool() if made.dtype is torch.uint8 else made


def _copy_if_needed(data: Any, *args: Any, copy: bool | None = True, **kwargs: Any) -> Any:
    return np.array(data, *args, copy=copy or None, **kwargs)
