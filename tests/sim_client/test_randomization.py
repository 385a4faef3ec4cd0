"""Domain randomisation: off it changes nothing, on it changes what it says, and the same seed draws the same world."""

import json
import math
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
import pybullet as p
import pytest

from protos.spaces import ACTION, OBSERVATION
from sim_client import ENV_IDS
from sim_client.arm import PHYSICS_HZ
from sim_client.env import TabletopEnv
from sim_client.randomization import Misplacement, Randomization
from sim_client.world import World, unwrapped

STILL = ACTION.centre.copy()
STILL[ACTION.slice_of("gripper")] = 1.0


def first_frame(seed: int = 1, **randomize: float) -> np.ndarray:
    env = TabletopEnv("block_picking", randomize=randomize)
    depth = env.reset(seed=seed)[0]["depth"]
    env.close()
    return depth


def block_dynamics(seed: int, **randomize: float) -> tuple[float, float, float]:
    """(mass, friction, height) of the block."""
    env = TabletopEnv("block_picking", randomize=randomize)
    env.reset(seed=seed)
    block = env.task._block  # type: ignore[attr-defined]
    mass, friction, *_ = p.getDynamicsInfo(block.id, -1, physicsClientId=env._client)
    height = 2 * block.position[2]
    env.close()
    return mass, friction, height


def test_nothing_differs_unless_asked_for() -> None:
    assert not any(asdict(Randomization()).values())
    assert not Randomization().of_objects
    assert len({block_dynamics(seed) for seed in range(3)}) == 1


@pytest.mark.parametrize("name", ["friction", "mass", "size"])
def test_objects_differ_from_episode_to_episode_within_what_was_asked(name: str) -> None:
    index = {"mass": 0, "friction": 1, "size": 2}[name]
    usual = block_dynamics(0)[index]
    drawn = np.array([block_dynamics(seed, **{name: 0.2})[index] for seed in range(6)]) / usual
    assert len(set(drawn)) == 6
    assert np.all((drawn > 0.79) & (drawn < 1.21))


def test_the_same_seed_draws_the_same_world() -> None:
    every = {"friction": 0.2, "mass": 0.2, "size": 0.2, "depth_noise_m": 0.002, "missing_pixels": 0.02}
    every |= {"latency_s": 0.1, "camera_error_m": 0.005, "camera_error_rad": 0.02, "distractors": 3}
    env = gymnasium.make(ENV_IDS["block_stacking"], randomize=every)
    runs = []
    for seed in (3, 4, 3):
        obs, _ = env.reset(seed=seed)
        frames = [obs["depth"]]
        for _ in range(3):
            frames.append(env.step(unwrapped(env).expert_action())[0]["depth"])
        runs.append(np.stack(frames))
    np.testing.assert_array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0], runs[1])
    assert env.observation_space.contains(obs)
    env.close()


def test_depth_noise_has_the_size_asked_for_and_grows_with_distance() -> None:
    flat = np.full(OBSERVATION.shape, 0.5, np.float32)
    how, rng = Randomization(depth_noise_m=0.004), np.random.default_rng(0)
    assert np.std(how.degrade(flat, OBSERVATION, rng) - flat) == pytest.approx(0.004, rel=0.05)
    near = flat / 2
    assert np.std(how.degrade(near, OBSERVATION, rng) - near) == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_missing_pixels_read_zero_and_gather_along_edges(share: float) -> None:
    step = np.full(OBSERVATION.shape, 0.5, np.float32)
    step[:, 64:] = 0.3
    seen = Randomization(missing_pixels=share).degrade(step, OBSERVATION, np.random.default_rng(0))
    lost = seen == OBSERVATION.depth_min_m
    assert lost.mean() == pytest.approx(share, abs=0.02)
    assert lost[:, 63:65].mean() > min(3 * lost[:, :60].mean(), 0.99)


def test_the_environment_s_frames_are_degraded_as_asked() -> None:
    plain = first_frame()
    noise = first_frame(depth_noise_m=0.004) - plain
    inside = plain < OBSERVATION.depth_max_m - 0.05  # nothing is clipped there
    assert np.std(noise[inside] / (plain[inside] / 0.5) ** 2) == pytest.approx(0.004, rel=0.1)
    lost = first_frame(missing_pixels=0.2) != plain
    assert lost.mean() == pytest.approx(0.2, abs=0.02)
    assert not first_frame(missing_pixels=0.2)[lost].any()


@pytest.mark.parametrize(("name", "size"), [("camera_error_m", 0.02), ("camera_error_rad", 0.3)])
def test_the_environment_s_camera_is_misplaced_anew_in_each_episode(name: str, size: float) -> None:
    env = TabletopEnv("block_picking", randomize={name: size})
    drawn = []
    for seed in range(1, 5):
        depth = env.reset(seed=seed)[0]["depth"]
        assert np.mean(np.abs(depth - first_frame(seed)) > 0.003) > 0.001
        drawn.append(env._misplacement)
    assert len(set(drawn)) == 4
    here = env.arm.tool_pose()
    believed = env._camera.look((here.x, here.y, here.z), Misplacement()).depth
    np.testing.assert_array_equal(believed, first_frame(4))
    env.close()


