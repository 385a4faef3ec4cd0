"""A dataset as something to look at: text for a terminal, one self-contained HTML page for a browser."""

import html
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke

from protos.files import write_atomically
from protos.spaces import Kind, PolicySpec
from sim_client.episodes import Episode
from sim_client.store import About
from training.data.survey import SECTORS, Survey
from training.webpage import image, page, table

BLOCKS = " ▁▂▃▄▅▆▇█"
FRAMES = 8
"""Frames in a filmstrip; longer episodes show some of theirs, evenly chosen."""
MIN_ARROW = 0.05
"""A planar motion below this share of the longest has no arrow."""
SEEN = 0.5
"""And where that is below this share of the bound, all arrows are longer than their motions, by the same factor."""


def text(path: Path, about: About, survey: Survey, disk_bytes: int) -> str:
    """What `inspect` prints."""
    lines = [f"{path}: {about.dataset_id}, task {about.task}", *(f"  {n:<26}{v}" for n, v in facts(survey, disk_bytes))]
    lines += [f"  behavior {name}: {told}" for name, told in _behaviors(survey)]
    lines += ["  actions, share of steps per bin of the field's range"]
    for field in about.spec.action.fields:
        low, high = ("0", f"{field.limit:g} {field.unit}, length") if field.kind is Kind.VECTOR else _range(field)
        lines.append(f"    {field.name:<8} {bars(survey.histograms[field.name])}  {low} to {high}")
    lines.append(f"    planar motion points into {survey.covered} of {SECTORS} sectors of the circle")
    lines += [f"      {name:<14}{count:>7}  {'█' * round(30 * share)}" for name, count, share in _sectors(survey)]
    return "\n".join(lines + [f"  warning: {warning}" for warning in survey.warnings()])


def _range(field: object) -> tuple[str, str]:
    limit, low, high = (getattr(field, name) for name in ("limit", "low", "high"))
    unit = getattr(field, "unit").replace("1", "")  # noqa: B009
    return (f"{-limit:g}", f"{limit:g} {unit}") if limit else (f"{low:g}", f"{high:g} {unit}".rstrip())


def facts(survey: Survey, disk_bytes: int) -> list[tuple[str, str]]:
    """Name and value of every number that both the text and the page show."""
    lengths, returns, wins = np.array(survey.lengths), np.array(survey.returns), sum(survey.successes)
    view = survey.spec.observation
    return [
        ("contract digest", survey.spec.digest[:16]),
        ("view", f"{view.height} x {view.width} pixels, {view.extent_m:g} m"),
        ("episodes", f"{len(lengths)}, {wins} successful ({wins / len(lengths):.0%})"),
        ("transitions", str(survey.steps)),
        ("length", f"{_spread(lengths)}  {bars(_histogram(lengths))}"),
        ("return", f"{_spread(returns)}  {bars(_histogram(returns))}"),
        ("depth", f"{survey.depth_low_m:.3f} to {survey.depth_high_m:.3f} m"),
        (
            "bytes per transition",
            f"{disk_bytes / survey.steps:,.0f} on disk, {survey.raw_bytes / survey.steps:,.0f} raw",
        ),
    ]


def bars(counts: np.ndarray) -> str:
    """A histogram as one line of block characters; a bin that holds anything is never blank."""
    top = max(int(counts.max()), 1)
    return "".join(BLOCKS[int(np.ceil(count / top * (len(BLOCKS) - 1)))] for count in counts)


def _histogram(values: np.ndarray) -> np.ndarray:
    return np.histogram(values, bins=10)[0]


def _spread(values: np.ndarray) -> str:
    return f"min {values.min():g}, median {np.median(values):g}, mean {values.mean():.2f}, max {values.max():g}"


def _behaviors(survey: Survey) -> list[tuple[str, str]]:
    wins = survey.behavior_successes
    return [(name, f"{n} episodes, {wins[name]} successful") for name, n in survey.behaviors.most_common()]


def _sectors(survey: Survey) -> list[tuple[str, int, float]]:
    width, total = 360 // SECTORS, max(int(survey.sectors.sum()), 1)
    return [(f"{i * width}-{(i + 1) * width} deg", int(n), n / total) for i, n in enumerate(survey.sectors)]


def write_page(file: Path, path: Path, about: About, survey: Survey, disk_bytes: int, shown: Iterable[Episode]) -> None:
    """The HTML page of the dataset at `path`, with the filmstrips of the episodes `shown`; whole or not at all."""
    rows = [*facts(survey, disk_bytes), *((f"behavior {name}", told) for name, told in _behaviors(survey))]
    rows.insert(0, ("task", about.task))
    warnings = "".join(f"<p class=w>{html.escape(w)}</p>" for w in survey.warnings())
    strips = "".join(
        f"<h3>episode {i}: {len(e)} steps, {'success' if e.success else 'failure'}, "
        f"recorded by {html.escape(e.behavior)}</h3>"
        f"{image(filmstrip(e, about.spec, survey.longest))}"
        for i, e in enumerate(shown)
    )
    body = (
        f"<h1>{html.escape(about.dataset_id)}</h1><p>{html.escape(str(path))}</p>{warnings}{table(rows)}"
        f"<h2>Lengths, returns, actions, coverage</h2>{image(charts(survey))}"
        f"<h2>Episodes</h2><p>Depth below the camera plane, dark is near. The arrow is (dx, dy), at "
        f"{_times(_stretch(survey.longest))} true length in the image; the world's axes are drawn in the first frame."
        f"</p>{strips}"
    )
    write_atomically(file, page(about.dataset_id, body))


