"""Learning curves: episode return against environment steps. Seeds of one experiment are drawn together; the seed is the unit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

Vector = np.ndarray[Any, np.dtype[np.float64]]

# Okabe & Ito's colours (jfly.uni-koeln.de/color), which colour-blind readers can tell apart; their yellow is too pale for a line.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
DASHES = "solid", "dashed", "dotted"
INK, FRAME, GRID = "#404040", "#a0a0a0", "#e0e0e0"
NUM_RESAMPLES = 2000


class Curve(NamedTuple):
    """One run: the rolling return wherever an episode had finished."""

    steps: Vector  # [T]
    returns: Vector  # [T]


class Experiment(NamedTuple):
    """Runs that differ in nothing but the seed."""

    settings: dict[str, Any]
    seeds: list[int]
    curves: list[Curve]


def plot(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the learning curves of run directories, or of directories of seeds, into one picture, and return where it is.

    Args:
        out: its ending chooses PNG, SVG or PDF.

    Raises:
        ValueError: a directory that holds no run, or another kind of picture.
    """
    directories = dict.fromkeys(run.resolve() for path in runs for run in run_directories(Path(path)))
    draw(experiments(list(directories))).savefig(out, dpi=160)
    return Path(out)


def run_directories(path: Path) -> list[Path]:
    """`path` itself where it is a run, else the seeds in it."""
    runs = [path] if (path / "run.json").exists() else sorted(record.parent for record in path.glob("seed-*/run.json"))
    if not runs:
        raise ValueError(f"{path} holds no run; give a directory that `surefoot train` wrote.")
    return runs


def experiments(runs: Sequence[Path]) -> list[Experiment]:
    """The runs by experiment, in the order given."""
    found: dict[str, Experiment] = {}
    for run in runs:
        try:
            record = json.loads((run / "run.json").read_text())
            settings = {key: record[key] for key in ("algorithm", "environment", "num_envs", "steps")} | record["config"]
            seed = record["seed"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run / 'run.json'} is not the record of a run ({error!r}); leave this directory out.") from error
        experiment = found.setdefault(json.dumps(settings, sort_keys=True), Experiment(settings, [], []))
        experiment.seeds.append(seed)
        experiment.curves.append(read_curve(run / "metrics.jsonl"))
    return list(found.values())


def read_curve(path: Path) -> Curve:
    """The learning curve in a metrics file."""
    metrics = read_metrics(path)
    step, episode_return = (metrics.get(name, np.empty(0)) for name in ("step", "episode_return"))
    known = np.isfinite(episode_return)
    return Curve(step[known], episode_return[known])


def read_metrics(path: Path) -> dict[str, Vector]:
    """Every metric of a metrics file, [T], NaN where it is null or absent; a last line that is still being written does not count."""
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    rows: list[dict[str, float]] = []
    for number, line in enumerate(complete.split("\n"), start=1):
        try:
            if line:
                row = json.loads(line)
                rows.append(
                    {name: float("nan") if value is None else float(value) for name, value in row.items()} | {"step": int(row["step"])}
                )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Line {number} of {path} is not an iteration's metrics ({error!r}); remove that line.") from error
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in dict.fromkeys(name for row in rows for name in row)}


def mean_and_band(curves: Sequence[Curve]) -> tuple[Vector, Vector, Vector, Vector]:
    """Steps, mean over seeds, and its 95 % percentile-bootstrap interval (Efron & Tibshirani 1993, ch. 13), each [T].

    Seeds are resampled whole. The curve covers the steps that every seed has; between its points a seed is interpolated.
    """
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    steps = steps[(steps >= max(curve.steps[0] for curve in curves)) & (steps <= min(curve.steps[-1] for curve in curves))]
    returns = np.stack([np.interp(steps, *curve) for curve in curves])
    chosen = np.random.default_rng(0).integers(len(curves), size=(NUM_RESAMPLES, len(curves)))
    weights = np.stack([np.bincount(row, minlength=len(curves)) for row in chosen]) / len(curves)
    low, high = np.percentile(weights @ returns, [2.5, 97.5], axis=0)
    return steps, returns.mean(axis=0), low, high