def test_latency_is_drawn_in_each_episode_and_kept_in_it() -> None:
    env = TabletopEnv("block_picking", randomize={"latency_s": 0.2})
    drawn = []
    for seed in range(12):
        env.reset(seed=seed)
        drawn.append(env._latency_s)
        env.step(STILL)
        assert env._latency_s == drawn[-1]
    assert 0 <= min(drawn) < 0.07 < 0.13 < max(drawn) <= 0.2
    env.close()


def test_latency_leaves_a_motion_unfinished_at_the_next_frame() -> None:
    moved = []
    for latency in (0.0, 0.2):
        env = TabletopEnv("block_picking", randomize={"latency_s": latency})
        _, before = env.reset(seed=2)
        env._latency_s = latency
        action = STILL.copy()
        action[ACTION.slice_of("lift")] = 0.05
        *_, after = env.step(action)
        moved.append(after["tool_pose"][2] - before["tool_pose"][2])
        env.close()
    assert moved[0] == pytest.approx(0.05, abs=2e-3)
    assert 0.005 < moved[1] < moved[0] - 0.005


def test_latency_delays_a_motion_and_does_not_shorten_it() -> None:
    """What is left of it at the next frame comes before the next motion."""
    env = TabletopEnv("block_picking", randomize={"latency_s": 0.2})
    _, before = env.reset(seed=2)
    env._latency_s = 0.2
    action = STILL.copy()
    action[ACTION.slice_of("lift")] = 0.05
    env.step(action)
    env.arm._go_on(round(0.2 * PHYSICS_HZ))
    assert env.arm.tool_pose().z - before["tool_pose"][2] == pytest.approx(0.05, abs=2e-3)
    env.close()


def test_a_misplaced_camera_is_misplaced_by_as_much_as_asked() -> None:
    rng = np.random.default_rng(0)
    drawn = [Misplacement.drawn(Randomization(camera_error_m=0.01, camera_error_rad=0.1), rng) for _ in range(400)]
    assert np.std([d.x for d in drawn]) == pytest.approx(0.01, rel=0.15)
    assert np.std([d.yaw for d in drawn]) == pytest.approx(0.1, rel=0.15)


def test_distractors_lie_about_and_leave_the_task_alone() -> None:
    plain, cluttered = first_frame(), first_frame(distractors=5)
    assert np.mean(np.abs(cluttered - plain) > 0.005) > 0.003
    env = gymnasium.make(ENV_IDS["block_in_bowl"], randomize={"distractors": 5})
    wins = 0
    for seed in range(5):
        env.reset(seed=seed)
        for _ in range(50):
            *_, terminated, truncated, _ = env.step(unwrapped(env).expert_action())
            if terminated or truncated:
                break
        wins += terminated
    assert wins >= 4
    env.close()


def test_a_turned_scene_turns_its_distractors_too() -> None:
    yaws, turn = [], 0.7
    for angle in (0.0, turn):
        env = TabletopEnv("block_picking", randomize={"distractors": 4})
        env.reset(seed=1, options={"turn": angle})
        bodies = [p.getBasePositionAndOrientation(b.id, physicsClientId=env._client) for b in env._clutter._bodies]
        yaws.append(np.array([p.getEulerFromQuaternion(orientation)[2] for _, orientation in bodies]))
        env.close()
    before, after = yaws
    np.testing.assert_allclose(np.exp(1j * (after - before)), np.exp(1j * turn), atol=1e-6)


def test_people_see_the_distractors_too() -> None:
    frames = []
    for count in (0, 6):
        env = TabletopEnv("block_picking", randomize={"distractors": count}, render_mode="rgb_array")
        env.reset(seed=1)
        frames.append(env.render())
        env.close()
    assert np.abs(frames[0].astype(int) - frames[1]).max() > 30  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "bad",
    [{"friction": 1.5}, {"size": -0.1}, {"missing_pixels": 0.9}, {"latency_s": 1.0}, {"camera_error_m": math.inf},
     {"camera_error_rad": math.inf}, {"depth_noise_m": math.inf}, {"depth_noise_m": math.nan}],
    ids=str,
)  # fmt: skip
def test_worlds_that_cannot_be_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"randomize.{next(iter(bad))} must be (between|finite)"):
        Randomization(**bad)


def test_a_world_s_settings_fit_into_json() -> None:
    world = World(arm="kuka", view="side", elevation_deg=30, randomize=Randomization(mass=0.1))
    assert json.loads(json.dumps(world.env_kwargs())) == {
        "arm": "kuka",
        "view": "side",
        "elevation_deg": 30,
        "randomize": {"mass": 0.1},
    }
    assert World().env_kwargs() == {}


@pytest.mark.parametrize("elevation_deg", [5.0, 30.0])
def test_how_steeply_a_camera_looks_that_looks_straight_down_is_no_question(elevation_deg: float) -> None:
    with pytest.raises(ValueError, match=r"--elevation-deg \d+ is the side view's: say --view side"):
        World(elevation_deg=elevation_deg)
