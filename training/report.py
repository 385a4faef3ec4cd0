"""Runs of training side by side: one HTML page with their curves and a table. `python -m training.report --help`."""

import contextlib
import functools
import hashlib
import html
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import onnx
import tyro
from google.protobuf.message import DecodeError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from protos.errors import Rejected
from protos.files import write_atomically
from protos.manifest import Manifest
from sim_client.interval import wilson
from training.config import RunConfig, recorded
from training.names import POLICY, TENSORBOARD
from training.webpage import image, page, table

SMOOTHED_OVER = 0.03
"""Losses of single batches are noise, drawn pale: the curve is their moving average over this share of a run."""
RATE = "success/rate"
FEW = 5
"""Points of a curve that are drawn large."""
INTERVAL = ("success/wilson_low", "success/wilson_high")
USUAL = {"arm": "panda", "view": "topdown", "elevation_deg": 45.0}
"""`sim_client.world.World` by default, whose other settings are 0 or left out; not imported: it loads the simulator."""
COLUMNS = (
    "run", "algorithm", "equivariance", "dataset", "seed", "updates", "minutes", "ms per update", "success in training",
    "success through the server", "equivariance error at 90 / 45 degrees",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Compare runs of training: curves, and a table with settings, time, success and equivariance.

    Success through the server is read from any *.json in a run's directory, or in the one above, that
    `sim_client.evaluate --report` wrote for its policy.onnx: of several, that of its own task in the default world.
    Exit code 1: there is no page.

    Example: python -m training.report runs/bc runs/iql --output runs/compared.html
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output directories of training.run; they may still be training."""
    output: Path = Path("report.html")
    """Where the page goes."""


@dataclass(frozen=True)
class Run:
    """What a run's directory holds, as far as it has come."""

    name: str
    config: RunConfig
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    """(updates, values) by tag."""
    manifest: Manifest | None
    served: list[dict[str, Any]]
    """The reports of evaluations of its policy, that of its own task in the default world first."""

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises Rejected when `path` is no run."""
        config = recorded(path)
        events = EventAccumulator(str(path / TENSORBOARD), size_guidance={SCALARS: 0})
        curves = {}
        with contextlib.suppress(DirectoryDeletedError):  # a run that has not logged yet
            events.Reload()
        for tag in events.Tags()["scalars"]:
            points = sorted({e.step: e.value for e in events.Scalars(tag)}.items())  # evaluations come in when they can
            steps, values = zip(*points, strict=True)
            curves[tag] = np.array(steps), np.array(values)
        _leave_out_what_is_being_written(curves)
        policy = path / POLICY
        manifest, served = None, []
        if policy.exists():
            manifest = _manifest(policy)
            served = _served(path, hashlib.sha256(policy.read_bytes()).hexdigest())
        return cls(path.name, config, curves, manifest, served)

    def row(self) -> list[str]:
        """The run's line in the table, in the order of COLUMNS."""
        c = self.config
        updates = int(max((steps[-1] for steps, _ in self.curves.values()), default=0))
        took_ms = self.curves["time/update_ms"][1] if "time/update_ms" in self.curves else np.array([math.nan])
        minutes = updates * float(np.mean(took_ms)) / 60e3  # not the median: where values come first, updates differ
        m = self.manifest
        errors = "" if m is None else f"{m.equivariance_error_90:.1e} / {m.equivariance_error_45:.1e}"
        return [
            self.name, c.algo, f"{c.equivariance}, {c.network.group}", c.dataset.name, str(c.seed), f"{updates:,}",
            f"{minutes:.1f}", f"{np.median(took_ms):.0f}", self._in_training(), self._through_the_server(),
            errors,
        ]  # fmt: skip

    def _in_training(self) -> str:
        if RATE not in self.curves:
            return ""
        steps, rates = self.curves[RATE]
        lows, highs = (self.curves[tag][1] for tag in INTERVAL)
        best = int(np.lexsort((steps, lows))[-1])  # as `training.evaluations.best` has it
        low, high = lows[best], highs[best]
        return f"best {rates[best]:.0%} ({low:.0%} to {high:.0%}) at update {steps[best]:,}, last {rates[-1]:.0%}"

    def _through_the_server(self) -> str:
        if not self.served or self.manifest is None:
            return ""
        first = self.served[0]
        interval = wilson(first["successes"], first["episodes"])
        unusual = "".join(f", {words}" for words in _unusual(first))
        return (
            f"{first['success_rate']:.0%} ({interval.low:.0%} to {interval.high:.0%})"
            f" at update {self.manifest.updates:,}{unusual}"  # the run may have gone on since its export
            + (f"; of {len(self.served)} reports" if len(self.served) > 1 else "")
        )


def _manifest(policy: Path) -> Manifest:
    try:
        properties = onnx.load(policy, load_external_data=False).metadata_props
    except DecodeError as error:
        raise Rejected(
            str(policy), "a policy of training.run", "a file that is no ONNX model", "export again"
        ) from error
    return Manifest.from_metadata({p.key: p.value for p in properties})


def _leave_out_what_is_being_written(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Evaluations that lack a rate, or an end of its interval."""
    success = {tag: curves.pop(tag, (np.zeros(0), np.zeros(0))) for tag in (RATE, *INTERVAL)}
    whole = functools.reduce(np.intersect1d, (steps for steps, _ in success.values()))
    if len(whole):
        curves |= {tag: (whole, values[np.isin(steps, whole)]) for tag, (steps, values) in success.items()}


def _served(path: Path, sha256: str) -> list[dict[str, Any]]:
    """The most usual evaluation first; of equals that of most episodes, then the first by name."""
    reports: list[dict[str, Any]] = []
    for file in (*sorted(path.glob("*.json")), *sorted(path.resolve().parent.glob("*.json"))):
        try:
            found = json.loads(file.read_text())
        except (ValueError, OSError):  # somebody else's
            continue
        if isinstance(found, dict) and found.get("policy_sha256") == sha256 and found not in reports:
            reports.append(found)
    return sorted(reports, key=lambda r: (_other_task(r), len(_unusual(r)), -r["episodes"]))


def _other_task(report: dict[str, Any]) -> bool:
    return bool(report.get("task") != report.get("policy_task"))


def _unusual(report: dict[str, Any]) -> list[str]:
    """What an evaluation had other than the policy's own task in the default world."""
    world = dict(report.get("world", {}))
    world |= world.pop("randomize", {})
    task = [f"task {report['task']}"] if _other_task(report) else []
    return task + [
        f"{name} {value}" for name, value in world.items() if (value != USUAL[name] if name in USUAL else value)
    ]


def write_report(config: Report) -> None:
    """Read the runs and write the page, whole or not at all. Raises Rejected when a directory, or all, hold no run."""
    if not config.runs:
        raise Rejected("RUN", "one or more runs of training.run", "none", "name their --output")
    runs = [Run.read(path) for path in config.runs]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(path)) for run, path in zip(runs, config.runs, strict=True)]
    tags = sorted({tag for run in runs for tag in run.curves if tag not in INTERVAL})
    sections = "".join(
        f"<h2>{html.escape(group)}</h2>{image(_figure(runs, [tag for tag in tags if _group(tag) == group]))}"
        for group in sorted({_group(tag) for tag in tags}, key=lambda g: (g != "success", g))
    )
    body = f"<h1>Runs of training</h1>{table((run.row() for run in runs), COLUMNS)}{sections}"
    write_atomically(config.output, page("Runs of training", body))


