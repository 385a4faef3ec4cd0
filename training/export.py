"""A trained agent -> one file, policy.onnx: plain layers, checked against torch, with its manifest inside."""

import importlib.metadata
import logging
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from protos.files import write_atomically
from protos.manifest import INPUTS, OUTPUTS, VALUE_OUTPUT, Golden, Manifest
from protos.spaces import PolicySpec
from protos.symmetry import EIGHTH_TURN, Element, Group
from training.agents.agent import Agent
from training.batch import State
from training.data.dataset import Dataset
from training.networks.distribution import SquashedGaussian

logger = logging.getLogger(__name__)

OPSET = 20
PARITY_BOUND = 1e-4
"""Largest difference between torch and onnxruntime in an action, normalised units; what a server's golden proof allows.
Equivariant policies stay below 1e-5. White noise can drive a plain network far out of its range, where float32 alone
makes 2e-5: no reason to lose a trained policy. A wrong graph is off by a thousand times more."""
REPORTED_PARITY_BOUND = 1e-3
"""The same for std and value, which are reported and not moved on: no squash takes float32's noise out of them."""
SYMMETRY_BOUND = 1e-4
"""Largest error of an equivariant actor under quarter turns, normalised units; a larger one is a bug, not noise."""
RANDOM_OBSERVATIONS, REAL_OBSERVATIONS, GOLDEN_SCENES = 256, 64, 4


class ExportError(RuntimeError):
    """The exported graph does not do what the trained network does. Nothing was written."""


@dataclass(frozen=True)
class Provenance:
    """Where a policy comes from, as its manifest records it."""

    algorithm: str
    equivariance: str
    group: str
    seed: int
    updates: int
    code_version: str
    """Of the code that began to train it: by the end of a long run, the checkout may be at another commit."""


class Graph(nn.Module):
    """What is exported: (depth [B, 1, H, W], gripper [B, 1]) -> action, normalized_action, std [B, A] and value [B]."""

    def __init__(self, agent: Agent, spec: PolicySpec) -> None:
        super().__init__()
        self._spec = spec
        self.actor = agent.actor.export()
        self.value = agent.export_value()
        self.register_buffer("scale", torch.from_numpy(spec.action.scale))
        self.register_buffer("centre", torch.from_numpy(spec.action.centre))

    def forward(self, depth: Float[Tensor, "B 1 H W"], gripper: Float[Tensor, "B 1"]) -> tuple[Tensor, ...]:
        distribution = SquashedGaussian(self.actor(depth, gripper), self._spec.action)
        normalized = distribution.mode()
        action = normalized * self.scale + self.centre  # type: ignore[operator]
        std = distribution.std() * self.scale  # type: ignore[operator]
        value = () if self.value is None else (self.value(depth, gripper, normalized)[:, 0],)
        return action, normalized, std, *value


@torch.no_grad()
def export(
    agent: Agent, dataset: Dataset, provenance: Provenance, path: Path, evaluation: Mapping[str, Any] | None = None
) -> Manifest:
    """Write `path` atomically and return what it says about itself.

    Args:
        evaluation: closed-loop results, if known, for the manifest.

    Raises:
        ExportError: when torch and onnxruntime disagree by more than the bounds above, or an actor that should be
            equivariant follows quarter turns, or its group's reflections, with more than SYMMETRY_BOUND of error.
    """
    agent = agent.cpu()
    spec, rng = dataset.spec, np.random.default_rng(provenance.seed)
    model = to_onnx(Graph(agent, spec).eval(), spec)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    real = _real_observations(dataset, rng)
    _require_parity(agent, session, _random_observations(spec, rng), "random")
    _require_parity(agent, session, real, "recorded")
    _, *exact = Group(4, Group.parse(provenance.group).reflections)  # under these a grid of pixels is itself
    quarter = _equivariance_error(session, real, exact, spec)
    if agent.actor.steerable and not quarter <= SYMMETRY_BOUND:
        under = "quarter turns and reflections" if len(exact) > 3 else "quarter turns"
        raise ExportError(f"the equivariant actor is off by {quarter:.3g} of its range under {under}")
    manifest = Manifest(
        spec=spec,
        group=provenance.group,
        task=dataset.task,
        algorithm=provenance.algorithm,
        equivariance=provenance.equivariance,
        seed=provenance.seed,
        updates=provenance.updates,
        dataset_id=dataset.dataset_id,
        dataset_sha256=dataset.sha256,
        code_version=provenance.code_version,
        equivariance_error_90=quarter,
        equivariance_error_45=_equivariance_error(session, real, (EIGHTH_TURN,), spec),
        golden=_golden(agent, real, spec),
        evaluation=evaluation or {},
    )
    write(model, manifest, path)
    return manifest


def to_onnx(graph: nn.Module, spec: PolicySpec) -> onnx.ModelProto:
    """Trace a module with Graph's signature; the batch axis stays free."""
    depth, gripper = torch.zeros(2, 1, *spec.observation.shape), torch.zeros(2, 1)
    batch = torch.export.Dim("batch", min=1)
    has_value = len(graph(depth, gripper)) > len(OUTPUTS)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports each step that went well
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (depth, gripper),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            external_data=False,
            input_names=list(INPUTS),
            output_names=[*OUTPUTS, *([VALUE_OUTPUT] if has_value else [])],
            dynamic_shapes=({0: batch}, {0: batch}),
        )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    model: onnx.ModelProto = program.model_proto
    return model


