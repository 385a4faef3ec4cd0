"""What is learned, from what, in how long: makes docs/results.md by the public commands.

    python -m tests.benchmarks.results --rows drawer-200

Each cell is a collection, a training and 100 closed-loop episodes through the server, for one seed. Its report is kept
in docs/results with its row and the settings of its training, and a cell that has one of the row as it stands is not
made again: the study can be stopped and continued, row by row, on another day. A cell takes one core, `--jobs` of them
run at once; keep the cores free, because budgets are minutes, not updates.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from protos.files import write_atomically
from serving.policy import load
from sim_client.interval import wilson
from training.demo import server


@dataclass(frozen=True)
class Row:
    """One line of the table: what is recorded, what is trained, for how long."""

    name: str
    task: str
    data: str
    """What sim_client.collect is told."""
    train: str
    """What training.run is told."""
    minutes: float
    least: float | None = None
    """The success that is asked for."""

    @property
    def settings(self) -> dict[str, str | float]:
        """What its cells are made by."""
        return {name: getattr(self, name) for name in ("task", "data", "train", "minutes")}


BEHAVIOR = 0.4
"""What succeeds of the noisy behaviour's episodes."""
EXPERT, NOISY = "--behavior expert", f"--behavior noisy --target-success {BEHAVIOR}"
VALUES_FIRST_IQL = "--iql.values-first 0.15 --iql.temperature 0.02 --iql.largest-weight 3"
VALUES_FIRST_CQL = "--cql.values-first 0.2 --cql.largest-weight 3"
NOISY_CQL = (
    f"{VALUES_FIRST_CQL} --cql.cloning-value network --cql.cloning-temperature 0.03 --cql.conservative-weight 0.005"
)
ROWS = (
    Row("drawer-200", "drawer_opening", f"{EXPERT} --transitions 200", "--algo bc", 5, 0.92),
    Row("drawer-1000-iql", "drawer_opening", f"{EXPERT} --transitions 1000", "--algo iql", 10, 0.97),
    Row(
        "drawer-1000-cql", "drawer_opening", f"{EXPERT} --transitions 1000", f"--algo cql {VALUES_FIRST_CQL}", 20, 0.97
    ),
    Row("bowl-1000", "block_in_bowl", f"{EXPERT} --transitions 1000", "--algo bc", 15, 0.90),
    Row("stacking-2000", "block_stacking", f"{EXPERT} --transitions 2000", "--algo bc", 20, 0.80),
    Row("noisy-bc", "drawer_opening", f"{NOISY} --transitions 1000", "--algo bc", 20),
    Row("noisy-iql", "drawer_opening", f"{NOISY} --transitions 1000", f"--algo iql {VALUES_FIRST_IQL}", 20),
    Row("noisy-cql", "drawer_opening", f"{NOISY} --transitions 1000", f"--algo cql {NOISY_CQL} --threads 2", 20),
    Row("equivariant-iql", "drawer_opening", f"{EXPERT} --transitions 150", "--algo iql", 10),
    Row("plain-iql", "drawer_opening", f"{EXPERT} --transitions 150", "--algo iql --equivariance none", 10),
    Row("equivariant-cql", "drawer_opening", f"{EXPERT} --transitions 150", "--algo cql", 10),
    Row("plain-cql", "drawer_opening", f"{EXPERT} --transitions 150", "--algo cql --equivariance none", 10),
)
MARGINS = (
    ("equivariant-iql", "plain-iql", 0.25),
    ("equivariant-cql", "plain-cql", 0.25),
    ("noisy-iql", "noisy-bc", 0.10),
    ("noisy-cql", "noisy-bc", 0.10),
    ("noisy-iql", "the behaviour", 0.25),
    ("noisy-cql", "the behaviour", 0.25),
)
"""By how much one row is asked to be above another."""
ON_A_GPU = """On one NVIDIA H100, in bfloat16, with the preset `gpu`, seed 0, made by hand (reports:
results/gpu-iql-0.json, results/gpu-cql-0.json): 1.6 minutes are enough for 100 of 100 drawers, of IQL 3000 updates, of
CQL 9155, all but the first 629 of the actor alone.

    sim_client.collect --task drawer_opening --behavior expert --transitions 1000 --seed 0 --output runs/drawer1000
    training.run --dataset runs/drawer1000 --preset gpu --minutes 1.6 --algo iql --output runs/gpu-iql
    training.run --dataset runs/drawer1000 --preset gpu --minutes 1.6 --algo cql --cql.values-first 0.2 \\
        --cql.largest-weight 3 --output runs/gpu-cql
    sim_client.evaluate --task drawer_opening --episodes 100 --seed 0
"""
TRIED = """Tried before, and why the rows are as they are:

- noisy rows with 8 minutes, seeds 0 and 1: IQL at the preset's temperature of 0.05 82 % and 0 %, BC 7 % (seed 0). The
  behaviour hovers over the handle, up where it is not aligned and down where it is; an actor that cannot tell answers
  with the mean of both, and stays there. Seed 1 at temperature 0.02: 25 %, and 75 % with 20 minutes; at 0.01: 14 %.
- noisy rows with 20 minutes, seeds 0 and 1, all learned at once: IQL at temperature 0.02 69 % and 76 %, CQL as in the
  preset 84 % and 74 %. Values first, but weights clipped at 100: 50 of the 1000 transitions had most of the weight.
  noisy-cql, seeds 0 and 1, at temperature 0.02: 82 % and 95 %, the same resting after 30 % of the budget 84 % and 96 %,
  with a cloning weight of 10, so that the actor hardly climbs Q, 82 % and 93 %.
- What the noisy rows fail at: in all 18 failures of 200 that were looked at (IQL, data of seed 0), the arm stands still
  at hovering height some centimetres beside the handle, where the data have no state. They are 25 long episodes, and
  the first three steps of each, the way there, are 7.5 % of the transitions. A quarter of those had weights below 0.03,
  of at most 3, by CQL at temperature 0.02 (hence its preset's 0.05 now), below 0.3 by IQL. For IQL at 0.1, seed 0
  succeeded in 275 of 300 scenes, as at 0.02, and with transitions drawn by 0.9^step besides in 274. Weights matter,
  though: BC from all episodes alike hovers, 0 of 300 after 8 minutes, 68 after 17 with group D8 and half the fields.
  Weight decay of 0.3 (AdamW), 8600 updates, IQL as in its row, seed 0: 266 of 300.
- noisy-cql with V a head on the critic's features, and an actor that climbs Q while values rest, as drawer-1000-cql:
  83 %, 95 % and 83 %. What its weights prefer (seed 2): a conservative weight of 0.1 also holds down what is rare in
  the data. After 600 updates of the values alone, at temperature 0.02, actions that rise again from the handle (a fifth
  of the data) have 0.63 of the mean weight, those that go down 1.50; with 0.02 instead, 0.20 and 1.75; of IQL, 0.11 and
  1.89. With 0.02 and temperature 0.02 seed 2 has 96 %, but seed 0 75 %: of the first three steps of its episodes, the
  way to the handle, 60 % weigh less than a tenth of the mean; at 0.005 and 0.02 35 %, at 0.005 and 0.05 1 %, of IQL
  8 %. With 0.005 and 0.05 seed 0 has 83 % again. With V a network of its own, 0.005 and 0.03, 4 % of those steps are
  lost, and what rises and goes down weighs 0.16 and 1.77 (seed 0), 0.19 and 1.77 (seed 2). So the row is made: two
  cores of an Intel Xeon without bfloat16, 6557, 5358 (beside it, tests ran) and 5695 updates. `--cql.cloning-value
  network` was no flag yet then, but how it was; the weights are the same with it, compared after ten updates of both
  parts.
- drawer-1000-cql: one core each of that Xeon, 3895, 3815 and 3300 updates. When the actor still climbed Q while values
  rested, on a faster machine, it had 100 %, 100 % and 99 %.
- drawer-1000-cql, all learned at once, 20 minutes: 94 %, 98 % and 98 %.
- All cells but noisy-cql's and drawer-1000-cql's were made when the simulator still took a gripper that is half closed
  on nothing for one that holds. Played again without that, the old noisy-cql 0 and 1, noisy-iql 2 and noisy-bc 2 have
  84, 95, 97 and 81 %, instead of 83, 95, 97 and 81.
- All cells were made when a block between fingers parted nearly as far as it is wide (a command of 0.53 to 0.58)
  counted as let go. Played under either rule, policies made later by the rows' commands (two seeds each, on a core with
  half the rate) have 86 and 86, 82 and 82 % in the bowl, of the same episodes, and 89 and 90, 81 and 79 % in stacking.
  A bowl that had fallen over would have counted, too; without that, those policies succeed in the same episodes.
- bowl-1000 needs its updates: on that core its 15 minutes hold 2561 and 3375, and seeds 0 and 1 have 86 and 82 %,
  seed 1 with 28 minutes, 6177 updates, 92 %; stacking-2000's 20 minutes hold 4325 and 3905: 90 and 79 %.
- stacking-2000, seed 2, was made on a machine without AVX-512 and bfloat16: 3746 updates. There, one of BC takes 0.23 s
  on two cores (`tests.benchmarks.update_time --presets cpu --precisions fp32`), on the others' 0.07. The old noisy-cql,
  seed 2, has 70 % there after 40 minutes, 4660 updates; elsewhere, 20 minutes hold 5600 of the actor alone.
- equivariant-cql when cloning was weighed by the advantage over the policy's own action, with a soft maximum at
  temperature 1 (weight 0.01): 82 % and 47 %; plain-cql: 36 % and 23 %; noisy-cql with 8 minutes: 79 % and 56 %.
"""


