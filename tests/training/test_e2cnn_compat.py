"""Each repair of e2cnn is needed today, and works; a repair whose break is gone fails here and can be removed."""

import importlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from training.networks.e2cnn_compat import mend

WITHOUT = """
import json, warnings
warnings.simplefilter("ignore")
import numpy
import e2cnn.kernels.utils as utils
from tests.training.test_e2cnn_compat import dihedral_layer, hashes, last_layer_of_a_critic
from training.networks.e2cnn_compat import mend

def error(build):
    try:
        build()
        return "none"
    except Exception as error:
        return str(error)

mask, (one, other) = error(last_layer_of_a_critic), hashes()
mend()
utils.np = numpy
print(json.dumps({"mask": mask, "same hash": one == other, "copy": error(dihedral_layer)}))
"""
"""In a process of its own: any other may have mended e2cnn already."""


def last_layer_of_a_critic() -> None:
    from e2cnn import gspaces, nn

    space = gspaces.Rot2dOnR2(8)
    nn.R2Conv(nn.FieldType(space, [space.regular_repr]), nn.FieldType(space, [space.trivial_repr]), 1)


def dihedral_layer() -> None:
    from e2cnn import gspaces, nn

    space = gspaces.FlipRot2dOnR2(4)
    nn.R2Conv(nn.FieldType(space, [space.regular_repr]), nn.FieldType(space, [space.irrep(1, 1)]), 3)


def hashes() -> list[int]:
    """Of two bases with the same numbers."""
    from e2cnn import gspaces, nn

    space = gspaces.Rot2dOnR2(4)
    field = nn.FieldType(space, [space.regular_repr])
    bases = [nn.R2Conv(field, field, 3).basisexpansion for _ in range(2)]  # both alive, or an id might serve twice
    return [hash(basis) for basis in bases]


@pytest.fixture(scope="module")
def without() -> dict[str, Any]:
    """What e2cnn does by itself and, of "copy", with the other repairs."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_without_the_mask_repair_a_1x1_layer_to_scalars_cannot_be_built(without: dict[str, Any]) -> None:
    assert "boolean masks" in without["mask"]


def test_with_it_the_layer_is_built() -> None:
    mend()
    last_layer_of_a_critic()


def test_without_the_copy_repair_dihedral_groups_cannot_be_built(without: dict[str, Any]) -> None:
    assert "Unable to avoid copy" in without["copy"]


def test_with_it_dihedral_groups_are_built() -> None:
    mend()
    dihedral_layer()


def test_without_the_hash_repair_walking_over_parameters_reads_every_basis(without: dict[str, Any]) -> None:
    assert without["same hash"]


def test_with_it_a_basis_is_hashed_as_any_module_is() -> None:
    mend()
    one, other = hashes()
    assert one != other


@pytest.mark.parametrize(("name", "module"), [("np", "e2cnn.kernels.utils")])
def test_a_repair_stays_inside_the_module_it_is_for(name: str, module: str) -> None:
    mend()
    mend()
    patched: Any = getattr(importlib.import_module(module), name)
    values = np.arange(3)
    assert patched.array(values, copy=False) is values
    with pytest.raises(ValueError, match="copy"):
        np.array([1, 2], copy=False)


def test_no_network_is_built_with_a_warning() -> None:
    build = "from tests.training.conftest import NETWORK, SMALL; from training.networks.roles import make_critic"
    script = f"{build}; make_critic(NETWORK, SMALL, frozenset(('critic',)))"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], check=True)
