"""Small real objects for tests: specs, scenes, and policy.onnx files truly equivariant, or broken in one way."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import trustme
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from protos.manifest import Golden, Manifest
from protos.spaces import ACTION, Observation, ObservationSpec, PolicySpec
from serving.config import Config

FAR_M = 0.59
"""The switches "nan_when_far" and "slow_when_far" act on images that hold a pixel beyond this."""
TABLE_M = 0.3
GOLDEN_SCENES = 4
BREAKS = ("transposed", "mirrored", "gripper_dead", "nan", "scaled", "still", "lopsided", "crowded")
"""Exports that must be refused, see `_graph`. The other switches are for tests of what a running server does."""
CONVENTIONS = [(r, c) for r, c in itertools.permutations([(1, 0), (-1, 0), (0, 1), (0, -1)], 2) if not np.dot(r, c)]
"""All pairs of a view's row_axis and col_axis: turned and mirrored ones."""
UNHURRIED_MS = 60_000.0
"""How long an action is valid where a test is not about freshness: a busy machine may stop anyone for half a second."""


def settings(*policies: str | Path, **changed: Any) -> Config:
    """A server's, on a free port; changed where a test is about it."""
    usual = {"listen": "localhost:0", "intra_op_threads": 1, "valid_for_ms": UNHURRIED_MS}
    return Config(**usual | {"policy": tuple(map(str, policies))} | changed)


def small_spec(size: int = 32) -> PolicySpec:
    """The real contract with a smaller image."""
    return PolicySpec(ObservationSpec(height=size, width=size), ACTION)


