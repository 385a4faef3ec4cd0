"""Draw what the robot sees while its scene is turned, for people to check: `python -m sim_client.look --help`."""

import io
import math
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import matplotlib
import tyro
from matplotlib.figure import Figure

from protos.files import require_writable, write_atomically
from protos.spaces import SPEC
from sim_client import ENV_IDS, TaskName
from sim_client.world import unwrapped

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TURNS_DEG = (0, 45, 90, 180)


@dataclass(frozen=True)
class Look:
    """Draw one scene at four turns: the rendered frame, the depth view and the expert's (dx, dy) as an arrow.

    Turned counter-clockwise seen from above, everything in the depth view, the arrow included, must turn
    counter-clockwise by the same angle. Exit code 0; 2 when there can be no such picture; 130 when it was
    interrupted.

    Example: python -m sim_client.look --output docs/images/turned.png
    """

    output: Path
    """The picture to write."""
    task: TaskName = "drawer_opening"
    """Whose scene."""
    seed: int = 6
    """Of the scene."""
    steps: int = 0
    """Let the expert act this many steps first."""

    def __post_init__(self) -> None:
        known = sorted(Figure().canvas.get_supported_filetypes().keys() - {"pgf"})  # which needs a TeX
        if self.output.suffix and self.output.suffix[1:].lower() not in known:
            raise ValueError(f"--output {self.output}: a picture's name ends in one of {', '.join(known)}")
        if self.seed < 0 or self.steps < 0:
            raise ValueError(f"--seed and --steps must not be negative, got {self.seed} and {self.steps}")


def draw(config: Look) -> None:
    """Write the picture of `config`."""
    env = gymnasium.make(ENV_IDS[config.task], render_mode="rgb_array")
    view, action_spec = SPEC.observation, SPEC.action
    planar = action_spec.slice_of("planar")
    figure, axes = plt.subplots(2, len(TURNS_DEG), figsize=(4 * len(TURNS_DEG), 7), constrained_layout=True)
    for (frame_axis, depth_axis), degrees in zip(axes.T, TURNS_DEG, strict=True):
        obs, _ = env.reset(seed=config.seed, options={"turn": math.radians(degrees)})
        for _ in range(config.steps):
            obs, *_ = env.step(unwrapped(env).expert_action())
        direction = unwrapped(env).expert_action()[planar]
        frame_axis.imshow(env.render())
        frame_axis.set_title(f"scene turned by {degrees} degrees")
        image = depth_axis.imshow(obs["depth"], cmap="viridis_r")
        tail, head = view.pixel_of(direction * 0), view.pixel_of(direction)
        depth_axis.annotate("", head[::-1], tail[::-1], arrowprops={"color": "red", "width": 2, "headwidth": 8})
        depth_axis.set_xlabel("column, towards the robot's right")
        depth_axis.set_ylabel("row, towards the robot")
    figure.colorbar(image, ax=axes[1], label="depth, m", shrink=0.8)
    save(figure, config.output, dpi=80)
    env.close()


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture in the format of its file's ending, whole or not at all, and close the figure."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    write_atomically(path, picture.getvalue())
    plt.close(figure)


def exit_code(work: Callable[[], str]) -> int:
    """Do `work` and print what it returns: 0. Else say why not: 2 where it cannot be written or a worker was killed,
    130 by Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, what is under way is cleared up
    try:
        print(work())
    except (OSError, BrokenProcessPool) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def main() -> int:
    config = tyro.cli(Look, prog="python -m sim_client.look", description=Look.__doc__)

    def drawn() -> str:
        require_writable(config.output)
        draw(config)
        return str(config.output)

    return exit_code(drawn)


if __name__ == "__main__":
    sys.exit(main())
