"""The drawer task, and what every environment does with an action; what all tasks share is in test_tasks."""

import math
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest

from protos.spaces import ACTION, OBSERVATION
from protos.symmetry import Element
from sim_client import ENV_IDS


@pytest.fixture(scope="module")
def env() -> Iterator[gymnasium.Env[Any, Any]]:
    env = gymnasium.make(ENV_IDS["drawer_opening"])
    yield env
    env.close()


def run_expert(env: gymnasium.Env[Any, Any], seed: int, turn: float = 0.0) -> tuple[bool, list[Any], list[Any]]:
    obs, _ = env.reset(seed=seed, options={"turn": turn})
    seen, actions = [obs], []
    done = success = False
    while not done:
        actions.append(env.unwrapped.expert_action())  # type: ignore[attr-defined]
        obs, reward, terminated, truncated, _ = env.step(actions[-1])
        seen.append(obs)
        success, done = reward == 1.0, terminated or truncated
    return success, seen, actions


@pytest.mark.parametrize("seed", [3, 11, 25])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turning_the_scene_by_quarters_turns_image_and_expert(
    env: gymnasium.Env[Any, Any], seed: int, degrees: int
) -> None:
    turn = Element(math.radians(degrees))
    before, _ = env.reset(seed=seed)
    action_before = env.unwrapped.expert_action()  # type: ignore[attr-defined]
    after, _ = env.reset(seed=seed, options={"turn": turn.angle})
    action_after = env.unwrapped.expert_action()  # type: ignore[attr-defined]
    np.testing.assert_allclose(action_after, turn.action(action_before, ACTION), atol=1e-4)
    different = np.abs(after["depth"] - turn.image(before["depth"], OBSERVATION)) > 1e-3
    assert different.mean() < 0.01, "only pixels on silhouettes may differ"
    assert np.abs(after["depth"] - before["depth"]).max() > 0.03, "the scene must really have turned"


@pytest.mark.parametrize("degrees", [30, 45, 120])
def test_turning_the_scene_by_any_angle_turns_image_and_expert(env: gymnasium.Env[Any, Any], degrees: int) -> None:
    turn = Element(math.radians(degrees))
    before, _ = env.reset(seed=7)
    action_before = env.unwrapped.expert_action()  # type: ignore[attr-defined]
    after, _ = env.reset(seed=7, options={"turn": turn.angle})
    action_after = env.unwrapped.expert_action()  # type: ignore[attr-defined]
    np.testing.assert_allclose(action_after, turn.action(action_before, ACTION), atol=1e-4)
    rows, cols = np.indices(OBSERVATION.shape) - (OBSERVATION.height - 1) / 2
    disc = np.hypot(rows, cols) < OBSERVATION.height / 2 - 2
    wrong = np.abs(after["depth"] - turn.image(before["depth"], OBSERVATION))[disc] > 0.02
    assert wrong.mean() < 0.03


def test_the_gripper_says_when_it_holds(env: gymnasium.Env[Any, Any]) -> None:
    _, seen, actions = run_expert(env, seed=1)
    held = [bool(o["gripper"][0]) for o in seen]
    closed = [bool(a[ACTION.slice_of("gripper")] < 0.5) for a in actions]
    assert not held[0]
    assert held[-1]
    assert held.index(True) == closed.index(True) + 1


@pytest.mark.parametrize("opening", [0.0, 0.04, 0.2, 0.49, 0.55, 0.8, 1.0])
def test_closing_on_nothing_is_not_holding(env: gymnasium.Env[Any, Any], opening: float) -> None:
    """Nor is closing half-way, as a policy does that cannot decide: the command alone keeps the fingers apart."""
    env.reset(seed=1)
    action = np.zeros(ACTION.size, np.float32)
    action[ACTION.slice_of("gripper")] = opening
    obs, *_ = env.step(action)
    assert obs["gripper"][0] == 0.0


@pytest.mark.parametrize("bad", [np.full(5, np.nan), np.zeros(4), np.array([0, np.inf, 0, 0, 0])])
def test_a_broken_action_is_an_error_that_names_what_was_expected(
    env: gymnasium.Env[Any, Any], bad: np.ndarray
) -> None:
    env.reset(seed=2)
    with pytest.raises(ValueError, match="5 finite numbers"):
        env.unwrapped.step(bad)


def test_a_motion_beyond_its_bound_is_shortened_not_bent(env: gymnasium.Env[Any, Any]) -> None:
    _, info = env.reset(seed=4)
    action = np.array([1.0, 0.3, 0.3, 0.0, 0.0], np.float32)
    _, _, _, _, after = env.unwrapped.step(action)
    moved = after["tool_pose"][:2] - info["tool_pose"][:2]
    limit = float(ACTION.scale[ACTION.slice_of("planar")][0])
    assert np.linalg.norm(moved) == pytest.approx(limit, abs=2e-3)
    assert moved[0] == pytest.approx(moved[1], abs=2e-3)
