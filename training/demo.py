"""`make demo`: from nothing to a served, evaluated policy, through the same commands that a user types."""

import contextlib
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from protos.errors import Rejected
from protos.files import write_atomically
from sim_client.seeds import EVALUATED_PER_SEED, RECORDED_PER_SEED, SEEDS
from sim_client.workers import Partial
from training.names import POLICY

MARKER = "demo.json"
"""The demo's settings; in a directory without it, nothing is the demo's to remove."""
SERVING_LINE = "serving on "
"""What the server prints, followed by its address, once it takes calls."""


@dataclass(frozen=True)
class Demo:
    """Collect expert episodes, train, export, serve, close the loop, report.

    Each stage is one of the public commands, printed before it runs, so that it can be copied and changed.
    """

    output: Path = Path("runs/demo")
    """Everything goes here; what an earlier demo left is replaced, what others left is refused."""
    seed: int = 0
    """Of the collected scenes, the training and the evaluated scenes."""
    episodes: int = 40
    """Expert episodes to learn from."""
    minutes: float = 5.0
    """Of training."""
    eval_episodes: int = 50
    """Closed-loop episodes."""
    setup_seconds: float = 0.0
    """What the set-up took, for the report."""

    def __post_init__(self) -> None:
        """What its commands would refuse, before anything of an earlier demo is removed."""
        for name, least, most in (
            ("episodes", 1, RECORDED_PER_SEED), ("eval_episodes", 1, EVALUATED_PER_SEED), ("seed", 0, SEEDS - 1)
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {least}, and at most {most}, got {getattr(self, name)}")
        if not 0 < self.minutes < math.inf:
            raise ValueError(f"--minutes must be positive and finite, got {self.minutes}")


class Stages:
    """Runs the commands one after another and remembers how long each took."""

    def __init__(self, setup_seconds: float) -> None:
        self.seconds: dict[str, float] = {"setup": setup_seconds}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    def run(self, name: str, *command: str) -> None:
        print(f"\n== {name}: python -m {shlex.join(command)}", flush=True)
        with self.timed(name):
            subprocess.run([sys.executable, "-m", *command], check=True)


@contextlib.contextmanager
def server(policy: Path, *flags: str) -> Iterator[str]:
    """A policy server in a process of its own; yields its address, ends it with SIGTERM."""
    command = ["serving.server", "--policy", str(policy), "--listen", "localhost:0", *flags]
    print(f"\n== serve: python -m {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None  # for the type checker: it is a pipe
        line = next((line for line in process.stdout if line.startswith(SERVING_LINE)), None)
        if line is None:
            raise RuntimeError(f"the server ended with exit code {process.wait()} before it took calls; see above")
        print(line, end="", flush=True)
        yield line.removeprefix(SERVING_LINE).strip()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def demonstrate(config: Demo) -> Path:
    """Run all stages and return the report's path.

    Raises:
        Rejected: when the output directory holds what no demo has left; nothing has been removed then.
        CalledProcessError: when a stage fails.
    """
    data, run = config.output / "data", config.output / "train"
    policy, report_path = config.output / POLICY, config.output / "report.json"
    _make_room(config, data, run, Partial.folder_of(data), policy, report_path)
    seed = ("--seed", str(config.seed))
    stages = Stages(config.setup_seconds)
    stages.run("collect", "sim_client.collect", "--episodes", str(config.episodes), *seed, "--output", str(data))
    stages.run(
        "train", "training.run", "--dataset", str(data), "--algo", "bc", "--equivariance", "both", "--preset", "cpu",
        "--augmentation", "o2", "--minutes", f"{config.minutes:g}", *seed, "--output", str(run),
    )  # fmt: skip
    write_atomically(policy, (run / POLICY).read_bytes())
    with contextlib.ExitStack() as stack:
        with stages.timed("serve"):
            address = stack.enter_context(server(policy))
        stages.run(
            "evaluate", "sim_client.evaluate", "--server", address, "--task", "drawer_opening",
            "--episodes", str(config.eval_episodes), *seed, "--report", str(report_path),
        )  # fmt: skip
    report = json.loads(report_path.read_text())
    report["seconds"] = stages.seconds | {"total": round(sum(stages.seconds.values()), 1)}
    report["demonstrations"] = config.episodes
    write_atomically(report_path, (json.dumps(report, indent=2) + "\n").encode())
    return report_path


def _make_room(config: Demo, *places: Path) -> None:
    """Remove what an earlier demo left in `places`: a policy or a report of it would look like this one's."""
    marker = config.output / MARKER
    taken = [place for place in places if place.exists()]
    if taken and not marker.exists():
        found = f"{', '.join(place.name for place in taken)} in {config.output}, and no {MARKER} beside"
        raise Rejected("--output", "a directory of its own", found, "choose another, or remove them yourself")
    for place in taken:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    write_atomically(marker, (json.dumps(asdict(config), indent=2, default=str) + "\n").encode())


def main() -> int:
    config = tyro.cli(Demo, prog="python -m training.demo", description=Demo.__doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, nothing is left running
    try:
        path = demonstrate(config)
    except (Rejected, subprocess.CalledProcessError, RuntimeError, OSError) as error:
        print(f"\nthe demo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    report = json.loads(path.read_text())
    print(
        f"\nsuccess rate {report['success_rate']:.0%}: {report['successes']} of {report['episodes']} episodes, "
        f"95 % interval {report['wilson_low']:.0%} to {report['wilson_high']:.0%}, "
        f"learned from {config.episodes} demonstrations\n"
        f"seconds per stage: {report['seconds']}\n"
        f"policy {config.output / POLICY}\nreport {path}\nlogs   tensorboard --logdir {config.output / 'train'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