def label(experiment: Experiment, others: Sequence[Experiment]) -> str:
    """What sets an experiment apart from the others: its algorithm first, then the settings that are not the same in all."""
    algorithm = experiment.settings["algorithm"]
    alike = [other for other in others if other.settings["algorithm"] == algorithm]
    differing = [
        f"{value}" if name == "environment" else f"{name}={value}"
        for name, value in experiment.settings.items()
        if name != "algorithm" and any(other.settings[name] != value for other in (others if name == "environment" else alike))
    ]
    return " ".join([algorithm, *differing])


def seeds_drawn(experiment: Experiment) -> str:
    """How many seeds the picture shows of an experiment, and why not all."""
    total, shown = len(experiment.seeds), sum(len(curve.steps) > 0 for curve in experiment.curves)
    if shown == total:
        return f"{total} seeds" if total > 1 else f"seed {experiment.seeds[0]}"
    return f"{shown} of {total} seeds; no episode yet in the others" if shown else "no episode finished yet"


def draw(drawn: Sequence[Experiment]) -> Figure:
    """One line for each experiment; where there are several, their names stand at the right, level with the lines' ends."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    ends: list[tuple[float, str, dict[str, Any]]] = []
    for index, experiment in enumerate(drawn):
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
        curves = [curve for curve in experiment.curves if len(curve.steps)]
        if len(curves) > 1:
            steps, mean, low, high = mean_and_band(curves)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(steps, mean, **style, linewidth=2)
        for curve in curves:
            axes.plot(*curve, **style, **({"linewidth": 2} if len(curves) == 1 else {"linewidth": 0.7, "alpha": 0.4}))
        end = float(np.mean([curve.returns[-1] for curve in curves])) if curves else 0.0
        ends.append((end, f"{label(experiment, drawn)}\n{seeds_drawn(experiment)}", style))
    decorate(axes, drawn)
    if len(drawn) > 1:
        write_names(axes, ends)
    elif not axes.lines:
        axes.set(xticks=[], yticks=[])
    return figure


def decorate(axes: Axes, drawn: Sequence[Experiment]) -> None:
    """Title and axis labels with units."""
    title = " and ".join(dict.fromkeys(experiment.settings["environment"] for experiment in drawn))
    notes = ["mean and its 95 % bootstrap interval"] if any(len(experiment.seeds) > 1 for experiment in drawn) else []
    if len(drawn) == 1:
        title, notes = f"{drawn[0].settings['algorithm']} on {title}", [seeds_drawn(drawn[0]), *notes]
    axes.set_title(title, loc="left", fontsize=13, pad=10, parse_math=False)
    axes.set_title(", ".join(notes), loc="right", fontsize=10, pad=10, color=INK)
    axes.set_xlabel("environment steps", fontsize=11, color=INK)
    axes.set_ylabel("episode return (mean of the last 100 episodes)", fontsize=11, color=INK)
    plain(axes)


def plain(axes: Axes) -> None:
    """No more lines than are needed; environment steps along the bottom."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0)
    axes.set_xlim(left=0)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """No more lines than are needed."""
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)


def write_names(axes: Axes, ends: Sequence[tuple[float, str, dict[str, Any]]], *, gap: float = 0.11) -> None:
    """Each name with a piece of its line at the height where the line ends, moved `gap` of the axes' height apart.

    The default is enough for names of two lines in a picture of one panel.
    """
    order = sorted(ends, key=lambda end: end[0])
    axes.autoscale_view()
    in_axes = axes.transScale + axes.transLimits
    heights = [float(in_axes.transform((1.0, height))[1]) for height, _, _ in order]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (_, name, style) in zip(heights, order, strict=True):
        axes.plot([1.015, 1.05], [height, height], **style, linewidth=2, transform=axes.transAxes, clip_on=False)
        axes.text(1.06, height, name, va="center", fontsize=9, color=INK, transform=axes.transAxes, parse_math=False)
