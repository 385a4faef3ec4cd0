"""The Gymnasium environment: an arm over a table, a task, and the observation and action of the contract."""

from typing import Any

import gymnasium
import numpy as np
import pybullet as p
from numpy.typing import NDArray

from protos.spaces import SPEC, Observation
from sim_client.arm import CONTROL_PERIOD_S, PHYSICS_HZ, WORKSPACE_CENTRE, Arm
from sim_client.camera import Camera, Spectator
from sim_client.tasks import TASKS, Task

Obs = dict[str, NDArray[np.float32]]


class TabletopEnv(gymnasium.Env[Obs, NDArray[np.float32]]):
    """One task on the table.

    Observation: {"depth": float32 [H, W] metres, "gripper": float32 [1]}. Action: float32 [5], physical units, in the
    order of `protos.spaces.ACTION`. Reward: 1 at success, which terminates, else 0.
    `reset(options={"turn": angle})` turns the whole initial scene about the workspace's centre.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1 / CONTROL_PERIOD_S}  # noqa: RUF012, Gymnasium's own name

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        if task not in TASKS:
            raise ValueError(f"no task {task!r}; there are {sorted(TASKS)}")
        self.render_mode = render_mode
        self.task_name = task
        self.spec_of_policy = SPEC
        view = SPEC.observation
        self.observation_space = gymnasium.spaces.Dict(  # type: ignore[assignment]
            {
                "depth": gymnasium.spaces.Box(view.depth_min_m, view.depth_max_m, view.shape, np.float32),
                "gripper": gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32),
            }
        )
        bound = SPEC.action.scale
        self.action_space = gymnasium.spaces.Box(
            SPEC.action.centre - bound, SPEC.action.centre + bound, dtype=np.float32
        )
        self._client = p.connect(p.DIRECT)
        self.arm, self.task = build_scene(self._client, task, meshes=False)
        self._camera = Camera(self._client, view)
        self._pristine = p.saveState(physicsClientId=self._client)
        self._spectator: Spectator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        # Contacts and solver warm starts of the last episode must not leak into this one: same seed, same trajectory.
        p.restoreState(self._pristine, physicsClientId=self._client)
        start = self.task.reset(self.np_random, turn=float((options or {}).get("turn", 0.0)))
        self.arm.reset(start)
        return self._observe(), self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        """One control step. Out-of-bound fields are shortened to their bound; NaN and wrong shapes are errors."""
        action = np.asarray(action, np.float32)
        if action.shape != (SPEC.action.size,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {SPEC.action.size} finite numbers {SPEC.action.components}, got {action}")
        action = SPEC.action.project(action)
        part = {f.name: action[SPEC.action.slice_of(f.name)] for f in SPEC.action.fields}
        self.arm.move(np.concatenate([part["planar"], part["lift"]]), float(part["yaw"][0]), float(part["gripper"][0]))
        success = self.task.succeeded()
        return self._observe(), float(success), success, False, self._info() | {"success": success}

    def expert_action(self) -> NDArray[np.float32]:
        """What the task's scripted expert does now; it sees the simulator's state, not the image."""
        return self.task.expert(self.arm)

    def render(self) -> NDArray[np.uint8] | None:
        """uint8 [480, 640, 3]: the scene with the arm's meshes, from beside the table."""
        if self.render_mode is None:
            return None
        if self._spectator is None:
            self._spectator = Spectator(lambda client: build_scene(client, self.task_name, meshes=True))
        return self._spectator.look(self._client)

    def close(self) -> None:
        if self._spectator is not None:
            self._spectator.close()
            self._spectator = None
        if p.isConnected(self._client):
            p.disconnect(self._client)

    def _observe(self) -> Obs:
        tool = self.arm.tool_pose()
        return {
            "depth": self._camera.depth((tool.x, tool.y, tool.z)),
            "gripper": np.array([self.arm.holding], np.float32),
        }

    def _info(self) -> dict[str, Any]:
        tool = self.arm.tool_pose()
        return {"tool_pose": np.array([tool.x, tool.y, tool.z, tool.yaw])}


def build_scene(client: int, task: str, *, meshes: bool) -> tuple[Arm, Task]:
    """Table, arm and task, always in this order, so that body ids agree between clients."""
    p.setTimeStep(1 / PHYSICS_HZ, physicsClientId=client)
    p.setGravity(0, 0, -9.81, physicsClientId=client)
    ground = p.createCollisionShape(p.GEOM_PLANE, physicsClientId=client)
    p.createMultiBody(baseCollisionShapeIndex=ground, physicsClientId=client)
    half = (0.75, 0.75, 0.01)
    p.createMultiBody(
        baseVisualShapeIndex=p.createVisualShape(
            p.GEOM_BOX, halfExtents=half, rgbaColor=(0.93, 0.93, 0.9, 1), physicsClientId=client
        ),
        basePosition=(*WORKSPACE_CENTRE, -half[2]),
        physicsClientId=client,
    )
    return Arm(client, meshes=meshes), TASKS[task](client)


def observation_of(obs: Obs) -> Observation:
    """Gymnasium's dict -> the contract's type."""
    return Observation(obs["depth"], float(obs["gripper"][0]))
