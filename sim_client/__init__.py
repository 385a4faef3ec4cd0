"""The stand-in robot. Importing it registers the Gymnasium ids; PyBullet loads when an environment is made."""

from typing import Literal, get_args

import gymnasium

TaskName = Literal[
    "drawer_opening",
    "block_in_bowl",
    "block_stacking",
    "block_picking",
    "block_pushing",
    "block_pushing_tilted",
    "drawer_opening_fixed_side",
]
"""What a command's --task may say."""

ENV_IDS: dict[TaskName, str] = {
    task: f"equiserve/{''.join(word.capitalize() for word in task.split('_'))}-v0" for task in get_args(TaskName)
}
"""Task name, as commands spell it -> Gymnasium id. A changed task gets a new version, never the old id."""

MAX_STEPS = 50

for _task, _id in ENV_IDS.items():
    gymnasium.register(
        id=_id, entry_point="sim_client.env:TabletopEnv", kwargs={"task": _task}, max_episode_steps=MAX_STEPS
    )
