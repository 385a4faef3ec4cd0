"""What every task must be: solvable from every side, symmetric, settled, repeatable; and a proper Gymnasium id."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import gymnasium
import numpy as np
import pybullet as p
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordVideo

from protos.spaces import ACTION, OBSERVATION
from protos.symmetry import Element
from sim_client import ENV_IDS, MAX_STEPS, TaskName
from sim_client.arm import (
    TOOL_HIGH_M,
    TOOL_LOW_M,
    WORKSPACE_CENTRE,
    WORKSPACE_HALF_M,
    YAW_CENTRE_RAD,
    YAW_REACH_RAD,
)
from sim_client.env import TabletopEnv
from sim_client.tasks import TASKS, TWINS
from sim_client.world import unwrapped

ALL = list(get_args(TaskName))
SYMMETRIC = [task for task in ALL if task not in TWINS]
Env = gymnasium.Env[Any, Any]


@pytest.fixture(scope="module", params=ALL)
def env(request: pytest.FixtureRequest) -> Iterator[Env]:
    env = gymnasium.make(ENV_IDS[request.param])
    yield env
    env.close()


@pytest.fixture(scope="module", params=SYMMETRIC)
def symmetric(request: pytest.FixtureRequest) -> Iterator[Env]:
    env = gymnasium.make(ENV_IDS[request.param])
    yield env
    env.close()


def expert(env: Env) -> np.ndarray:
    return unwrapped(env).expert_action()


def run_expert(env: Env, seed: int, turn: float = 0.0) -> tuple[bool, list[Any], list[Any]]:
    obs, _ = env.reset(seed=seed, options={"turn": turn})
    seen, actions, reward, done = [obs], [], 0.0, False
    while not done:
        actions.append(expert(env))
        obs, reward, terminated, truncated, _ = env.step(actions[-1])
        seen.append(obs)
        done = terminated or truncated
    return reward == 1.0, seen, actions


def test_every_task_has_an_id_and_every_id_a_task() -> None:
    assert set(ALL) == set(TASKS) | set(TWINS) == set(ENV_IDS)
    assert all(gymnasium.spec(env_id).max_episode_steps == MAX_STEPS for env_id in ENV_IDS.values())


@pytest.mark.parametrize("task", ALL)
def test_gymnasium_s_own_checker_accepts_the_environment(task: TaskName) -> None:
    check_env(gymnasium.make(ENV_IDS[task]).unwrapped, skip_render_check=True)


def test_the_expert_succeeds_from_every_side_within_the_contract_s_limits(env: Env) -> None:
    turns = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    for index, turn in enumerate(turns):
        success, _, actions = run_expert(env, seed=100 + index, turn=float(turn))
        assert success, f"seed {100 + index}, turn {turn}"
        assert np.max(ACTION.magnitudes(np.stack(actions))) <= 1 + 1e-6


def test_the_same_seed_gives_the_same_trajectory_bit_for_bit(env: Env) -> None:
    _, seen, actions = run_expert(env, seed=5)
    run_expert(env, seed=6)
    _, again, actions_again = run_expert(env, seed=5)
    np.testing.assert_array_equal(np.stack(actions), np.stack(actions_again))
    for one, other in zip(seen, again, strict=True):
        np.testing.assert_array_equal(one["depth"], other["depth"])


def test_doing_nothing_never_succeeds(env: Env) -> None:
    env.reset(seed=2)
    for _ in range(MAX_STEPS):
        _, reward, terminated, truncated, _ = env.step(ACTION.centre.copy())
        assert not terminated
        assert reward == 0.0
    assert truncated


def centres(env: Env) -> np.ndarray:
    """Where the task's things are."""
    return np.array([centre for centre, _ in unwrapped(env).task.footprints()])


def test_things_stand_still_until_they_are_touched(env: Env) -> None:
    obs, _ = env.reset(seed=3)
    before = centres(env)
    still = ACTION.centre.copy()
    still[ACTION.slice_of("gripper")] = 1.0
    after = env.step(still)[0]["depth"]
    assert np.mean(np.abs(after - obs["depth"]) > 2e-3) < 0.005
    np.testing.assert_allclose(centres(env), before, atol=5e-4)


@pytest.mark.parametrize("degrees", [90, 45])
def test_turning_the_scene_turns_image_and_expert(symmetric: Env, degrees: int) -> None:
    turn = Element(math.radians(degrees))
    before, _ = symmetric.reset(seed=11)
    action_before = expert(symmetric)
    after, _ = symmetric.reset(seed=11, options={"turn": turn.angle})
    np.testing.assert_allclose(expert(symmetric), turn.action(action_before, ACTION), atol=1e-3)
    rows, cols = np.indices(OBSERVATION.shape) - (OBSERVATION.height - 1) / 2
    disc = np.hypot(rows, cols) < OBSERVATION.height / 2 - 2
    wrong = np.abs(after["depth"] - turn.image(before["depth"], OBSERVATION))[disc] > 0.02
    assert wrong.mean() < 0.03
    assert np.abs(after["depth"] - before["depth"]).max() > 0.03, "the scene must really have turned"


