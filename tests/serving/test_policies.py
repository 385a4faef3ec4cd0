"""ListPolicies, GetPolicy and names: several policies, several versions, one default."""

import grpc
import pytest

from protos.codec import pack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.spaces import PolicySpec
from serving.errors import StartupError
from serving.server import Server
from tests.makers import scene, settings, small_spec, tiny_policy_file


@pytest.fixture
def several(serve, healthy, tmp_path):
    newer = tiny_policy_file(tmp_path / "lr=0.1.onnx", weight=1.5)
    other = tiny_policy_file(tmp_path / "other.onnx", small_spec(16), task="stacking")
    return serve(policy=(f"door={healthy}", f"door={newer}", str(other)))


def test_every_policy_is_listed(several):
    entries = several.stub.ListPolicies(pb.ListPoliciesRequest()).policies
    assert [(e.name, e.task, e.is_default) for e in entries] == [
        ("door", "tiny", False),
        ("door", "tiny", True),
        ("stacking", "stacking", False),
    ]
    assert entries[0].version != entries[1].version
    assert entries[0].contract_digest != entries[2].contract_digest


def test_the_first_name_is_the_default_and_its_newest_version_answers(several):
    entries = several.stub.ListPolicies(pb.ListPoliciesRequest()).policies
    message = pb.GetActionRequest(observation=pack_observation(scene(0)))
    assert several.stub.GetAction(message).version == entries[1].version
    message.version = entries[0].version
    assert several.stub.GetAction(message).version == entries[0].version


def test_each_policy_checks_its_own_contract(several):
    message = pb.GetActionRequest(policy="stacking", observation=pack_observation(scene(0)))
    with pytest.raises(grpc.RpcError, match=r"observation\.height: expected 16"):
        several.stub.GetAction(message)


def test_a_policy_tells_contract_provenance_and_proofs(running, policy):
    info = running.stub.GetPolicy(pb.GetPolicyRequest()).policy
    assert PolicySpec.from_json(info.contract) == small_spec()
    assert info.contract_digest == small_spec().digest
    assert (info.sha256, info.version) == (policy.sha256, policy.sha256[:12])
    assert (info.algorithm, info.equivariance, info.group, info.seed) == ("bc", "both", "C8", 3)
    assert (info.dataset_id, info.code_version, info.has_value) == ("equiserve/tiny-v0", "test", True)
    assert [p.name for p in info.proofs] == ["golden", "symmetry", "gripper"]
    golden, symmetry, gripper = info.proofs
    assert golden.measured <= golden.bound
    assert symmetry.measured <= symmetry.bound
    assert gripper.measured > gripper.bound


@pytest.mark.parametrize(
    ("message", "field"), [(pb.GetPolicyRequest(name="other"), "name"), (pb.GetPolicyRequest(version="1"), "version")]
)
def test_an_unknown_policy_is_not_found(running, message, field):
    with pytest.raises(grpc.RpcError, match=f"{field}: expected one of") as refused:
        running.stub.GetPolicy(message)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_same_policy_twice_is_a_mistake(healthy):
    with (
        Server(settings(healthy, healthy)) as server,
        pytest.raises(StartupError, match="given twice"),
    ):
        server.load()
