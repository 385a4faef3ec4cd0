"""The drawer task: the expert opens it, from every side, and the scene's symmetry is the contract's."""

import math
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sim_client
from protos.spaces import ACTION, OBSERVATION
from protos.symmetry import Element

ENV_ID = "equiserve/DrawerOpening-v0"


@pytest.fixture(scope="module")
def env() -> Iterator[gymnasium.Env[Any, Any]]:
    env = gymnasium.make(ENV_ID)
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


def test_gymnasium_s_own_checker_accepts_the_environment() -> None:
    check_env(gymnasium.make(ENV_ID).unwrapped, skip_render_check=True)


def test_the_expert_opens_the_drawer_from_every_side(env: gymnasium.Env[Any, Any]) -> None:
    turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    failed = [i for i, turn in enumerate(turns) if not run_expert(env, seed=100 + i, turn=float(turn))[0]]
    assert failed == []


def test_the_expert_keeps_to_the_contract_s_limits(env: gymnasium.Env[Any, Any]) -> None:
    for seed in range(3):
        _, _, actions = run_expert(env, seed)
        assert np.max(ACTION.magnitudes(np.stack(actions))) <= 1 + 1e-6


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


def test_the_same_seed_gives_the_same_trajectory_bit_for_bit(env: gymnasium.Env[Any, Any]) -> None:
    _, seen, actions = run_expert(env, seed=5)
    run_expert(env, seed=6)
    _, again, actions_again = run_expert(env, seed=5)
    np.testing.assert_array_equal(np.stack(actions), np.stack(actions_again))
    for one, other in zip(seen, again, strict=True):
        np.testing.assert_array_equal(one["depth"], other["depth"])


def test_pose_and_yaw_cover_the_full_circle_evenly(env: gymnasium.Env[Any, Any]) -> None:
    yaws = []
    for seed in range(160):
        env.reset(seed=seed)
        yaws.append(env.unwrapped.task._yaw)  # type: ignore[attr-defined]
    counts, _ = np.histogram(np.mod(yaws, 2 * math.pi), bins=8, range=(0, 2 * math.pi))
    assert counts.min() >= 8, counts


def test_the_gripper_says_when_it_holds(env: gymnasium.Env[Any, Any]) -> None:
    _, seen, actions = run_expert(env, seed=1)
    held = [bool(o["gripper"][0]) for o in seen]
    closed = [bool(a[ACTION.slice_of("gripper")] < 0.5) for a in actions]
    assert not held[0]
    assert held[-1]
    assert held.index(True) == closed.index(True) + 1


def test_closing_on_nothing_is_not_holding(env: gymnasium.Env[Any, Any]) -> None:
    env.reset(seed=1)
    action = np.zeros(ACTION.size, np.float32)
    obs, *_ = env.step(action)
    assert obs["gripper"][0] == 0.0


def test_doing_nothing_never_opens_the_drawer(env: gymnasium.Env[Any, Any]) -> None:
    env.reset(seed=2)
    still = ACTION.centre.copy()
    for _ in range(sim_client.MAX_STEPS):
        assert not env.unwrapped.task.succeeded()  # type: ignore[attr-defined]
        _, reward, terminated, truncated, _ = env.step(still)
        assert not terminated
        assert reward == 0.0
    assert truncated


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


def test_looking_does_not_change_what_the_robot_sees() -> None:
    plain, watched = gymnasium.make(ENV_ID), gymnasium.make(ENV_ID, render_mode="rgb_array")
    a, _ = plain.reset(seed=9)
    b, _ = watched.reset(seed=9)
    frame = watched.render()
    assert frame.shape == (480, 640, 3)  # type: ignore[union-attr]
    assert frame.std() > 10  # type: ignore[union-attr]
    action = plain.unwrapped.expert_action()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(a["depth"], b["depth"])
    np.testing.assert_array_equal(plain.step(action)[0]["depth"], watched.step(action)[0]["depth"])
    plain.close()
    watched.close()