def test_scenes_are_turned_every_way_equally_often(symmetric: Env) -> None:
    turned = [symmetric.reset(seed=seed)[1]["orientation"] for seed in range(160)]
    counts, _ = np.histogram(np.mod(turned, 2 * math.pi), bins=8, range=(0, 2 * math.pi))
    assert counts.min() >= 8, counts


def test_success_is_not_declared_while_the_gripper_still_holds() -> None:
    env = gymnasium.make(ENV_IDS["block_in_bowl"])
    _, seen, actions = run_expert(env, seed=1)
    held = [bool(o["gripper"][0]) for o in seen]
    assert any(held)
    assert not held[-1]
    assert actions[-1][ACTION.slice_of("gripper")] == 1.0
    env.close()


@pytest.mark.parametrize("opening", [0.52, 0.55, 0.58])
def test_a_block_gripped_half_way_is_held(opening: float) -> None:
    """As by a policy that commands a little more than half open: the fingers still squeeze it, and it comes along."""
    env = gymnasium.make(ENV_IDS["block_picking"])
    env.reset(seed=1)
    bare, done = unwrapped(env), False
    while not bare.arm.holding:
        env.step(expert(env))
    action = np.zeros(ACTION.size, np.float32)
    action[ACTION.slice_of("gripper")], action[ACTION.slice_of("lift")] = opening, 0.05
    for _ in range(4):
        obs, _, done, *_ = env.step(action)
        if done:
            break
    assert bare.task._block.position[2] > 0.06
    assert obs["gripper"][0] == 1.0
    assert done
    env.close()


def test_a_block_in_the_bowl_between_the_fingers_has_not_been_put_there() -> None:
    env = gymnasium.make(ENV_IDS["block_in_bowl"])
    env.reset(seed=1)
    bare = unwrapped(env)
    for _ in range(MAX_STEPS):
        if bare.task._in_bowl:
            break
        action = expert(env)
        loose = action[ACTION.slice_of("gripper")] > 0.5 and bare.arm.holding
        if loose:  # over the bowl, where the expert lets go
            action[ACTION.slice_of("gripper")] = 0.545
        env.step(action)
    assert bare.task._in_bowl
    for _ in range(3):
        still = np.zeros(ACTION.size, np.float32)
        still[ACTION.slice_of("gripper")] = 0.545
        _, reward, done, *_ = env.step(still)
        assert reward == 0
        assert not done
    env.close()


@pytest.mark.parametrize(("lean_deg", "in_bowl"), [(0, True), (10, True), (80, False), (180, False)])
def test_what_lies_beside_a_fallen_bowl_is_not_in_it(lean_deg: float, in_bowl: bool) -> None:
    env = gymnasium.make(ENV_IDS["block_in_bowl"])
    env.reset(seed=1)
    task, client = unwrapped(env).task, unwrapped(env)._client
    x, y, z = task._bowl.position
    lying = p.getQuaternionFromEuler((math.radians(lean_deg), 0, 0))
    p.resetBasePositionAndOrientation(task._bowl.id, (x, y, z), lying, physicsClientId=client)
    task._block.place((x + 0.02, y), 0.0)
    assert task.succeeded(unwrapped(env).arm) == in_bowl
    env.close()


def test_a_block_held_over_its_goal_has_not_been_pushed_there() -> None:
    env = gymnasium.make(ENV_IDS["block_pushing"])
    env.reset(seed=1)
    task = unwrapped(env).task
    on_the_table = task._block.position[2]
    task._block.place(task._goal, 0.0)
    assert task.succeeded(unwrapped(env).arm)
    up = (*task._goal, on_the_table + 0.15)
    p.resetBasePositionAndOrientation(task._block.id, up, (0, 0, 0, 1), physicsClientId=unwrapped(env)._client)
    assert not task.succeeded(unwrapped(env).arm)
    env.close()


@pytest.mark.parametrize("task", ["block_pushing_tilted", "drawer_opening_fixed_side"])
def test_at_strength_zero_a_twin_is_the_symmetric_task(task: TaskName) -> None:
    original = {"block_pushing_tilted": "block_pushing", "drawer_opening_fixed_side": "drawer_opening"}[task]
    twin, of = gymnasium.make(ENV_IDS[task], strength=0.0), gymnasium.make(ENV_IDS[original])  # type: ignore[index]
    _, seen, actions = run_expert(twin, seed=8)
    _, others, other_actions = run_expert(of, seed=8)
    np.testing.assert_array_equal(np.stack(actions), np.stack(other_actions))
    np.testing.assert_array_equal(seen[-1]["depth"], others[-1]["depth"])
    twin.close()
    of.close()


def test_a_leaning_table_pulls_what_is_pushed_downhill() -> None:
    """The same pushes end further to the robot's right, which is down, than on a level table."""
    moved = []
    for strength in (0.0, 1.0):
        env = gymnasium.make(ENV_IDS["block_pushing_tilted"], strength=strength)
        block = unwrapped(env).task._block  # type: ignore[attr-defined]
        for seed in range(6):
            env.reset(seed=seed)
            before = block.xy[1]
            for _ in range(6):
                env.step(expert(env))
            moved.append(block.xy[1] - before)
        env.close()
    level, leaning = np.reshape(moved, (2, -1)).mean(axis=1)
    assert leaning < level - 2e-3


