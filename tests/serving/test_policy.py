"""Loading a file: complete and consistent, or refused with the file, what was expected, what came and what to do."""

import hashlib
from dataclasses import replace
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from protos.manifest import GOLDEN_KEY, MANIFEST_KEY
from protos.spaces import ACTION, SCALAR, VECTOR, ActionSpec, Field, PolicySpec
from serving.errors import PolicyRefused
from serving.policy import load
from tests.makers import far_scene, scene, small_spec, tiny_manifest, tiny_policy_file


def test_a_version_is_the_hash_of_the_bytes(healthy, policy):
    assert policy.sha256 == hashlib.sha256(healthy.read_bytes()).hexdigest()
    assert policy.version == policy.sha256[:12]


def test_the_name_is_the_task_unless_given(healthy):
    assert load(healthy).name == "tiny"
    assert load(healthy, "door").name == "door"


def test_a_batch_is_its_observations_one_by_one(policy):
    scenes = [scene(seed, gripper=float(seed % 2)) for seed in range(19)]
    batch = policy.act_batch(np.stack([s.depth for s in scenes]), np.array([s.gripper for s in scenes], np.float32))
    singles = [policy.act(s) for s in scenes]
    np.testing.assert_allclose(batch.action, [s.action for s in singles], atol=1e-6)
    np.testing.assert_allclose(batch.value, [s.value for s in singles], atol=1e-6)
    assert batch.std.shape == (19, ACTION.size)


def test_a_non_finite_answer_is_not_sound(tmp_path):
    policy = load(tiny_policy_file(tmp_path / "p.onnx", breaks=["nan_when_far"]))
    assert policy.act(scene(0)).sound
    assert not policy.act(far_scene()).sound


def refusal_of(path):
    with pytest.raises(PolicyRefused) as refused:
        load(path)
    assert str(path) in str(refused.value)
    (reason,) = refused.value.reasons
    return reason


def test_a_missing_file(tmp_path):
    assert "No such file" in refusal_of(tmp_path / "none.onnx").got


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a", bytes(1000), b"PK\x03\x04 a zip"])
def test_other_files(tmp_path, content):
    path = tmp_path / "p.onnx"
    path.write_bytes(content)
    reason = refusal_of(path)
    assert reason.field == "file"
    assert f"{len(content)} bytes" in reason.got
    assert "copy the file again" in reason.remedy


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, healthy, share):
    path, content = tmp_path / "p.onnx", healthy.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refusal_of(path)


def test_weights_in_another_file_even_from_its_own_folder(tmp_path, healthy, monkeypatch):
    """onnxruntime would look in the current directory, and the version's hash would not cover the weights."""
    path = tmp_path / "p.onnx"
    onnx.save(onnx.load(healthy), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    monkeypatch.chdir(tmp_path)
    assert ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])  # by default it would load
    reason = refusal_of(path)
    assert reason.expected == "all weights inside the file"
    assert "external_data=False" in reason.remedy


@pytest.mark.parametrize("key", [MANIFEST_KEY, GOLDEN_KEY])
def test_missing_metadata(tmp_path, policy, key):
    metadata = {k: v for k, v in policy.manifest.to_metadata().items() if k != key}
    assert refusal_of(tiny_policy_file(tmp_path / "p.onnx", metadata=metadata)).field == key


@pytest.mark.parametrize("within", [False, True])
def test_operators_of_its_own_that_it_does_not_declare(tmp_path, healthy, within):
    """The runtime takes its own even then; in a branch, too."""
    model = onnx.load(healthy)
    own = helper.make_node("Gelu", ["normalized_action"], ["extra"], domain="com.microsoft")
    if within:
        graph = helper.make_graph([own], "branch", [], [])
        own = helper.make_node("If", ["depth"], ["extra"], then_branch=graph, else_branch=graph)
    model.graph.node.append(own)
    (tmp_path / "p.onnx").write_bytes(model.SerializeToString())
    assert "com.microsoft" in refusal_of(tmp_path / "p.onnx").got


def test_no_metadata_at_all(tmp_path):
    assert refusal_of(tiny_policy_file(tmp_path / "p.onnx", metadata={})).field == MANIFEST_KEY


def test_another_contracts_graph(tmp_path):
    """The metadata speaks of 16 x 16 pixels, the graph takes 32 x 32."""
    spec = small_spec(16)
    donor = load(tiny_policy_file(tmp_path / "donor.onnx", spec)).manifest
    reason = refusal_of(tiny_policy_file(tmp_path / "p.onnx", metadata=donor.to_metadata()))
    assert reason.field == "input depth"
    assert "16, 16" in reason.expected
    assert "32, 32" in reason.got


