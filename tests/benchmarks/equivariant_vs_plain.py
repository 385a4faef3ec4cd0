"""What equivariance is worth: same data, minutes and seeds, with and without.

Prints the success columns of the README's table; the others are what training.run says.

    python -m tests.benchmarks.equivariant_vs_plain --output runs/study

Each cell is made by the public commands: collect, train, serve, evaluate. Takes about five minutes a cell; keep the
machine free, because both networks are given time, not updates. A cell whose report exists is not made again.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from training.demo import server


@dataclass(frozen=True)
class Study:
    """Train and evaluate the equivariant and the plain network on the same data, for the same minutes."""

    output: Path
    """Data, runs and reports go here."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of data, training and evaluated scenes."""
    episodes: int = 20
    """Expert episodes to learn from."""
    minutes: float = 4.0
    """Of training, for each network."""
    eval_episodes: int = 50
    """Closed-loop episodes for each cell."""
    algo: str = "bc"
    """bc, iql or cql."""


def run(*command: str) -> None:
    print(f"python -m {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def cell(study: Study, equivariance: str, seed: int) -> float:
    """Success rate of one network with one seed."""
    data, home = study.output / f"data-{seed}", study.output / f"{equivariance}-{seed}"
    report, numbered = study.output / f"{equivariance}-{seed}.json", ("--seed", str(seed))
    if not report.exists():
        if not data.exists():
            run("sim_client.collect", "--episodes", str(study.episodes), *numbered, "--output", str(data))
        run(
            "training.run", "--dataset", str(data), "--algo", study.algo, "--equivariance", equivariance,
            "--preset", "cpu", "--augmentation", "o2", "--minutes", f"{study.minutes:g}", *numbered,
            "--output", str(home),
        )  # fmt: skip
        with server(home / "policy.onnx") as address:
            run(
                "sim_client.evaluate", "--server", address, "--task", "drawer_opening",
                "--episodes", str(study.eval_episodes), *numbered, "--report", str(report),
            )  # fmt: skip
    return float(json.loads(report.read_text())["success_rate"])


def main() -> None:
    study = tyro.cli(Study, description=Study.__doc__)
    print_table(study, {e: [cell(study, e, seed) for seed in study.seeds] for e in ("both", "none")})


def print_table(study: Study, success: dict[str, list[float]]) -> None:
    names = {"both": "equivariant (C8)", "none": "plain CNN"}
    print("\n| network | " + " | ".join(f"seed {s}" for s in study.seeds) + " | mean |")
    print("|---|" + "---|" * (len(study.seeds) + 1))
    for equivariance, rates in success.items():
        cells = " | ".join(f"{rate:.0%}" for rate in rates)
        print(f"| {names[equivariance]} | {cells} | **{np.mean(rates):.0%}** |")


if __name__ == "__main__":
    main()
