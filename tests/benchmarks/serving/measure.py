"""What every measurement shares: a server in a process of its own, and one row of docs/serving.md."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Row:
    """One requirement, what was measured, and whether that is enough."""

    requirement: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"| {self.requirement} | {self.measured} | {'yes' if self.met else '**no**'} |"


@dataclass(frozen=True)
class Running:
    address: str
    process: subprocess.Popen[str]


@contextmanager
def apart() -> Iterator[set[int]]:
    """Callers, that is this process and those it starts, on one half of the cores; the other half is the server's.

    Hundreds of calls a second take as much of a machine as their answers. On cores that both share, who asks would
    slow down who answers, and neither could be told from the other.
    """
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    half = len(cores) // 2
    if not half:
        raise RuntimeError("needs two cores: one for the server, one for its callers")
    os.sched_setaffinity(0, cores[half:])
    try:
        yield set(cores[:half])
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def served(policy: Path, *flags: str, quiet: bool = True, cores: set[int] | None = None) -> Iterator[Running]:
    """A server of `policy` on a free port, with its defaults but for `flags`; on `cores`, with a thread for each."""
    command = [sys.executable, "-m", "serving.server", "--policy", str(policy), "--listen", "localhost:0", *flags]
    if cores:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command, "--intra-op-threads", str(len(cores))]
    log = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving on "):
            raise RuntimeError(f"the server did not start: {line}")
        try:
            yield Running(line.split()[-1], process)
        finally:
            process.terminate()
            process.wait(20)


def benched(address: str, *flags: str) -> dict:
    """What `python -m serving.bench` measures, from a process of its own."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "bench.json"
        command = [sys.executable, "-m", "serving.bench", "--server", address, *flags, "--output", str(output)]
        subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=False)
        return json.loads(output.read_text())
