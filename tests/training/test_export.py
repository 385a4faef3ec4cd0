"""policy.onnx: the same function as torch, with a manifest that a server can hold it to."""

import copy
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from protos.manifest import INPUTS, OUTPUTS, VALUE_OUTPUT, Manifest
from protos.spaces import Observation
from protos.symmetry import QUARTER_TURNS
from serving.errors import PolicyRefused
from serving.policy import load
from serving.proofs import prove
from tests.training.conftest import NETWORK, SMALL
from tests.training.test_networks import random_state
from training import export as export_module
from training.agents.agent import Agent, Learner
from training.agents.bc import BC, BCConfig
from training.agents.cql import CQL, CQLConfig
from training.agents.iql import IQL, IQLConfig
from training.batch import State
from training.data.dataset import Dataset
from training.export import ExportError, Graph, Provenance, export, to_onnx, write
from training.networks.family import EQUIVARIANCE

PROVENANCE = Provenance("bc", "both", "C8", seed=1, updates=60, code_version="test")


def trained(
    reach: Dataset, agent: Any = BC, config: Any = None, equivariance: str = "both", updates: int = 60
) -> Agent:
    torch.manual_seed(0)
    made: Agent = agent(NETWORK, SMALL, EQUIVARIANCE[equivariance], config or BCConfig())
    learner, generator = Learner(made, 3e-3, bf16=False), torch.Generator().manual_seed(0)
    for _ in range(updates):
        learner.update(reach.sample(16, generator))
    return made


@dataclass(frozen=True)
class Exported:
    """An agent, the file that it became, and what `export` said of that."""

    agent: Agent
    path: Path
    manifest: Manifest


def exported(agent: Agent, reach: Dataset, provenance: Provenance, folder: Path) -> Exported:
    path = folder / "policy.onnx"
    return Exported(agent, path, export(agent, reach, provenance, path))