def scene(seed: int, spec: PolicySpec | None = None, gripper: float = 0.0) -> Observation:
    """A table with a few boxes that look different from every side."""
    observation = (spec or small_spec()).observation
    rng, size = np.random.default_rng(seed), observation.height
    depth = np.full((size, size), TABLE_M, np.float32)
    for _ in range(3):
        row, col = rng.integers(0, size * 3 // 4, 2)
        height, width = rng.integers(2, max(size // 3, 3), 2)
        depth[row : row + height, col : col + width] = TABLE_M - rng.uniform(0.03, 0.15)
    return Observation(depth, gripper)


def far_scene(seed: int = 0, spec: PolicySpec | None = None) -> Observation:
    """A valid scene with one pixel beyond FAR_M."""
    observation = scene(seed, spec)
    observation.depth[0, 0] = FAR_M + 0.005
    return observation


def certify(folder: Path, **names: str) -> None:
    """An authority of its own, ca.pem, and for each FILE=name that it vouches for a pair, FILE.pem and FILE.key."""
    folder.mkdir(exist_ok=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for file, name in names.items():
        issued = authority.issue_cert(name)
        issued.private_key_pem.write_to_path(folder / f"{file}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{file}.pem")


def tiny_policy_file(
    path: Path,
    spec: PolicySpec | None = None,
    *,
    breaks: Sequence[str] = (),
    golden_from: str = "healthy",
    with_value: bool = True,
    metadata: dict[str, str] | None = None,
    weight: float = 1.0,
    **manifest: Any,
) -> Path:
    """Write a small policy.onnx.

    Args:
        breaks: switches, see `_graph`.
        golden_from: "healthy": the golden actions are those of the unbroken graph, as when the export went wrong;
            "broken": those of the graph itself, as when the mistake came before, so that only other proofs can see it.
        metadata: replaces what the manifest writes.
        weight: makes another policy (and version) of the same contract.
        manifest: replaces fields of the manifest, e.g. equivariance="none".
    """
    spec = spec or small_spec()
    graph = _graph(spec, tuple(breaks), with_value, weight)
    judge = graph if golden_from == "broken" else _graph(spec, (), with_value, weight)
    golden = _golden(judge, spec)
    described = replace(tiny_manifest(spec, golden), **manifest)
    helper.set_model_props(graph, described.to_metadata() if metadata is None else metadata)
    path.write_bytes(graph.SerializeToString())
    return path


def tiny_manifest(spec: PolicySpec, golden: Golden) -> Manifest:
    return Manifest(
        spec=spec,
        group="C8",
        task="tiny",
        algorithm="bc",
        equivariance="both",
        seed=3,
        updates=10,
        dataset_id="equiserve/tiny-v0",
        dataset_sha256=hashlib.sha256(b"tiny").hexdigest(),
        code_version="test",
        equivariance_error_90=1e-6,
        equivariance_error_45=0.02,
        golden=golden,
    )


def random_golden(spec: PolicySpec, seed: int = 0) -> Golden:
    """Well-formed golden pairs that no policy need reproduce."""
    scenes = [scene(seed + i // 2, spec, gripper=float(i % 2)) for i in range(4)]
    rng = np.random.default_rng(seed)
    actions = spec.action.project(rng.uniform(-0.1, 0.1, (len(scenes), spec.action.size)).astype(np.float32))
    return Golden(np.stack([s.depth for s in scenes]), np.array([s.gripper for s in scenes], np.float32), actions)


def _golden(model: onnx.ModelProto, spec: PolicySpec) -> Golden:
    scenes = [scene(100 + i // 2, spec, gripper=float(i % 2)) for i in range(2 * GOLDEN_SCENES)]
    depth = np.stack([s.depth for s in scenes])
    gripper = np.array([s.gripper for s in scenes], np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (action,) = session.run(["action"], {"depth": depth[:, None], "gripper": gripper[:, None]})
    return Golden(depth, gripper, action)


@dataclass
class _Graph:
    """Nodes and constants of a graph under construction; `add` returns the name of the node's output."""

    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]

    def add(self, op: str, *inputs: str | float | NDArray[Any], output: str = "", **attributes: Any) -> str:
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def constant(self, value: float | NDArray[Any]) -> str:
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name


def _graph(spec: PolicySpec, breaks: tuple[str, ...], with_value: bool, weight: float) -> onnx.ModelProto:
    """Move towards (or from) the centroid of what stands out from the mean depth; turn, lift and grip by invariants.

    Smooth, nonlinear, and equivariant under every rotation of the grid up to float32 rounding. Switches:
        transposed, mirrored: the image is read so.
        gripper_dead: the gripper's input is multiplied by zero.
        nan: every action is NaN.   nan_std, nan_value: every std or value is.
        nan_when_far: the actions of images beyond FAR_M are.
        scaled: planar motion comes in other units.   wild: actions exceed their limits.
        still: no planar motion.   lopsided: planar motion has a part that does not turn.
        crowded: actions depend on what else is in the batch.
        slow_when_far: a second or so of work for images beyond FAR_M.
    """
    g = _Graph([], [])
    depth, gripper = "depth", "gripper"
    if "transposed" in breaks:
        depth = g.add("Transpose", depth, perm=[0, 1, 3, 2])
    if "mirrored" in breaks:
        depth = g.add("Gather", depth, np.arange(spec.observation.width)[::-1], axis=3)
    if "gripper_dead" in breaks:
        gripper = g.add("Mul", gripper, 0.0)
    farthest = g.add("ReduceMax", g.add("Reshape", "depth", np.array([0, -1])), np.array([1]))  # [B, 1]
    if "slow_when_far" in breaks:
        gripper = g.add("Add", gripper, _burn(g, farthest))

    height, x, y, spread = _invariants_and_centroid(g, spec, depth)
    gain = g.add("Mul", g.add("Add", g.add("Mul", gripper, 0.5), 1.0), 2.0 * weight)
    if "still" in breaks:
        gain = g.add("Mul", gain, 0.0)
    ux, uy = g.add("Mul", x, gain), g.add("Mul", y, gain)
    if "lopsided" in breaks:
        ux = g.add("Add", ux, 0.3)
    radius = g.add("Sqrt", g.add("Add", g.add("Add", g.add("Mul", ux, ux), g.add("Mul", uy, uy)), 1e-9))
    squash = g.add("Div", g.add("Tanh", radius), radius)
    p = g.add("Tanh", g.add("Sub", g.add("Mul", height, 4.0), gripper))
    lift = g.add("Tanh", g.add("Sub", g.add("Mul", gripper, 0.7), height))
    yaw = g.add("Tanh", g.add("Sub", spread, 0.4))
    normalized = g.add("Concat", p, g.add("Mul", ux, squash), g.add("Mul", uy, squash), lift, yaw, axis=1)
    if "crowded" in breaks:
        others = g.add("Sub", g.add("ReduceMean", normalized, np.array([0])), normalized)
        normalized = g.add("Add", normalized, g.add("Mul", others, 0.5))
    if "nan" in breaks:
        normalized = g.add("Mul", normalized, float("nan"))
    if "nan_when_far" in breaks:
        normalized = g.add("Add", normalized, g.add("Mul", g.add("Sqrt", g.add("Sub", FAR_M, farthest)), 0.0))
    if "wild" in breaks:
        normalized = g.add("Mul", normalized, 5.0)
    g.add("Identity", normalized, output="normalized_action")
    scale = spec.action.scale * (np.array([1, 10, 10, 1, 1]) if "scaled" in breaks else 1)
    g.add("Add", g.add("Mul", normalized, scale), spec.action.centre, output="action")
    std = g.add("Add", spread, 0.1)
    if "nan_std" in breaks:
        std = g.add("Mul", std, float("nan"))
    g.add("Mul", std, spec.action.scale, output="std")
    if with_value:
        value = g.add("Sub", gripper, spread)
        if "nan_value" in breaks:
            value = g.add("Mul", value, float("nan"))
        g.add("Squeeze", value, np.array([1]), output="value")
    return _model(g, spec, with_value)


def _invariants_and_centroid(g: _Graph, spec: PolicySpec, depth: str) -> tuple[str, str, str, str]:
    """Mean depth, centroid (x, y) in half view widths, and spread about the centre; each [B, 1]."""
    size = spec.observation.height
    rows, cols = (np.indices((size, size)) - (size - 1) / 2) / (size / 2)
    (rx, ry), (cx, cy) = spec.observation.row_axis, spec.observation.col_axis
    flat = g.add("Reshape", depth, np.array([0, -1]))  # [B, H * W]
    mean = g.add("ReduceMean", flat, np.array([1]))
    stands_out = g.add("Mul", *[g.add("Sub", flat, mean)] * 2)
    mass = g.add("Add", g.add("ReduceSum", stands_out, np.array([1])), 1e-6)

    def moment(weights: NDArray[Any]) -> str:
        return g.add("Div", g.add("MatMul", stands_out, weights.reshape(-1, 1).astype(np.float32)), mass)

    return mean, moment(rows * rx + cols * cx), moment(rows * ry + cols * cy), moment(rows**2 + cols**2)


def _burn(g: _Graph, farthest: str) -> str:
    """Zero, after a loop of matrix products that runs only where an image reaches beyond FAR_M."""
    far = g.add("Cast", g.add("Greater", g.add("ReduceMax", farthest, keepdims=0), FAR_M), to=TensorProto.INT64)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "state"], ["product"]),
            helper.make_node("Clip", ["product", "low", "high"], ["next"]),
            helper.make_node("Identity", ["going"], ["go_on"]),
        ],
        "burn",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [512, 512]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [512, 512]),
        ],
        [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("low", 0.0), ("high", 1.0))],
    )
    trips = g.add("Mul", far, np.array(500))
    state = g.add("Expand", g.add("Mul", g.add("ReduceMax", farthest, keepdims=0), 1e-3), np.array([512, 512]))
    burned = g.add("Loop", trips, "", state, body=body)
    return g.add("Mul", g.add("ReduceMean", burned, keepdims=0), 0.0)


def _model(g: _Graph, spec: PolicySpec, with_value: bool) -> onnx.ModelProto:
    def tensor(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shape])

    outputs = [tensor(name, spec.action.size) for name in ("action", "normalized_action", "std")]
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [tensor("depth", 1, *spec.observation.shape), tensor("gripper", 1)],
        outputs + ([tensor("value")] if with_value else []),
        g.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
