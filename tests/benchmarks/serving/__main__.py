"""The numbers of docs/serving.md: `python -m tests.benchmarks.serving --policy runs/demo/policy.onnx`.

Each requirement is measured with a server in a process of its own, on this machine, which must be quiet.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

from tests.benchmarks.serving import endurance, overhead, pressure
from tests.benchmarks.serving.measure import Row

MEASURES: dict[str, Callable[[Path, Path], list[Row]]] = {
    "overhead": overhead.overhead,
    "idle": overhead.idle,
    "fuzz": endurance.fuzzing,
    "envelope": endurance.envelope,
    "overload": pressure.overload,
    "order": endurance.order,
    "reloads": endurance.reloads,
    "loads": pressure.loads,
    "batching": pressure.batching,
    "drains": endurance.drains,
    "isolation": pressure.isolation,
    "soak": endurance.soak,
}


@dataclass(frozen=True)
class Measure:
    """Measure what docs/serving.md promises; about 45 minutes for all of it, 28 of them the soak."""

    policy: Path = Path("runs/demo/policy.onnx")
    """A policy of the cpu preset, as `make demo` leaves it."""
    only: tuple[str, ...] = ()
    """Names of measurements; empty: all."""


def host() -> str:
    models = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(models)} x {models[0].strip()}, onnxruntime {version('onnxruntime')}, grpcio {version('grpcio')}"


def main() -> None:
    asked = tyro.cli(Measure, description=Measure.__doc__)
    print(f"{host()}; `python -m tests.benchmarks.serving --policy {asked.policy} --only ...`\n")
    print("| command | requirement | measured | met |\n|---|---|---|---|", flush=True)
    for name, measure in MEASURES.items():
        if not asked.only or name in asked.only:
            with tempfile.TemporaryDirectory() as scratch:
                for row in measure(asked.policy.resolve(), Path(scratch)):
                    print(f"| `--only {name}` {row}", flush=True)


if __name__ == "__main__":
    main()