@pytest.fixture(scope="module")
def bc(reach: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(trained(reach), reach, PROVENANCE, tmp_path_factory.mktemp("bc"))


@pytest.fixture(scope="module")
def agent(bc: Exported) -> Agent:
    return bc.agent


@pytest.fixture(scope="module")
def policy(bc: Exported) -> Path:
    return bc.path


@pytest.fixture(scope="module")
def iql(reach: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    agent, provenance = trained(reach, IQL, IQLConfig(), updates=5), replace(PROVENANCE, algorithm="iql")
    return exported(agent, reach, provenance, tmp_path_factory.mktemp("iql"))


@pytest.fixture(scope="module")
def cql(reach: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    agent, provenance = trained(reach, CQL, CQLConfig(proposals=2), updates=5), replace(PROVENANCE, algorithm="cql")
    return exported(agent, reach, provenance, tmp_path_factory.mktemp("cql"))


@pytest.fixture(scope="module")
def plain(reach: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    agent = trained(reach, CQL, CQLConfig(proposals=2), "none", updates=5)
    provenance = replace(PROVENANCE, algorithm="cql", equivariance="none")
    return exported(agent, reach, provenance, tmp_path_factory.mktemp("plain"))


def test_torch_and_onnxruntime_agree_on_256_random_observations(agent: Agent, policy: Path) -> None:
    session = onnxruntime.InferenceSession(policy)
    state = random_state(SMALL, batch=256)
    action, normalized, std = session.run(
        None, dict(zip(INPUTS, (state.depth.numpy(), state.gripper.numpy()), strict=True))
    )
    with torch.no_grad():
        pi = agent.actor(state)
    np.testing.assert_allclose(normalized, pi.mode(), atol=1e-5)
    np.testing.assert_allclose(SMALL.action.normalize(action), pi.mode(), atol=1e-5)
    np.testing.assert_allclose(std, pi.std() * SMALL.action.scale, atol=1e-5)


def test_the_file_turns_with_the_scene(policy: Path, reach: Dataset) -> None:
    served = load(policy)
    for seed in range(5):
        state = reach.batch(torch.tensor([7 * seed])).state
        scene = Observation(state.depth[0, 0].numpy(), float(state.gripper[0]))
        before = served.act(scene).action
        for turn in QUARTER_TURNS:
            after = served.act(turn.observation(scene, SMALL.observation)).action
            difference = (after - turn.action(before, SMALL.action)) / SMALL.action.scale
            assert np.abs(difference).max() <= 1e-4


def test_the_server_accepts_it_and_its_manifest_says_where_it_comes_from(policy: Path, reach: Dataset) -> None:
    served = prove(load(policy))
    manifest = served.manifest
    assert manifest.spec == SMALL
    assert (manifest.task, manifest.algorithm, manifest.equivariance, manifest.group) == ("reach", "bc", "both", "C8")
    assert (manifest.seed, manifest.updates, manifest.dataset_sha256) == (1, 60, reach.sha256)
    assert manifest.equivariance_error_90 <= 1e-4
    assert manifest.equivariance_error_90 < manifest.equivariance_error_45 < 1


def test_it_is_one_file_of_ordinary_layers(policy: Path) -> None:
    model = onnx.load(policy)
    assert list(policy.parent.iterdir()) == [policy]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [o.name for o in model.graph.output] == list(OUTPUTS)


def test_a_motion_of_exactly_nothing_is_exported_as_nothing() -> None:
    agent = BC(NETWORK, SMALL, EQUIVARIANCE["none"], BCConfig())
    with torch.no_grad():
        for parameter in agent.actor.heads.parameters():
            parameter.zero_()
    session = onnxruntime.InferenceSession(to_onnx(Graph(agent, SMALL).eval(), SMALL).SerializeToString())
    state = random_state(SMALL, batch=2)
    feed = dict(zip(INPUTS, (state.depth.numpy(), state.gripper.numpy()), strict=True))
    np.testing.assert_array_equal(session.run(["normalized_action"], feed)[0], np.zeros((2, SMALL.action.size)))


@pytest.mark.parametrize("name", ["iql", "cql", "plain"])
def test_a_critic_s_value_comes_along(name: str, request: pytest.FixtureRequest) -> None:
    made: Exported = request.getfixturevalue(name)
    state = random_state(SMALL, batch=1)
    served = prove(load(made.path))
    with torch.no_grad():
        expected = made.agent.state_value(state).item()  # type: ignore[union-attr]
    assert served.act(Observation(state.depth[0, 0].numpy(), float(state.gripper[0]))).value == pytest.approx(
        expected, abs=1e-5
    )


def test_a_plain_policy_makes_no_claim_of_symmetry_and_is_served(plain: Exported) -> None:
    assert plain.manifest.equivariance_error_90 > 1e-3
    proofs = {p.name: p.detail for p in prove(load(plain.path)).proofs}
    assert "not applicable" in proofs["symmetry"]


def misread(model: onnx.ModelProto, how: str) -> onnx.ModelProto:
    """The same graph, one of whose inputs was mixed up on the way."""
    made = copy.deepcopy(model)
    name = "gripper" if how == "gripper" else "depth"
    for node in made.graph.node:
        node.input[:] = ["misread" if read == name else read for read in node.input]
    if how == "transposed":
        first = onnx.helper.make_node("Transpose", [name], ["misread"], perm=[0, 1, 3, 2])
    elif how == "mirrored":
        backwards = np.arange(SMALL.observation.width)[::-1].copy()
        made.graph.initializer.append(onnx.numpy_helper.from_array(backwards, "backwards"))
        first = onnx.helper.make_node("Gather", [name, "backwards"], ["misread"], axis=3)
    else:
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "nothing"))
        first = onnx.helper.make_node("Mul", [name, "nothing"], ["misread"])
    made.graph.node.insert(0, first)
    return made


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("transposed", "image transposed"),
        ("mirrored", "mirrored left to right"),
        ("gripper", "gripper channel is dead"),
    ],
)
def test_a_server_refuses_a_wrongly_exported_policy_and_says_why_even_where_its_golden_pairs_share_the_mistake(
    how: str, said: str, policy: Path, tmp_path: Path
) -> None:
    manifest, path = load(policy).manifest, tmp_path / "broken.onnx"
    model = misread(onnx.load(policy), how)
    write(model, manifest, path)
    with pytest.raises(PolicyRefused) as refusal:
        prove(load(path))
    assert said in str(refusal.value)
    golden = manifest.golden
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = dict(zip(INPUTS, (golden.depth[:, None], golden.gripper[:, None]), strict=True))
    (action,) = session.run(["action"], feed)
    write(model, replace(manifest, golden=replace(golden, action=action)), path)
    with pytest.raises(PolicyRefused, match=r"gripper channel is dead|turns against the scene"):
        prove(load(path))


