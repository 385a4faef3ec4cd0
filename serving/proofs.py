"""What a policy must prove before it may move a robot: golden pairs, symmetry, a gripper channel that matters.

Errors are in normalised units, that is as fractions of each field's scale. Comparisons are written so that NaN fails.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from protos.errors import Rejected, Status, shown
from protos.spaces import Kind
from protos.symmetry import QUARTER_TURNS, Element, Group
from serving.errors import PolicyRefused
from serving.policy import BATCH, EXPORT_AGAIN, Policy, Proof

GOLDEN_BOUND = 1e-4
SYMMETRY_SLACK = 1e-4
"""Allowed on top of the declared error: another CPU sums in another order."""
SYMMETRY_CAP = 1e-2
"""No actor that calls itself equivariant may declare a larger error than this."""
POWER = 10
"""The golden motions must exceed the bound this many times, or the symmetry proof could not tell right from wrong."""
GRIPPER_FLOOR = 1e-5
"""A change of action below this is float32 noise, not an answer to the gripper."""
MIRROR = Element(0.0, flip=True)

MISREADINGS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "transposed": lambda depth: depth.swapaxes(-2, -1),
    "mirrored left to right": lambda depth: depth[..., ::-1],
    "mirrored top to bottom": lambda depth: depth[..., ::-1, :],
    "turned by 90 degrees": lambda depth: np.rot90(depth, 1, (-2, -1)),
    "turned by 180 degrees": lambda depth: np.rot90(depth, 2, (-2, -1)),
    "turned by 270 degrees": lambda depth: np.rot90(depth, 3, (-2, -1)),
    "in millimetres": lambda depth: depth * np.float32(1000),
    "with another sign": lambda depth: -depth,
}
"""Ways to get an image wrong. One that explains the golden actions names the export's mistake."""


def prove(policy: Policy) -> Policy:
    """The policy with its proofs.

    Raises:
        PolicyRefused: with every proof that failed, not just the first: two together often tell the cause.
    """
    try:
        return _proved(policy)
    except PolicyRefused:
        raise
    except Exception as error:  # of the runtime, say: whatever a file does, it must not take the server with it
        reason = _refusal("runs", "a policy that can be asked for proofs", shown(repr(error), 300))
        raise PolicyRefused(policy.file, [reason]) from error


def _proved(policy: Policy) -> Policy:
    pairs = policy.manifest.golden
    answers = policy.act_batch(pairs.depth, pairs.gripper)
    outputs = {name: values for name, values in vars(answers).items() if values is not None}
    # Of any of them: an answer whose std or value is no number is a hold.
    if unsound := [name for name, values in outputs.items() if not np.isfinite(values).all()]:
        got = f"NaN or infinity in {', '.join(unsound)}"
        raise PolicyRefused(policy.file, [_refusal("finite", "finite outputs for the golden observations", got)])
    proofs, reasons = [], []
    for proof in (golden, symmetry, gripper):
        try:
            proofs.append(proof(policy))
        except Rejected as reason:
            reasons.append(reason)
    if reasons:
        raise PolicyRefused(policy.file, reasons)
    return replace(policy, proofs=tuple(proofs))


def golden(policy: Policy) -> Proof:
    """This runtime reproduces the actions that the training framework computed: together, and alone, as robots ask."""
    pairs = policy.manifest.golden
    expected = policy.spec.action.normalize(pairs.action)
    together, alone = (_errors(policy, expected, size) for size in (BATCH, 1))
    errors = np.maximum(together, alone)
    error = float(errors.max())
    if not error <= GOLDEN_BOUND:
        if together.max() <= GOLDEN_BOUND:
            cause = " where they are asked for one by one: an answer depends on what else is in the batch"
        else:
            cause = _misreading(policy, expected)
        raise _refusal(
            "golden",
            f"golden actions within {GOLDEN_BOUND:g} of a field's scale",
            f"{error:.3g} in {_worst(errors, policy)}{cause}",
        )
    return Proof("golden", error, GOLDEN_BOUND, f"{len(pairs.gripper)} recorded (observation, action) pairs")


def _errors(policy: Policy, expected: NDArray[np.floating], size: int) -> NDArray[np.floating]:
    """[golden pairs, A] of both outputs, the larger one."""
    pairs = policy.manifest.golden
    outputs = policy.act_batch(pairs.depth, pairs.gripper, size)
    actions = (policy.spec.action.normalize(outputs.action), outputs.normalized)
    return np.maximum(*(np.abs(action - expected) for action in actions))


