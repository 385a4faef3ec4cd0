"""The robots: which URDF, which joints, which limits. Both carry the Panda's hand, so they grasp alike."""

import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pybullet as p
import pybullet_data

ArmName = Literal["panda", "kuka"]

FINGER_TRAVEL_M = 0.04
_DATA = Path(pybullet_data.getDataPath())
_FINGER_BOX = '<visual><origin xyz="0 {y} 0.027"/><geometry><box size="0.021 0.016 0.054"/></geometry></visual>'
# A link without any visual is drawn by its collision mesh, so an invisible one gets a speck.
_SPECK = '<visual><geometry><box size="1e-6 1e-6 1e-6"/></geometry></visual>'


@dataclass(frozen=True)
class Robot:
    """An arm of seven joints with the Panda's hand."""

    urdf: Callable[[], str]
    """Its URDF, mesh paths absolute."""
    home: tuple[float, ...]
    """Joints with the tool over the workspace's centre, pointing down; where every IK solve starts from."""
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    forces_nm: tuple[float, ...]
    base_x_m: float = 0.0
    """Where it stands, so that all of the workspace is in its reach; frames are the table's, as if it stood at 0."""


def load(client: int, name: ArmName, *, meshes: bool) -> tuple[int, dict[str, int]]:
    """Load robot `name`: (body, joint index by name of the link it moves).

    Without `meshes`, visual meshes give way to one box per finger: what the observation camera is to see of a robot.
    """
    text = ROBOTS[name].urdf()
    hand = text.index('<joint name="panda_hand_joint"')
    # The arm itself never comes near anything; its collision meshes are most of what loading takes.
    text = re.sub(r"<collision>.*?</collision>", "", text[:hand], flags=re.DOTALL) + text[hand:]
    if not meshes:
        text = re.sub(r"<visual>.*?</visual>", _SPECK, text, flags=re.DOTALL)
        for finger, y in (("left", 0.008), ("right", -0.008)):
            start = text.index(_SPECK, text.index(f'<link name="panda_{finger}finger">'))
            text = text[:start] + _FINGER_BOX.format(y=y) + text[start + len(_SPECK) :]
    with tempfile.NamedTemporaryFile("w", suffix=".urdf") as file:
        file.write(text)
        file.flush()
        stand = (ROBOTS[name].base_x_m, 0, 0)
        body = p.loadURDF(file.name, basePosition=stand, useFixedBase=True, physicsClientId=client)
    joints = range(p.getNumJoints(body, physicsClientId=client))
    return body, {p.getJointInfo(body, joint, physicsClientId=client)[12].decode(): joint for joint in joints}


def arm_joints(body: int, client: int) -> list[int]:
    """The indices of the revolute joints, base first."""
    joints = range(p.getNumJoints(body, physicsClientId=client))
    return [j for j in joints if p.getJointInfo(body, j, physicsClientId=client)[2] == p.JOINT_REVOLUTE]


def _panda_urdf() -> str:
    folder = _DATA / "franka_panda"
    return (folder / "panda.urdf").read_text().replace("package://meshes", str(folder / "meshes"))


def _kuka_urdf() -> str:
    """The iiwa of pybullet_data; on its flange, from panda.urdf, everything from the hand's joint on."""
    panda = _panda_urdf()
    hand = panda[panda.index('<joint name="panda_hand_joint"') :]
    hand = hand.replace('<parent link="panda_link8"/>', '<parent link="lbr_iiwa_link_7"/>')
    # Turned so that the wrist's middle is at the same yaw as the Panda's; the flange is 45 mm beyond the last frame.
    hand = hand.replace('rpy="0 0 -0.785398163397" xyz="0 0 0"', f'rpy="0 0 {3 * math.pi / 4}" xyz="0 0 0.045"', 1)
    hand = re.sub(r'<material name="panda_white"/>', "", hand)
    folder = _DATA / "kuka_iiwa"
    kuka = (folder / "model.urdf").read_text().replace('filename="meshes', f'filename="{folder}/meshes')
    return kuka[: kuka.rindex("</robot>")] + hand


ROBOTS: dict[ArmName, Robot] = {
    "panda": Robot(
        urdf=_panda_urdf,
        home=(0.0, -0.22, 0.0, -2.55, 0.0, 2.33, math.pi / 4),
        lower=(-2.9, -1.76, -2.9, -3.07, -2.9, -0.02, -2.9),
        upper=(2.9, 1.76, 2.9, -0.07, 2.9, 3.75, 2.9),
        forces_nm=(87.0,) * 4 + (12.0,) * 3,
    ),
    "kuka": Robot(
        urdf=_kuka_urdf,
        home=(0.0, 0.3, 0.0, -1.75, 0.0, 1.09, 0.0),
        lower=(-2.96, -2.09, -2.96, -2.09, -2.96, -2.09, -3.05),
        upper=(2.96, 2.09, 2.96, 2.09, 2.96, 2.09, 3.05),
        forces_nm=(176.0, 176.0, 110.0, 110.0, 110.0, 40.0, 40.0),
        base_x_m=-0.1,  # its elbow folds less far than the Panda's
    ),
}
assert set(ROBOTS) == set(get_args(ArmName))