@dataclass(frozen=True)
class Study:
    """Make the table of results, or the part of it that is missing."""

    home: Path = Path("runs/results")
    """Data and runs go here."""
    output: Path = Path("docs/results.md")
    """The page with the table. The reports lie beside it, in a folder of its name."""
    rows: tuple[str, ...] = ()
    """Names of rows to make; empty: all. Rows that were made earlier are shown in any case."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of data, training and evaluated scenes."""
    episodes: int = 100
    """Closed-loop episodes for each cell."""
    jobs: int = 2
    """Cells at once, a core each; 1: one that has them all, as rows need with more than one thread."""
    train: bool = True
    """--no-train: only write the page of the cells that there are."""


def run(*command: str) -> None:
    print(f"python -m {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def collect(row: Row, seed: int, study: Study) -> Path:
    """Record a cell's data, unless another cell had the same."""
    data = study.home / "data" / f"{row.task}-{re.sub('[^a-z0-9]+', '-', row.data).strip('-')}-{seed}"
    if not data.exists():
        run(
            "sim_client.collect", "--task", row.task, *row.data.split(), "--seed", str(seed), "--output", str(data)
        )  # fmt: skip
    return data


def make(row: Row, seed: int, study: Study) -> None:
    """Train, serve and evaluate one cell."""
    report, home, numbered = _report(row, seed, study), study.home / f"{row.name}-{seed}", ("--seed", str(seed))
    shutil.rmtree(home, ignore_errors=True)  # of a cell that was stopped: what it did in its minutes is not known
    run(
        "training.run", "--dataset", str(collect(row, seed, study)), "--augmentation", "o2", "--threads", "1",
        *row.train.split(), "--minutes", f"{row.minutes:g}", *numbered, "--output", str(home),
    )  # fmt: skip
    with server(home / "policy.onnx", "--intra-op-threads", "1") as address:
        run(
            "sim_client.evaluate", "--server", address, "--task", row.task, "--episodes", str(study.episodes),
            *numbered, "--report", str(report),
        )  # fmt: skip
    training = json.loads((home / "config.json").read_text())
    found = json.loads(report.read_text()) | {
        "row": row.settings,
        "training": training,
        "updates": load(home / "policy.onnx").manifest.updates,  # budgets are minutes: what a machine makes of them
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    write_atomically(report, (json.dumps(found, indent=2) + "\n").encode())


def take_core(cores: Iterator[int]) -> None:
    """For this thread and the processes that it starts: cells would else take of each other's minutes."""
    os.sched_setaffinity(0, [next(cores)])


def _report(row: Row, seed: int, study: Study) -> Path:
    return study.output.with_suffix("") / f"{row.name}-{seed}.json"


def reports(row: Row, study: Study) -> dict[int, dict[str, Any]]:
    """By seed: those of cells that were made as the row stands now."""
    paths = {seed: _report(row, seed, study) for seed in study.seeds}
    found = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}
    return {seed: report for seed, report in found.items() if report.get("row") == row.settings}


def table(study: Study) -> str:
    """The rows that have been made, in Markdown."""
    lines = [
        "| row | task | data | training | minutes | success by seed | mean | 95 % interval | asked for |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        made = reports(row, study).values()
        if made:
            wins, episodes = (sum(r[name] for r in made) for name in ("successes", "episodes"))
            interval = wilson(wins, episodes)
            rates = [r["success_rate"] for r in made]
            lines.append(
                f"| {row.name} | {row.task} | `{row.data}` | `{row.train}` | {row.minutes:g} | "
                f"{', '.join(f'{rate:.0%}' for rate in rates)} | **{np.mean(rates):.0%}** | "
                f"{interval.low:.0%} to {interval.high:.0%} | {f'{row.least:.0%}' if row.least else ''} |"
            )
    return "\n".join(lines) + "\n"


def margins(study: Study) -> str:
    """What rows of the same data and minutes say of each other, by the seeds that both have."""
    made = {row.name: _rates(row, study) for row in ROWS}
    made["the behaviour"] = dict.fromkeys(study.seeds, BEHAVIOR)
    lines = []
    for upper, lower, least in MARGINS:
        if both := made[upper].keys() & made[lower].keys():
            points = 100 * np.mean([made[upper][seed] - made[lower][seed] for seed in both])
            lines.append(f"- {upper} over {lower}: {points:+.0f} points, asked for {100 * least:.0f}\n")
    return "".join(lines)


def _rates(row: Row, study: Study) -> dict[int, float]:
    return {seed: report["success_rate"] for seed, report in reports(row, study).items()}


def page(study: Study) -> str:
    missing = [row.name for row in ROWS if len(reports(row, study)) < len(study.seeds)]
    return (
        "# Results\n\nClosed-loop success through the server after training on ONE CPU core, unless a row says more; "
        f"{study.episodes} episodes per seed; preset `cpu`, `--augmentation o2`. Made by\n\n"
        "    python -m tests.benchmarks.results\n\n"
        "Each cell is `sim_client.collect`, `training.run`, `serving.server` and `sim_client.evaluate` with the flags "
        "of its row; its report is in [results/](results). The intervals are Wilson's, over all episodes of a row's "
        "policies: how much seeds differ is in the column before. "
        f"In the noisy rows, the behaviour itself succeeds in {100 * BEHAVIOR:g} % of its episodes.\n\n"
        + table(study)
        + "\n"
        + margins(study)
        + f"\n{ON_A_GPU}\n{TRIED}"
        + (f"\nNot measured yet, or not with all seeds: {', '.join(missing)}.\n" if missing else "")
    )


def main() -> None:
    study = tyro.cli(Study, description=Study.__doc__)
    unknown = set(study.rows) - {row.name for row in ROWS}
    if unknown:
        sys.exit(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    cells = [(row, seed) for seed in study.seeds for row in ROWS if not study.rows or row.name in study.rows]
    cells = [(row, seed) for row, seed in cells if study.train and seed not in reports(row, study)]
    for row, seed in cells:
        collect(row, seed, study)
    cores = iter(sorted(os.sched_getaffinity(0)))
    apart = {"initializer": take_core, "initargs": (cores,)} if study.jobs > 1 else {}
    with ThreadPoolExecutor(study.jobs, **apart) as pool:
        for _ in pool.map(lambda cell: make(*cell, study), cells):
            write_atomically(study.output, page(study).encode())
    write_atomically(study.output, page(study).encode())
    print("\n" + table(study))


if __name__ == "__main__":
    main()