def symmetry(policy: Policy) -> Proof:
    """When the scene turns, the action turns with it: a mirrored or transposed image shows here."""
    manifest, pairs, spec = policy.manifest, policy.manifest.golden, policy.spec
    group = Group.parse(manifest.group)
    if not manifest.actor_is_equivariant or group.order % 4:
        claim = f"the actor claims no quarter turns (equivariance {manifest.equivariance}, group {manifest.group})"
        return Proof("symmetry", 0.0, 0.0, f"not applicable: {claim}")
    declared = manifest.equivariance_error_90
    if not 0 <= declared <= SYMMETRY_CAP:
        raise _refusal("symmetry", f"a declared error of at most {SYMMETRY_CAP:g}", f"{declared:g}")

    before = spec.action.normalize(policy.act_batch(pairs.depth, pairs.gripper).action)
    bound = declared + SYMMETRY_SLACK
    motion = max(
        float(np.linalg.norm(before[:, spec.action.slice_of(f.name)], axis=-1).max())
        for f in spec.action.fields
        if f.kind is Kind.VECTOR
    )
    if not motion >= POWER * bound:
        raise _refusal(
            "symmetry",
            f"golden actions that move by at least {POWER * bound:.2g} of the limit, so that a wrong turn would show",
            f"{motion:.2g}: inconclusive",
            "export with other golden observations, or train longer",
        )
    elements = (*QUARTER_TURNS, MIRROR) if group.reflections else QUARTER_TURNS
    after = {g: _normalized_after(policy, g) for g in elements}
    errors = np.max([np.abs(after[g] - g.action(before, spec.action)) for g in elements], axis=0)
    error = float(errors.max())
    if not error <= bound:
        against = max(float(np.abs(after[g] - _back(g).action(before, spec.action)).max()) for g in QUARTER_TURNS)
        cause = (
            "the policy turns against the scene: image mirrored or transposed?"
            if against <= bound
            else "the policy does not turn with the scene"
        )
        raise _refusal(
            "symmetry", f"an error of at most {bound:.3g}", f"{error:.3g} in {_worst(errors, policy)}; {cause}"
        )
    names = "90, 180, 270 degrees" + (" and a reflection" if group.reflections else "")
    return Proof("symmetry", error, bound, f"{len(before)} golden observations turned by {names}")


def gripper(policy: Policy) -> Proof:
    """The gripper's state reaches the action: at least one golden twin answers to it."""
    pairs = policy.manifest.golden
    empty, holding = slice(0, None, 2), slice(1, None, 2)
    twins = (
        len(pairs.gripper) % 2 == 0
        and np.array_equal(pairs.depth[empty], pairs.depth[holding])
        and (pairs.gripper[empty] == 0).all()
        and (pairs.gripper[holding] == 1).all()
    )
    if not twins:
        raise _refusal("gripper", "golden observations in twins, gripper 0 then 1", "others")
    normalized = policy.spec.action.normalize(policy.act_batch(pairs.depth, pairs.gripper).action)
    change = float(np.abs(normalized[holding] - normalized[empty]).max())
    if not change > GRIPPER_FLOOR:
        raise _refusal(
            "gripper",
            f"some action to change by more than {GRIPPER_FLOOR:g} when the gripper goes from 0 to 1",
            f"{change:.2g}: the gripper channel is dead (zeroed or not connected?)",
        )
    return Proof("gripper", change, GRIPPER_FLOOR, "largest change of an action between golden twins; above the bound")


def _normalized_after(policy: Policy, element: Element) -> NDArray[np.floating]:
    pairs, spec = policy.manifest.golden, policy.spec
    turned = element.image(pairs.depth, spec.observation)
    return spec.action.normalize(policy.act_batch(turned, pairs.gripper).action)


def _back(element: Element) -> Element:
    return Element(-element.angle)


def _misreading(policy: Policy, expected: NDArray[np.floating]) -> str:
    """Which mistake in the image, undone, would explain the golden actions."""
    pairs, spec = policy.manifest.golden, policy.spec.action
    for name, misread in MISREADINGS.items():
        depth = np.ascontiguousarray(misread(pairs.depth))
        errors = np.abs(spec.normalize(policy.act_batch(depth, pairs.gripper).action) - expected)
        if errors.max() <= GOLDEN_BOUND:
            return f"; they fit if the graph is shown the image {name}: it reads images so"
    return ""


def _worst(errors: NDArray[np.floating], policy: Policy) -> str:
    return policy.spec.action.components[int(errors.max(axis=0).argmax())]


def _refusal(proof: str, expected: str, got: str, remedy: str = EXPORT_AGAIN) -> Rejected:
    return Rejected(f"proof.{proof}", expected, got, remedy, Status.FAILED_PRECONDITION)