def charts(survey: Survey) -> Figure:
    """Lengths, returns, one histogram per action field, and a rose of the planar directions."""
    fields = survey.spec.action.fields
    figure = Figure(figsize=(14, 6), dpi=80, layout="constrained")
    grid = figure.add_gridspec(2, 4)
    for column, (name, values) in enumerate((("episode length", survey.lengths), ("return", survey.returns))):
        axis = figure.add_subplot(grid[0, column])
        axis.hist(np.array(values), bins=10)
        axis.set(title=name, ylabel="episodes")
    for column, field in enumerate(fields):
        axis = figure.add_subplot(grid[1, column])
        counts = survey.histograms[field.name]
        vector = field.kind is Kind.VECTOR
        edges = np.linspace(0 if vector else -1, 1, len(counts) + 1) * field.scale + field.centre
        axis.bar(edges[:-1], counts, np.diff(edges), align="edge")
        axis.set(
            title=f"{field.name}{', length' if vector else ''}", xlabel=field.unit.replace("1", ""), ylabel="steps"
        )
    rose = figure.add_subplot(grid[0, 2:], projection="polar")
    width = 2 * np.pi / SECTORS
    rose.bar(np.arange(SECTORS) * width, survey.sectors, width, align="edge", edgecolor="white")
    rose.set(title="direction of the planar motion (0: +x, 90: +y)", yticklabels=[])
    return figure


def _stretch(longest: float) -> float:
    return max(1.0, SEEN / longest) if longest else 1.0


def _times(factor: float) -> str:
    return "its" if factor == 1 else f"{factor:.3g} times its"


def filmstrip(episode: Episode, spec: PolicySpec, longest: float) -> Figure:
    """Frames of an episode from first to last, each with the action that was taken in it.

    Args:
        longest: planar motion of all episodes, as a share of the bound.
    """
    chosen = np.unique(np.linspace(0, len(episode), min(FRAMES, len(episode) + 1)).round().astype(int))
    figure = Figure(figsize=(1.9 * FRAMES, 2.7), dpi=80, layout="constrained")
    low, high = float(episode.depth.min()), float(episode.depth.max())
    for place, step in enumerate(chosen):
        axis = figure.add_subplot(1, FRAMES, place + 1)
        axis.imshow(episode.depth[step], cmap="viridis", vmin=low, vmax=high)
        axis.set(xticks=[], yticks=[])
        axis.set_title(_caption(episode, spec, int(step)), fontsize=8)
        if step < len(episode):
            _arrow(axis, spec, episode.action[step], longest)
    _world_axes(figure.axes[0], spec)
    return figure


def _caption(episode: Episode, spec: PolicySpec, step: int) -> str:
    state = f"step {step}, {spec.observation.gripper.value} {episode.gripper[step, 0]:.2g}"
    if step == len(episode):
        return f"{state}\nend"
    told = dict(zip(spec.action.components, np.round(episode.action[step], 3) + 0.0, strict=True))
    return f"{state}\n" + ", ".join(f"{name} {told[name]:g}" for name in ("p", "dz", "dtheta") if name in told)


def _arrow(axis: Axes, spec: PolicySpec, action: np.ndarray, longest: float) -> None:
    for field in (f for f in spec.action.fields if f.kind is Kind.VECTOR):
        motion = action[spec.action.slice_of(field.name)]
        if np.linalg.norm(motion) > MIN_ARROW * longest * (field.limit or 1.0):
            _draw(axis, spec, np.zeros(2), motion * _stretch(longest), "red", "")


def _world_axes(axis: Axes, spec: PolicySpec) -> None:
    """+x and +y of the world in a corner: a mirrored view is seen at once."""
    size = spec.observation.extent_m
    across = np.array(spec.observation.row_axis) - np.array(spec.observation.col_axis)
    corner = across * 0.25 * size
    for direction, name in ((np.array([1, 0]), "x"), (np.array([0, 1]), "y")):
        _draw(axis, spec, corner, corner + 0.15 * size * direction, "white", name)


def _draw(axis: Axes, spec: PolicySpec, tail: np.ndarray, head: np.ndarray, colour: str, name: str) -> None:
    start, end = (spec.observation.pixel_of(point)[::-1] for point in (tail, head))
    seen: list[AbstractPathEffect] = [withStroke(linewidth=3, foreground="black")]  # on near and on far ground alike
    arrow = {"color": colour, "arrowstyle": "->", "lw": 1.5, "shrinkA": 0, "shrinkB": 0, "path_effects": seen}
    axis.annotate("", (end[0], end[1]), (start[0], start[1]), arrowprops=arrow)
    if name:
        beyond = end + 0.3 * (end - start)
        label = axis.text(beyond[0], beyond[1], name, color=colour, fontsize=9, ha="center", va="center")
        label.set_path_effects(seen)