class Mirrored(nn.Module):
    """A graph that is shown its images mirrored."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.whole = graph

    def forward(self, depth: torch.Tensor, gripper: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out: tuple[torch.Tensor, ...] = self.whole(depth.flip(-1), gripper)
        return out


def test_an_export_that_went_wrong_writes_nothing(
    agent: Agent, policy: Path, reach: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the module that was traced went wrong in the same way: the agent is what counts."""
    monkeypatch.setattr("training.export.Graph", lambda a, s: Mirrored(Graph(a, s)))
    monkeypatch.setattr("training.export.to_onnx", lambda *_: misread(onnx.load(policy), "mirrored"))
    with pytest.raises(ExportError, match="torch and onnxruntime differ"):
        export(agent, reach, PROVENANCE, tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


def skewed(model: onnx.ModelProto, output: str, by: Any = 1e-2) -> onnx.ModelProto:
    """The same graph with one of its outputs off by a little."""
    made, exact, little = copy.deepcopy(model), f"exact_{output}", f"little_{output}"
    (producer,) = (node for node in made.graph.node if output in node.output)
    producer.output[list(producer.output).index(output)] = exact
    for node in made.graph.node:
        node.input[:] = [exact if name == output else name for name in node.input]
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(by, np.float32), little))
    made.graph.node.append(onnx.helper.make_node("Add", [exact, little], [output]))
    return made


def test_an_error_in_any_output_is_found(
    iql: Exported, reach: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for output in (*OUTPUTS, VALUE_OUTPUT):
        monkeypatch.setattr("training.export.to_onnx", lambda *_, at=output: skewed(onnx.load(iql.path), at))
        with pytest.raises(ExportError, match=f"in {output} on random"):
            export(iql.agent, reach, PROVENANCE, tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_actor_that_lost_its_symmetry_is_not_exported(
    plain: Exported, reach: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.export.to_onnx", lambda *_: onnx.load(plain.path))
    monkeypatch.setattr(plain.agent.actor, "steerable", True)
    with pytest.raises(ExportError, match="under quarter turns"):
        export(plain.agent, reach, PROVENANCE, tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_actor_that_does_not_reflect_is_not_exported_as_one_that_does(
    agent: Agent, policy: Path, reach: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.export.to_onnx", lambda *_: onnx.load(policy))
    with pytest.raises(ExportError, match="quarter turns and reflections"):
        export(agent, reach, replace(PROVENANCE, group="D8"), tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_dihedral_policy_is_served(reach: Dataset, tmp_path: Path) -> None:
    agent = BC(replace(NETWORK, group="D4"), SMALL, EQUIVARIANCE["both"], BCConfig())
    manifest = export(agent, reach, replace(PROVENANCE, group="D4"), tmp_path / "policy.onnx")
    assert manifest.equivariance_error_90 <= 1e-4
    assert prove(load(tmp_path / "policy.onnx")).manifest.group == "D4"


def test_the_manifest_in_the_file_is_the_one_returned(bc: Exported) -> None:
    returned = bc.manifest
    read = Manifest.from_metadata({p.key: p.value for p in onnx.load(bc.path).metadata_props})
    assert replace(read, golden=returned.golden) == returned
    np.testing.assert_array_equal(read.golden.action, returned.golden.action)


def test_golden_actions_come_from_torch_not_from_the_graph(
    agent: Agent, policy: Path, reach: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = 3e-5  # within PARITY_BOUND and, seen twice by opposite turns, SYMMETRY_BOUND
    model = skewed(skewed(onnx.load(policy), "normalized_action", off), "action", off * SMALL.action.scale)
    monkeypatch.setattr("training.export.to_onnx", lambda *_: model)
    golden = export(agent, reach, PROVENANCE, tmp_path / "policy.onnx").golden
    with torch.no_grad():
        ours = agent.actor(
            State(torch.from_numpy(golden.depth)[:, None], torch.from_numpy(golden.gripper)[:, None])
        ).mode()
    np.testing.assert_allclose(SMALL.action.normalize(golden.action), ours, atol=1e-6)


def test_the_commit_of_a_checkout_around_an_installation_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel installed below another project's checkout."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    installed = tmp_path / "lib" / "training" / "export.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(export_module, "__file__", str(installed))
    assert "+" not in export_module.code_version()
    subprocess.run([*git, "add", "lib"], check=True)
    assert "+" in export_module.code_version()


def test_a_checkout_whose_files_differ_from_its_commit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    ours = tmp_path / "training" / "export.py"
    ours.parent.mkdir()
    ours.touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "ours"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(export_module, "__file__", str(ours))
    (tmp_path / "notes.txt").write_text("in no commit, and no code")
    clean = export_module.code_version()
    assert "+" in clean
    ours.write_text("pass")
    assert export_module.code_version() == f"{clean}.dirty"
