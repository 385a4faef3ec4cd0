"""Every broken export is refused, each by the proof that is there for it, and the message says what was found."""

from dataclasses import replace

import numpy as np
import pytest

from protos.manifest import Golden
from protos.spaces import OBSERVATION, PolicySpec
from protos.symmetry import QUARTER_TURNS
from serving.errors import PolicyRefused
from serving.policy import load
from serving.proofs import prove
from tests.makers import ACTION, random_golden, scene, small_spec, tiny_policy_file

REFUSED = [
    # (switches, golden pairs from, proofs that fail, words of the diagnosis)
    (["transposed"], "healthy", {"golden", "symmetry"}, "the image transposed"),
    (["transposed"], "broken", {"symmetry"}, "turns against the scene: image mirrored or transposed?"),
    (["mirrored"], "healthy", {"golden", "symmetry"}, "the image mirrored left to right"),
    (["mirrored"], "broken", {"symmetry"}, "turns against the scene: image mirrored or transposed?"),
    (["transposed", "mirrored"], "healthy", {"golden"}, "the image turned by"),
    (["gripper_dead"], "healthy", {"golden", "gripper"}, "gripper channel is dead"),
    (["gripper_dead"], "broken", {"gripper"}, "gripper channel is dead"),
    (["lopsided"], "broken", {"symmetry"}, "does not turn with the scene"),
    (["still"], "broken", {"symmetry"}, "inconclusive"),
    (["scaled"], "healthy", {"golden"}, "in d"),
    (["scaled"], "broken", {"golden"}, "in d"),  # action and normalized_action contradict each other
    (["crowded"], "broken", {"golden"}, "one by one: an answer depends on what else is in the batch"),
    (["nan"], "healthy", {"finite"}, "NaN or infinity in action, normalized"),
    (["nan_std"], "broken", {"finite"}, "NaN or infinity in std"),
    (["nan_value"], "broken", {"finite"}, "NaN or infinity in value"),
]


@pytest.mark.parametrize(("switches", "golden_from", "proofs", "words"), REFUSED)
def test_broken_exports_are_refused_and_told_why(tmp_path, switches, golden_from, proofs, words):
    policy = load(tiny_policy_file(tmp_path / "p.onnx", breaks=switches, golden_from=golden_from))
    with pytest.raises(PolicyRefused) as refused:
        prove(policy)
    assert {reason.field for reason in refused.value.reasons} == {f"proof.{name}" for name in proofs}
    assert words in str(refused.value)
    assert "p.onnx" in str(refused.value)


@pytest.mark.parametrize("spec", [small_spec(), PolicySpec(OBSERVATION, ACTION)], ids=["32", "128"])
def test_a_faithful_export_passes_all_three(tmp_path, spec):
    proofs = prove(load(tiny_policy_file(tmp_path / "p.onnx", spec))).proofs
    assert [p.name for p in proofs] == ["golden", "symmetry", "gripper"]
    assert proofs[0].measured <= 1e-5
    assert proofs[1].measured <= 1e-4


@pytest.mark.parametrize("turn", QUARTER_TURNS, ids=str)
def test_action_turns_with_the_scene(policy, turn):
    before, after = policy.act(scene(5)).action, policy.act(turn.observation(scene(5), policy.spec.observation)).action
    expected = turn.action(before - ACTION.centre, ACTION) + ACTION.centre
    np.testing.assert_allclose(after, expected, atol=1e-4 * ACTION.scale.min())


@pytest.mark.parametrize("changed", [{"equivariance": "none"}, {"equivariance": "critic"}, {"group": "C2"}], ids=str)
def test_the_symmetry_proof_is_asked_only_of_those_who_claim_it(tmp_path, changed):
    file = tiny_policy_file(tmp_path / "p.onnx", breaks=["lopsided"], golden_from="broken", **changed)
    (symmetry,) = [p for p in prove(load(file)).proofs if p.name == "symmetry"]
    assert symmetry.detail.startswith("not applicable")


def test_a_plain_policy_read_wrongly_is_caught_by_its_golden_pairs(tmp_path):
    file = tiny_policy_file(tmp_path / "p.onnx", breaks=["mirrored"], equivariance="none")
    with pytest.raises(PolicyRefused, match="mirrored left to right"):
        prove(load(file))


def test_an_actor_cannot_declare_its_way_around_the_proof(tmp_path):
    file = tiny_policy_file(tmp_path / "p.onnx", breaks=["transposed"], golden_from="broken", equivariance_error_90=2.0)
    with pytest.raises(PolicyRefused, match=r"a declared error of at most 0\.01"):
        prove(load(file))


def test_a_dihedral_claim_includes_the_reflection(tmp_path):
    """The tiny policy's yaw does not change sign under a reflection."""
    with pytest.raises(PolicyRefused, match=r"in dtheta; the policy does not turn with the scene"):
        prove(load(tiny_policy_file(tmp_path / "p.onnx", group="D4")))


def test_golden_pairs_that_differ_are_refused(tmp_path):
    file = tiny_policy_file(tmp_path / "p.onnx", golden=random_golden(small_spec()))
    with pytest.raises(PolicyRefused, match=r"proof\.golden"):
        prove(load(file))


def test_golden_observations_must_be_twins(tmp_path, policy):
    golden = policy.manifest.golden
    alone = Golden(golden.depth[1:2], golden.gripper[1:2], golden.action[1:2])
    with pytest.raises(PolicyRefused, match=r"proof\.gripper: expected golden observations in twins"):
        prove(load(tiny_policy_file(tmp_path / "p.onnx", golden=alone)))


def test_a_policy_that_fails_while_it_is_proved_is_refused_like_any_other(policy):
    class Session:
        get_outputs = policy.session.get_outputs

        def run(self, *_):
            raise RuntimeError("not with a batch of 8")

    with pytest.raises(PolicyRefused, match=r"proof\.runs.*not with a batch of 8"):
        prove(replace(policy, session=Session()))