def test_components_that_the_wire_does_not_have(tmp_path, policy):
    fields = (*ACTION.fields[:3], Field("roll", ("droll",), SCALAR, limit=1.0, unit="rad"))
    spec = PolicySpec(small_spec().observation, ActionSpec(fields))
    metadata = tiny_manifest(spec, policy.manifest.golden).to_metadata()
    reason = refusal_of(tiny_policy_file(tmp_path / "p.onnx", metadata=metadata))
    assert reason.field == "contract.action"
    assert "droll" in reason.got


GRIPPER, PLANAR, LIFT, YAW = ACTION.fields


@pytest.mark.parametrize(
    ("fields", "unbound"),
    [
        # It would be taken for a command, and a hold would repeat it.
        ((GRIPPER, PLANAR, Field("lift", ("dz",), SCALAR, low=-0.05, high=0.02, unit="m"), YAW), "lift"),
        # A hold would close an empty hand.
        ((Field("gripper", ("p",), SCALAR, limit=1.0, unit="1"), PLANAR, LIFT, YAW), "gripper"),
        # Its bound would be the length of a step, of which there is none.
        ((GRIPPER, PLANAR, LIFT, replace(YAW, name="step_m")), "step_m"),
        # No translation, so no floor, and no rotation either.
        ((GRIPPER, PLANAR, Field("both", ("dz", "dtheta"), VECTOR, limit=1.0, unit="m")), "both"),
        ((GRIPPER, PLANAR, replace(LIFT, unit="mm"), YAW), "lift"),
        ((GRIPPER, PLANAR, LIFT, replace(YAW, unit="deg")), "yaw"),
    ],
    ids=["interval", "limited command", "taken name", "mixed", "millimetres", "degrees"],
)
def test_what_no_envelope_would_keep_within_a_limit(tmp_path, policy, fields, unbound):
    spec = PolicySpec(small_spec().observation, ActionSpec(fields))
    metadata = tiny_manifest(spec, policy.manifest.golden).to_metadata()
    reason = refusal_of(tiny_policy_file(tmp_path / "p.onnx", metadata=metadata))
    assert (reason.field, reason.got) == ("contract.action", unbound)


def test_an_error_without_a_text_is_a_refusal(healthy, monkeypatch):
    monkeypatch.setattr("serving.policy.ort.InferenceSession", mock.Mock(side_effect=MemoryError()))
    assert "MemoryError" in refusal_of(healthy).got


def _edited(healthy, path, edit):
    model = onnx.load(healthy)
    edit(model.graph)
    onnx.save(model, path)
    return path


def _rename_output(graph):
    graph.output[0].name = "actions"
    next(n for n in graph.node if n.output[0] == "action").output[0] = "actions"


def _fix_batch(graph):
    for tensor in (*graph.input, *graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1


def _half_precision(graph):
    graph.node.append(helper.make_node("Cast", ["std"], ["std16"], to=TensorProto.FLOAT16))
    graph.output.append(helper.make_tensor_value_info("std16", TensorProto.FLOAT16, ["B", 5]))


def _narrow_std(graph, *then):
    """Two of five columns, by an operator whose output shape nothing but a run can tell."""
    node = next(n for n in graph.node if n.output[0] == "std")
    node.output[0] = "full"
    graph.initializer.append(helper.make_tensor("kept", TensorProto.BOOL, [5], [True, True, False, False, False]))
    graph.node.append(helper.make_node("Compress", ["full", "kept"], ["narrow" if then else "std"], axis=1))
    graph.node.extend(then)
    std = next(o for o in graph.output if o.name == "std")
    std.type.tensor_type.shape.dim[1].dim_param = "A"


def _fails_when_run(graph):
    _narrow_std(graph, helper.make_node("Add", ["full", "narrow"], ["std"]))


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (_rename_output, "outputs"),
        (_half_precision, "outputs"),
        (_fix_batch, "input depth"),
        (_narrow_std, "output std"),
        (_fails_when_run, "graph"),
    ],
)
def test_graphs_that_do_not_fit_the_contract(tmp_path, healthy, edit, field):
    assert refusal_of(_edited(healthy, tmp_path / "p.onnx", edit)).field == field
