"""The stand-in robot. Importing it registers the Gymnasium ids; PyBullet loads when an environment is made."""

import gymnasium

ENV_IDS = {"drawer_opening": "equiserve/DrawerOpening-v0"}
"""Task name, as commands spell it -> Gymnasium id. A changed task gets a new version, never the old id."""

MAX_STEPS = 50

for _task, _id in ENV_IDS.items():
    gymnasium.register(
        id=_id, entry_point="sim_client.env:TabletopEnv", kwargs={"task": _task}, max_episode_steps=MAX_STEPS
    )
