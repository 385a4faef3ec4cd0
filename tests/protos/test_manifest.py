"""A manifest comes back whole; one that is incomplete or damaged is refused, and no other error escapes."""

import base64
import contextlib
import io
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import Rejected
from protos.manifest import GOLDEN_KEY, MANIFEST_KEY, Golden, Manifest
from tests.makers import random_golden, small_spec, tiny_manifest

SPEC = small_spec(8)
MANIFEST = tiny_manifest(SPEC, random_golden(SPEC))
METADATA = MANIFEST.to_metadata()
PLAIN = json.loads(METADATA[MANIFEST_KEY])
NPZ = base64.b64decode(METADATA[GOLDEN_KEY])


def with_plain(**changed):
    return {**METADATA, MANIFEST_KEY: json.dumps({**PLAIN, **changed})}


def with_golden(**changed):
    arrays = {f.name: getattr(MANIFEST.golden, f.name) for f in fields(Golden)} | changed
    packed = io.BytesIO()
    np.savez(packed, **{name: array for name, array in arrays.items() if array is not None})
    return {**METADATA, GOLDEN_KEY: base64.b64encode(packed.getvalue()).decode()}


def test_round_trip():
    back = Manifest.from_metadata(METADATA)
    for field in fields(Manifest):
        if field.name != "golden":
            assert getattr(back, field.name) == getattr(MANIFEST, field.name)
    for field in fields(Golden):
        np.testing.assert_array_equal(getattr(back.golden, field.name), getattr(MANIFEST.golden, field.name))


def test_metadata_is_reproducible():
    """Of equal manifests it is the same, golden pairs included."""
    assert tiny_manifest(SPEC, random_golden(SPEC)).to_metadata() == METADATA


@pytest.mark.parametrize("key", [MANIFEST_KEY, GOLDEN_KEY])
def test_a_missing_part_is_named(key):
    with pytest.raises(Rejected, match=key):
        Manifest.from_metadata({k: v for k, v in METADATA.items() if k != key})


@pytest.mark.parametrize("key", sorted(set(PLAIN) - {"evaluation"}))
def test_every_missing_key_is_refused(key):
    plain = {k: v for k, v in PLAIN.items() if k != key}
    with pytest.raises(Rejected, match=key):
        Manifest.from_metadata({**METADATA, MANIFEST_KEY: json.dumps(plain)})


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"contract": "{}"},
        {"contract": small_spec(16).to_json()},
        {"contract": 3},
        {"contract_digest": "0" * 64},
        {"contract_digest": None},
        {"group": "Z8"},
        {"group": 8},
        {"task": ""},
        {"task": 1},
        {"equivariance": "bth"},
        {"equivariance": None},
        {"seed": -1},
        {"seed": "3"},
        {"seed": 2**64},
        {"task": "\ud800"},
        {"equivariance_error_90": float("nan")},
        {"equivariance_error_90": "small"},
        {"equivariance_error_45": -1.0},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_every_corrupt_key_is_refused(changed):
    with pytest.raises(Rejected):
        Manifest.from_metadata(with_plain(**changed))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "3", "[" * 5000])
def test_other_json_is_refused(text):
    with pytest.raises(Rejected, match=r"equiserve\.manifest"):
        Manifest.from_metadata({**METADATA, MANIFEST_KEY: text})


@pytest.mark.parametrize(
    "changed",
    [
        {"depth": None},
        {"depth": MANIFEST.golden.depth[:, :4]},
        {"depth": MANIFEST.golden.depth.astype(np.float64)},
        {"gripper": MANIFEST.golden.gripper[:2]},
        {"action": MANIFEST.golden.action[:, :4]},
        {"action": np.full_like(MANIFEST.golden.action, np.nan)},
        {name: getattr(MANIFEST.golden, name)[:0] for name in ("depth", "gripper", "action")},
        {"action": np.array([{"pickled": True}], dtype=object)},
    ],
)
def test_corrupt_golden_pairs_are_refused(changed):
    with pytest.raises(Rejected, match=r"equiserve\.golden"):
        Manifest.from_metadata(with_golden(**changed))


def test_an_array_is_no_npz():
    packed = io.BytesIO()
    np.save(packed, np.zeros(3))
    with pytest.raises(Rejected, match=r"equiserve\.golden"):
        Manifest.from_metadata({**METADATA, GOLDEN_KEY: base64.b64encode(packed.getvalue()).decode()})


@given(st.integers(0, len(NPZ) - 1), st.integers(1, 255), st.integers(0, len(NPZ)))
def test_damaged_golden_bytes_give_arrays_or_a_refusal(place, flip, length):
    damaged = bytearray(NPZ)
    damaged[place] ^= flip
    with contextlib.suppress(Rejected):
        Manifest.from_metadata({**METADATA, GOLDEN_KEY: base64.b64encode(bytes(damaged[:length])).decode()})


@pytest.mark.parametrize(("roles", "expected"), [("both", True), ("actor", True), ("critic", False), ("none", False)])
def test_which_policies_claim_an_equivariant_actor(roles, expected):
    assert replace(MANIFEST, equivariance=roles).actor_is_equivariant is expected
