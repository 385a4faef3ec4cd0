"""Each repair of e2cnn is needed today, and works; a repair whose break is gone fails here and can be removed."""

import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from training.networks.e2cnn_compat import mend

BUILD_A_CRITIC_S_LAST_LAYER = """
import warnings; warnings.simplefilter("ignore")
from e2cnn import gspaces, nn
space = gspaces.Rot2dOnR2(8)
nn.R2Conv(nn.FieldType(space, [space.regular_repr]), nn.FieldType(space, [space.trivial_repr]), 1)
"""
BUILD_A_DIHEDRAL_LAYER = """
import warnings; warnings.simplefilter("ignore")
import training.networks.e2cnn_compat as compat
from e2cnn import gspaces, nn
import e2cnn.kernels.utils as utils, numpy
{}
space = gspaces.FlipRot2dOnR2(4)
nn.R2Conv(nn.FieldType(space, [space.regular_repr]), nn.FieldType(space, [space.irrep(1, 1)]), 3)
"""

COMPARE_HASHES = """
import warnings; warnings.simplefilter("ignore")
{}
from e2cnn import gspaces, nn
space = gspaces.Rot2dOnR2(4)
field = nn.FieldType(space, [space.regular_repr])
one, other = (nn.R2Conv(field, field, 3).basisexpansion for _ in range(2))
print(hash(one) == hash(other))
"""


def runs(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_the_mask_repair_a_1x1_layer_to_scalars_cannot_be_built() -> None:
    assert "boolean masks" in runs(BUILD_A_CRITIC_S_LAST_LAYER).stderr


def test_with_it_the_layer_is_built() -> None:
    mended = "from training.networks.e2cnn_compat import mend; mend()\n" + BUILD_A_CRITIC_S_LAST_LAYER
    assert runs(mended).returncode == 0


def test_without_the_copy_repair_dihedral_groups_cannot_be_built() -> None:
    only_masks = "compat.mend(); utils.np = numpy"
    assert "copy" in runs(BUILD_A_DIHEDRAL_LAYER.format(only_masks)).stderr


def test_with_it_dihedral_groups_are_built() -> None:
    assert runs(BUILD_A_DIHEDRAL_LAYER.format("compat.mend()")).returncode == 0


def test_without_the_hash_repair_walking_over_parameters_reads_every_basis() -> None:
    assert runs(COMPARE_HASHES.format("")).stdout == "True\n"


def test_with_it_a_basis_is_hashed_as_any_module_is() -> None:
    mended = "from training.networks.e2cnn_compat import mend; mend()"
    assert runs(COMPARE_HASHES.format(mended)).stdout == "False\n"


@pytest.mark.parametrize(("name", "module"), [("np", "e2cnn.kernels.utils")])
def test_a_repair_stays_inside_the_module_it_is_for(name: str, module: str) -> None:
    mend()
    mend()
    patched: Any = getattr(importlib.import_module(module), name)
    values = np.arange(3)
    assert patched.array(values, copy=False) is values
    with pytest.raises(ValueError, match="copy"):
        np.array([1, 2], copy=False)
