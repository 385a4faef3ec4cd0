"""The only episode loop: collection drives it with an expert, evaluation with a server's answers."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from sim_client.env import Obs
from sim_client.episodes import Episode

Act = Callable[[Obs, dict[str, Any]], NDArray[np.float32]]
"""(observation, info) -> action float32 [5]; info holds "tool_pose"."""


def rollout(env: gymnasium.Env[Obs, NDArray[np.float32]], act: Act, seed: int) -> Episode:
    """Run one episode from `seed` until it terminates or is truncated."""
    obs, info = env.reset(seed=seed)
    seen, actions, rewards = [obs], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        action = act(obs, info)
        obs, reward, terminated, truncated, info = env.step(action)
        seen.append(obs)
        actions.append(action)
        rewards.append(reward)
    return Episode(
        seed=seed,
        depth=np.stack([o["depth"] for o in seen]),
        gripper=np.stack([o["gripper"] for o in seen]),
        action=np.stack(actions),
        reward=np.array(rewards, np.float32),
        terminated=terminated,
        truncated=truncated and not terminated,  # of its very last step, Gymnasium's time limit says both
        rgb=np.stack([o["rgb"] for o in seen]) if "rgb" in obs else None,
    )
