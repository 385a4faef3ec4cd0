"""The Gymnasium environment: an arm over a table, a task, and the observation and action of the contract."""

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
import pybullet as p
from numpy.typing import NDArray

from protos.spaces import SPEC, Observation, View, side_view
from sim_client.arm import CONTROL_PERIOD_S, PHYSICS_HZ, WORKSPACE_CENTRE, Arm
from sim_client.camera import camera
from sim_client.clutter import Clutter
from sim_client.objects import GRAVITY_M_S2, Traits
from sim_client.randomization import Misplacement, Randomization
from sim_client.robots import ArmName
from sim_client.spectator import Spectator
from sim_client.store import action_space, observation_space
from sim_client.tasks import Task, maker

CLOSED = -1
"""No client of PyBullet's."""
Obs = dict[str, NDArray[Any]]
ViewName = Literal["topdown", "side"]


class TabletopEnv(gymnasium.Env[Obs, NDArray[np.float32]]):
    """One task on the table.

    Observation: {"depth": float32 [H, W] metres, "gripper": float32 [1]}, and "rgb": uint8 [H, W, 3] in the side view.
    Action: float32 [5], physical units, in the order of `protos.spaces.ACTION`. Reward: 1 at success, which
    terminates, else 0. `reset(options={"turn": angle})` turns the whole initial scene about the workspace's centre.

    Args:
        task: see `sim_client.ENV_IDS`.
        strength: of what breaks the symmetry, 0 to 1, in the tasks that have it.
        arm: which robot; both have the same gripper.
        view: the contract's top-down depth view, or a side view.
        elevation_deg: how steeply the side view's camera looks down, 15 to 90.
        randomize: what differs from episode to episode, by the names of `Randomization`'s fields.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1 / CONTROL_PERIOD_S}  # noqa: RUF012, Gymnasium's own name

    def __init__(
        self,
        task: str,
        *,
        strength: float | None = None,
        arm: ArmName = "panda",
        view: ViewName = "topdown",
        elevation_deg: float = 45.0,
        randomize: Mapping[str, float] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if view == "side" and not 15 <= elevation_deg <= 90:
            raise ValueError(f"the side view looks down at 15 to 90 degrees, got {elevation_deg}")
        self.render_mode = render_mode
        self.spec_of_policy = SPEC if view == "topdown" else side_view(elevation_deg)
        self._make_task, self._arm_name = maker(task, strength), arm
        self.randomization = Randomization(**(randomize or {}))  # type: ignore[arg-type]
        in_color = self.spec_of_policy.observation.view is View.SIDE
        self.observation_space = observation_space(self.spec_of_policy.observation, rgb=in_color)  # type: ignore[assignment]
        self.action_space = action_space(self.spec_of_policy.action)  # type: ignore[assignment]
        self._client = p.connect(p.DIRECT)
        self._camera = camera(self._client, self.spec_of_policy.observation)
        self._misplacement, self._latency_s = Misplacement(), 0.0
        self._spectator: Spectator | None = None
        self._build(Traits())

    def _build(self, traits: Traits) -> None:
        self._traits = traits
        p.resetSimulation(physicsClientId=self._client)
        in_full = self.spec_of_policy.observation.view is View.SIDE
        self.arm, self.task, self._clutter = self._build_scene(self._client, in_full=in_full)

    def _build_scene(self, client: int, *, in_full: bool) -> tuple[Arm, Task, Clutter]:
        """Table, arm, task, clutter, always in this order. What the top-down camera need not see is drawn `in_full`."""
        p.setTimeStep(1 / PHYSICS_HZ, physicsClientId=client)
        p.setGravity(0, 0, -GRAVITY_M_S2, physicsClientId=client)
        # Bullet's 20 mm and 50 iterations keep contacts alive that are none; half of a step's time went there.
        p.setPhysicsEngineParameter(contactBreakingThreshold=0.002, numSolverIterations=20, physicsClientId=client)
        # A body without a visual is drawn by its collision shape, and a plane that fills the image is most of a frame's
        # time. The top-down camera knows where the table is, so it has a visual that nobody sees.
        half, middle = ((0.75, 0.75, 0.01), (*WORKSPACE_CENTRE, -0.01)) if in_full else ((1e-6,) * 3, (0, 0, 0))
        table = p.createMultiBody(
            baseCollisionShapeIndex=p.createCollisionShape(p.GEOM_PLANE, physicsClientId=client),
            baseVisualShapeIndex=p.createVisualShape(
                p.GEOM_BOX, halfExtents=half, visualFramePosition=middle, rgbaColor=(0.93, 0.93, 0.9, 1),
                physicsClientId=client,
            ),
            physicsClientId=client,
        )  # fmt: skip
        # Bullet multiplies the friction of two bodies; with 1 here a body's own is its friction on the table.
        p.changeDynamics(table, -1, lateralFriction=1.0, physicsClientId=client)
        arm = Arm(client, self._arm_name, meshes=in_full)
        return arm, self._make_task(client, self._traits), Clutter(client, self.randomization.distractors)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        how, rng = self.randomization, self.np_random
        # A new world: contacts, solver warm starts and the order of its pairs would leak from the last episode into
        # this one through restoreState, 1e-5 m at a time. Same seed, same trajectory.
        self._build(how.traits(rng))
        if how.of_objects:
            self._close_spectator()
        turn = float((options or {}).get("turn", 0.0))
        start = self.task.reset(rng, turn)
        self.arm.reset(start)
        self._clutter.scatter(rng, turn, self.task.footprints())
        self._misplacement = Misplacement.drawn(how, rng)
        self._latency_s = rng.uniform(0, how.latency_s)
        return self._observe(), self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        """One control step. Out-of-bound fields are shortened to their bound; NaN and wrong shapes are errors."""
        spec, action = self.spec_of_policy.action, np.asarray(action, np.float32)
        if action.shape != (spec.size,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {spec.size} finite numbers {spec.components}, got {action}")
        action = spec.project(action)
        part = {f.name: action[spec.slice_of(f.name)] for f in spec.fields}
        self.arm.move(
            np.concatenate([part["planar"], part["lift"]]),
            float(part["yaw"][0]),
            float(part["gripper"][0]),
            latency_s=self._latency_s,
        )
        success = self.task.succeeded(self.arm)
        return self._observe(), float(success), success, False, self._info() | {"success": success}

    def expert_action(self) -> NDArray[np.float32]:
        """What the task's scripted expert does now; it sees the simulator's state, not the image."""
        return self.task.expert(self.arm)

    def render(self) -> NDArray[np.uint8] | None:
        """uint8 [480, 640, 3]: the scene with the arm's meshes, from beside the table."""
        if self.render_mode is None:
            return None
        if self._spectator is None:
            self._spectator = Spectator(lambda client: self._build_scene(client, in_full=True))
        return self._spectator.look(self._client)

    def close(self) -> None:
        self._close_spectator()
        client, self._client = self._client, CLOSED  # PyBullet gives a number again: it would be another's
        if client != CLOSED and p.isConnected(client):
            p.disconnect(client)

    def _close_spectator(self) -> None:
        if self._spectator is not None:
            self._spectator.close()
            self._spectator = None

    def _observe(self) -> Obs:
        tool = self.arm.tool_pose()
        frame = self._camera.look((tool.x, tool.y, tool.z), self._misplacement)
        depth = self.randomization.degrade(frame.depth, self.spec_of_policy.observation, self.np_random)
        obs: Obs = {"depth": depth, "gripper": np.array([self.arm.holding], np.float32)}
        return obs if frame.rgb is None else obs | {"rgb": frame.rgb}

    def _info(self) -> dict[str, Any]:
        tool = self.arm.tool_pose()
        return {"tool_pose": np.array([tool.x, tool.y, tool.z, tool.yaw]), "orientation": self.task.orientation}


def observation_of(obs: Obs) -> Observation:
    """Gymnasium's dict -> the contract's type."""
    return Observation(obs["depth"], float(obs["gripper"][0]))
