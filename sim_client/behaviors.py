"""Who acts while data are recorded: an expert, a clumsy expert, chance, a policy, or several by shares."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from protos.spaces import ActionSpec
from sim_client.env import observation_of
from sim_client.rollout import Act
from sim_client.world import unwrapped

FLIPS_PER_NOISE = 0.1
"""A noisy expert gives the opposite gripper command with this probability per unit of noise."""
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Behavior:
    """One way to act: `kind` is expert, noisy, random or policy; a policy has a `file`."""

    kind: str
    file: Path | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.file}" if self.file else self.kind


@dataclass(frozen=True)
class Mixture:
    """Behaviours and their shares, which sum to 1."""

    parts: tuple[tuple[Behavior, float], ...]

    def of_episode(self, index: int) -> Behavior:
        """Who acts in episode `index`: any run of episodes has nearly the shares, however many workers record it."""
        point, passed = (0.5 + index * GOLDEN) % 1.0, 0.0
        for behavior, share in self.parts:
            passed += share
            if point < passed:
                return behavior
        return self.parts[-1][0]

    def __iter__(self) -> Iterator[Behavior]:
        return iter(behavior for behavior, _ in self.parts)


def parse(text: str) -> Mixture:
    """What --behavior says: `expert`, `noisy`, `random`, `policy:FILE` or `mixed:expert=0.5,random=0.5`.

    Raises:
        ValueError: saying what is wrong and what may be written.
    """
    if not text.startswith("mixed:"):
        return Mixture(((_one(text), 1.0),))
    parts = []
    for item in text.removeprefix("mixed:").split(","):
        name, _, share = item.rpartition("=")
        try:
            parts.append((_one(name), float(share)))
        except ValueError as error:
            raise ValueError(f"--behavior {text}: {error}; write mixed:expert=0.5,noisy=0.3,random=0.2") from error
    total = sum(share for _, share in parts)
    if any(share <= 0 for _, share in parts) or not np.isclose(total, 1.0):
        raise ValueError(f"--behavior {text}: shares must be positive and sum to 1, they sum to {total:g}")
    return Mixture(tuple(parts))


def _one(text: str) -> Behavior:
    kind, _, file = text.partition(":")
    if kind == "policy" and file:
        return Behavior(kind, Path(file))
    if text in ("expert", "noisy", "random"):
        return Behavior(text)
    raise ValueError(f"{text!r} is no behaviour; there are expert, noisy, random, policy:FILE and mixed:...")


class Actors:
    """Makes the function that acts in an episode; loads each policy file once."""

    def __init__(self, env: "gymnasium.Env[Any, Any]", noise: float) -> None:
        self._env, self._noise = unwrapped(env), noise
        self.policies: dict[Path, Any] = {}
        """By file, those that have acted or are about to."""

    def actor(self, behavior: Behavior, rng: np.random.Generator) -> Act:
        """`rng` is all the chance there is in what it does."""
        expert, spec = self._env.expert_action, self._env.spec_of_policy.action
        if behavior.kind == "expert":
            return lambda obs, info: expert()
        if behavior.kind == "noisy":
            return lambda obs, info: noisy(expert(), self._noise, spec, rng)
        if behavior.kind == "random":
            return lambda obs, info: uniform(spec, rng)
        assert behavior.file is not None  # `parse` made it
        policy = self._policy(behavior.file)
        return lambda obs, info: spec.project(policy.act(observation_of(obs)).action)

    def _policy(self, file: Path) -> Any:
        if file not in self.policies:
            from serving.policy import load
            from serving.proofs import prove

            policy = prove(load(file, intra_op_threads=1))
            self._env.spec_of_policy.require_same(policy.spec, str(file))
            self.policies[file] = policy
        return self.policies[file]


def noisy(action: NDArray[np.float32], noise: float, spec: ActionSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    """`action` with Gaussian noise of standard deviation `noise` on each motion, in units of its field's bound; now and
    then with the wrong gripper command."""
    jittered = action + (noise * spec.scale * rng.standard_normal(spec.size)).astype(np.float32)
    gripper = spec.slice_of("gripper")
    flipped = rng.uniform() < FLIPS_PER_NOISE * noise
    jittered[gripper] = 2 * spec.centre[gripper] - action[gripper] if flipped else action[gripper]
    return spec.project(jittered)


def uniform(spec: ActionSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    """Uniform over all actions within bounds: vectors over their disc, the gripper open or closed."""
    normalized = np.empty(spec.size, np.float32)
    for field in spec.fields:
        part = spec.slice_of(field.name)
        if len(field.components) == 2:
            radius, angle = np.sqrt(rng.uniform()), rng.uniform(-np.pi, np.pi)
            normalized[part] = radius * np.cos(angle), radius * np.sin(angle)
        else:
            normalized[part] = rng.choice((-1.0, 1.0)) if field.name == "gripper" else rng.uniform(-1, 1)
    return spec.denormalize(normalized).astype(np.float32)