def write(model: onnx.ModelProto, manifest: Manifest, path: Path) -> None:
    """Put the manifest into the model's metadata and write the file, whole or not at all."""
    onnx.helper.set_model_props(model, manifest.to_metadata())
    model.producer_name = "equiserve"
    onnx.checker.check_model(model)
    write_atomically(path, model.SerializeToString())


def code_version() -> str:
    """The installed version, and the commit where this runs from a git checkout, marked where its files differ."""
    try:
        version = importlib.metadata.version("equiserve")
    except importlib.metadata.PackageNotFoundError:
        version = "uninstalled"
    here = Path(__file__)

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *command], capture_output=True, text=True, check=True
        ).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # else the checkout around is another project's
        changed = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return f"{version}+{git('rev-parse', '--short=12', 'HEAD').strip()}{'.dirty' if changed else ''}"
    except (OSError, subprocess.CalledProcessError):
        return version


def _random_observations(spec: PolicySpec, rng: np.random.Generator) -> State:
    view = spec.observation
    depth = rng.uniform(view.depth_min_m, view.depth_max_m, (RANDOM_OBSERVATIONS, 1, *view.shape))
    gripper = rng.integers(0, 2, (RANDOM_OBSERVATIONS, 1))
    return State(torch.from_numpy(depth.astype(np.float32)), torch.from_numpy(gripper.astype(np.float32)))


def _real_observations(dataset: Dataset, rng: np.random.Generator) -> State:
    index = rng.permutation(len(dataset))[:REAL_OBSERVATIONS]
    frames = dataset.now[torch.from_numpy(index).to(dataset.now.device)]
    return State(dataset.depth[frames].cpu(), dataset.gripper[frames].cpu())  # not all: they may fill a GPU


def _require_parity(agent: Agent, session: onnxruntime.InferenceSession, state: State, kind: str) -> None:
    """Compare every output of the graph with the agent itself, not with the module that the graph was traced from."""
    largest = 0.0
    for part in _parts(state):
        theirs = dict(zip((o.name for o in session.get_outputs()), session.run(None, _feed(part)), strict=True))
        for name, (expected, unit) in _answers(agent, part).items():
            difference = float(np.max(np.abs(expected - theirs[name]) / unit))
            bound = PARITY_BOUND if "action" in name else REPORTED_PARITY_BOUND
            if not difference <= bound:  # so, NaN is refused too
                raise ExportError(
                    f"torch and onnxruntime differ by {difference:.3g} of a range in {name} on {kind} observations"
                )
            largest = max(largest, difference if "action" in name else 0.0)
    logger.info(
        "torch and onnxruntime differ by at most %.1e of an action's range on %d %s observations",
        largest, len(state.depth), kind,
    )  # fmt: skip


def _answers(agent: Agent, state: State) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What the agent says, and the size of one normalised unit, by the name of the output."""
    pi, spec = agent.actor(state), agent.actor.spec.action
    normalized, one = pi.mode().numpy(), np.ones(1, np.float32)
    answers = {
        "action": (np.asarray(spec.denormalize(normalized), np.float32), spec.scale),
        "normalized_action": (normalized, one),
        "std": (pi.std().numpy() * spec.scale, spec.scale),
    }
    reported = agent.state_value(state)
    if reported is not None:
        value = reported.numpy()
        answers[VALUE_OUTPUT] = (value, np.maximum(1.0, np.abs(value)))  # returns have no range of their own
    return answers


def _equivariance_error(
    session: onnxruntime.InferenceSession, state: State, turns: Sequence[Element], spec: PolicySpec
) -> float:
    """max |pi(g s) - rho(g) pi(s)| of the graph that will be served, in normalised units."""
    before = _normalized(session, state)
    errors = []
    for turn in turns:
        turned = State(torch.from_numpy(turn.image(state.depth.numpy(), spec.observation)), state.gripper)
        errors.append(np.abs(_normalized(session, turned) - turn.action(before, spec.action)).max())
    return float(np.max(errors))  # unlike max, NaN if any is


def _golden(agent: Agent, real: State, spec: PolicySpec) -> Golden:
    """Recorded scenes, each with an empty and a holding gripper, and what torch, not the graph, answers."""
    depth = real.depth[:GOLDEN_SCENES].repeat_interleave(2, dim=0)
    gripper = torch.tensor([[0.0], [1.0]]).repeat(len(depth) // 2, 1)
    normalized = agent.actor(State(depth, gripper)).mode().numpy()
    action = np.asarray(spec.action.denormalize(normalized), np.float32)
    return Golden(depth[:, 0].numpy().copy(), gripper[:, 0].numpy().copy(), action)


def _normalized(session: onnxruntime.InferenceSession, state: State) -> NDArray[np.float32]:
    name = OUTPUTS[1]
    return np.concatenate([session.run([name], _feed(part))[0] for part in _parts(state)])


def _feed(state: State) -> dict[str, NDArray[np.float32]]:
    return dict(zip(INPUTS, (state.depth.numpy(), state.gripper.numpy()), strict=True))


def _parts(state: State, size: int = 32) -> list[State]:
    return [State(d, g) for d, g in zip(state.depth.split(size), state.gripper.split(size), strict=True)]