def _group(tag: str) -> str:
    return tag.partition("/")[0]


def _figure(runs: list[Run], tags: list[str]) -> Figure:
    """One panel per tag, one line per run."""
    colour_map = matplotlib.colormaps["tab10" if len(runs) <= 10 else "turbo"].resampled(max(10, len(runs)))
    colours = [colour_map(number) for number in range(len(runs))]
    columns = min(3, len(tags))
    rows = math.ceil(len(tags) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), dpi=80, layout="constrained")
    for place, tag in enumerate(tags):
        axis = figure.add_subplot(rows, columns, place + 1)
        for number, run in enumerate(runs):
            if tag in run.curves:
                _draw(axis, run, tag, colours[number])
        axis.set(title=tag, xlabel="update")
        if tag == RATE:
            axis.set_ylim(0, 1.02)
    drawn = [(number, run) for number, run in enumerate(runs) if run.curves.keys() & set(tags)]
    lines = [Line2D([], [], color=colours[number], label=str(number)) for number, _ in drawn]
    legend = figure.legend(handles=lines, fontsize=8, loc="outside lower left", ncols=min(4, len(lines)))
    for text, (_, run) in zip(legend.get_texts(), drawn, strict=True):
        text.set(text=run.name, parse_math=False)  # as a label, a name that begins with _ would be left out
    return figure


def _draw(axis: Axes, run: Run, tag: str, colour: Any) -> None:
    steps, values = run.curves[tag]
    if tag == RATE:
        low, high = (run.curves[tag][1] for tag in INTERVAL)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        axis.plot(steps, values, "o-", color=colour, label=run.name)
        return
    window = max(1, round(SMOOTHED_OVER * len(values)))
    axis.plot(steps, values, ".", color=colour, alpha=0.2, ms=3)
    if len(values) <= FEW:  # else a single point could not be seen
        axis.plot(steps, values, "o", color=colour, ms=5)
    kernel = np.ones(window) / window
    axis.plot(steps[window - 1 :], np.convolve(values, kernel, "valid"), color=colour, label=run.name)


def main() -> int:
    config = tyro.cli(Report, prog="python -m training.report", description=Report.__doc__)
    try:
        write_report(config)
    except (Rejected, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    print(config.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