def test_at_full_strength_the_drawer_opens_one_way() -> None:
    env = gymnasium.make(ENV_IDS["drawer_opening_fixed_side"])
    assert {env.reset(seed=seed)[1]["orientation"] for seed in range(5)} == {0.0}
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"task": "juggling"}, "no task 'juggling'"),
        ({"task": "block_picking", "strength": 0.5}, "has no strength"),
        ({"task": "block_pushing_tilted", "strength": 1.5}, "between 0"),
        ({"task": "block_picking", "view": "side", "elevation_deg": 5}, "15 to 90"),
        ({"task": "block_picking", "randomize": {"size": 0.9}}, "randomize.size must be between"),
    ],
)
def test_a_world_that_does_not_exist_is_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TabletopEnv(**kwargs)


@pytest.mark.parametrize("task", SYMMETRIC)
def test_the_kuka_does_what_the_panda_does(task: TaskName) -> None:
    env = gymnasium.make(ENV_IDS[task], arm="kuka")
    assert all(run_expert(env, seed=seed)[0] for seed in range(3))
    env.close()


def test_both_arms_see_the_same_scene() -> None:
    frames = []
    for arm in ("panda", "kuka"):
        env = gymnasium.make(ENV_IDS["block_picking"], arm=arm)
        frames.append(env.reset(seed=2)[0]["depth"])
        env.close()
    assert np.mean(np.abs(frames[0] - frames[1]) > 2e-3) < 0.01


def test_the_side_view_has_colour_and_another_contract() -> None:
    env = gymnasium.make(ENV_IDS["block_picking"], view="side", elevation_deg=30)
    obs, _ = env.reset(seed=0)
    assert obs["rgb"].dtype == np.uint8
    assert obs["rgb"].std() > 10
    assert env.observation_space.contains(obs)
    assert unwrapped(env).spec_of_policy.digest != TabletopEnv("block_picking").spec_of_policy.digest
    env.close()


def test_closing_twice_closes_nothing_else() -> None:
    """PyBullet gives a client's number to the next."""
    one = TabletopEnv("block_picking")
    one.close()
    other = TabletopEnv("block_picking")
    one.close()
    other.reset(seed=1)
    other.close()


def test_vector_environments_work() -> None:
    make = [lambda: gymnasium.make(ENV_IDS["block_picking"]) for _ in range(2)]
    envs = SyncVectorEnv(make, autoreset_mode=AutoresetMode.DISABLED)
    obs, _ = envs.reset(seed=[1, 2])
    assert obs["depth"].shape == (2, *OBSERVATION.shape)
    _, rewards, *_ = envs.step(np.stack([ACTION.centre] * 2))
    assert rewards.tolist() == [0.0, 0.0]
    alone = gymnasium.make(ENV_IDS["block_picking"])
    np.testing.assert_array_equal(obs["depth"][1], alone.reset(seed=2)[0]["depth"])
    envs.close()
    alone.close()


def test_videos_can_be_recorded(tmp_path: Path) -> None:
    env: Env = RecordVideo(gymnasium.make(ENV_IDS["block_picking"], render_mode="rgb_array"), str(tmp_path))
    env.reset(seed=0)
    for _ in range(3):
        env.step(expert(env))
    env.close()
    assert [file.stat().st_size > 1000 for file in tmp_path.glob("*.mp4")] == [True]


def test_looking_does_not_change_what_the_robot_sees() -> None:
    plain = gymnasium.make(ENV_IDS["block_in_bowl"])
    watched = gymnasium.make(ENV_IDS["block_in_bowl"], render_mode="rgb_array")
    a, _ = plain.reset(seed=9)
    b, _ = watched.reset(seed=9)
    frame: Any = watched.render()
    assert frame.shape == (480, 640, 3)
    assert frame.std() > 10
    action = expert(plain)
    np.testing.assert_array_equal(a["depth"], b["depth"])
    np.testing.assert_array_equal(plain.step(action)[0]["depth"], watched.step(action)[0]["depth"])
    plain.close()
    watched.close()


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_no_command_takes_the_tool_out_of_its_workspace(side: float) -> None:
    """Nor into the table, nor the wrist to its joint's end."""
    with contextlib.closing(gymnasium.make(ENV_IDS["block_picking"])) as env:
        _, info = env.reset(seed=0)
        for _ in range(10):
            *_, info = env.step(np.array([1.0, 0.05 * side, 0.0, -0.05 * side, side * math.pi / 4], np.float32))
    x, _, z, yaw = info["tool_pose"]
    edge, low_or_high = WORKSPACE_CENTRE[0] + side * WORKSPACE_HALF_M, TOOL_LOW_M if side > 0 else TOOL_HIGH_M
    np.testing.assert_allclose((x, z), (edge, low_or_high), atol=5e-3)
    assert abs(yaw - YAW_CENTRE_RAD - side * YAW_REACH_RAD) < 0.03
