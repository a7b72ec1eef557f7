"""The step audit as a picture: how far did each step go, and did it deliver. `audit.py` in the package says what the numbers are.

A method without a policy that could be compared has no such audit; its critic, its exploration and its gradients are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .curves import COLOURS, DASHES, FRAME, INK, Experiment, Vector, experiments, plain, read_metrics, run_directories

MAX_POINTS = 200  # of a line; more iterations than that are drawn in windows
MIN_WINDOW = 5  # iterations, so that their spread says something


class Audit(NamedTuple):
    """What one run reported."""

    seed: int
    metrics: dict[str, Vector]  # each [T], NaN where it was null


class Line(NamedTuple):
    """One metric in windows of iterations, [W]; NaN where a window knows nothing."""

    steps: Vector
    mean: Vector
    low: Vector  # smallest in the window
    high: Vector
    error: Vector  # standard error of the mean by the spread within the window; NaN for fewer than two numbers


class Estimate(NamedTuple):
    """An improvement by one step of the policy, [W]."""

    steps: Vector
    mean: Vector
    error: Vector  # standard error


class Panel(NamedTuple):
    """Metrics that share an axis."""

    title: str
    names: tuple[str, ...]
    dotted: tuple[str, ...] = ()  # as thin dotted lines
    bounds: tuple[str, ...] = ()  # settings drawn across, where the configuration has them
    is_log: bool = False
    limits: tuple[float | None, float | None] = (None, None)


BOUNDS = "max_kl", "target_kl"  # settings that limit how far a step goes
OWN_KL = "constrained_kl", "penalised_kl", "step_kl"  # what a method holds against them: of the step alone, before anything else moves
SHARE = 0.0, 1.02
PANELS = (
    Panel("KL(old || new) of the step, nats", ("kl",), OWN_KL, BOUNDS, is_log=True),
    Panel("smallest and largest ratio new / old", ("ratio_min", "ratio_max"), is_log=True),
    Panel("effective sample size, share of the batch", ("effective_sample_size",), limits=SHARE),
    Panel("clip fraction, share of the batch", ("clip_fraction",), limits=(0.0, None)),
    Panel("penalty coefficient", ("kl_penalty_coefficient",), is_log=True),
    Panel("multiplier of the divergence", ("kl_multiplier",), limits=(0.0, None)),
    Panel("return of a generation, and of its elites", ("population_return", "elite_return")),
    Panel("KL of the search over parameters, nats", ("search_kl",), is_log=True),
    Panel("accepted step size, share of the full step", ("step_scale",), limits=SHARE),
    Panel("entropy, nats", ("entropy",)),
    Panel("explained variance of the critic", ("explained_variance",), limits=(-1.0, 1.02)),
    Panel("gradient norm", ("gradient_norm",), bounds=("max_grad_norm",), is_log=True),
    Panel("learning rate", ("learning_rate",), limits=(0.0, None)),
    Panel("value of the actions that were taken", ("action_value",)),
    Panel("error of these values", ("td_error",), is_log=True),
    Panel("loss of the critic", ("critic_loss",), is_log=True),
    Panel("gradient norm of the critic", ("critic_gradient_norm",), bounds=("max_grad_norm",), is_log=True),
    Panel("probability of a random action", ("epsilon",), limits=SHARE),
    Panel("temperature, the price of entropy", ("temperature",), is_log=True),
)
IMPROVEMENT = "improvement of the discounted return by one step"


def plot_audit(run: str | Path, out: str | Path) -> Path:
    """Draw the audit of a run, or of a directory of seeds, into one picture, and return where it is.

    Args:
        out: its ending chooses PNG, SVG or PDF.

    Raises:
        ValueError: no run, several experiments, nothing to draw, or another kind of picture.
    """
    draw(*read_audits(run_directories(Path(run)))).savefig(out, dpi=160)
    return Path(out)


def read_audits(runs: Sequence[Path]) -> tuple[Experiment, list[Audit]]:
    """The one experiment that `runs` are the seeds of, and what each reported; ValueError where it is not one, or has not begun."""
    found = experiments(runs)
    if len(found) > 1:
        differing = [name for name, value in found[0].settings.items() if any(other.settings.get(name) != value for other in found)]
        raise ValueError(f"{runs[0].parent} holds runs that differ in more than the seed ({', '.join(differing)}); give one of them.")
    audits = [Audit(seed, read_metrics(run / "metrics.jsonl")) for seed, run in zip(found[0].seeds, runs, strict=True)]
    for run, audit in zip(runs, audits, strict=True):
        if not audit.metrics:
            raise ValueError(f"{run} has no metrics yet; `surefoot train --resume {run}` takes it through its first iterations.")
    return found[0], audits


def panels(audits: Sequence[Audit]) -> list[Panel]:
    """Those for which some run has numbers, each with the metrics that have; the learning rate only where it changes."""
    known = {name for audit in audits for name, value in audit.metrics.items() if np.isfinite(value).any()}
    rates = np.concatenate([audit.metrics.get("learning_rate", np.empty(0)) for audit in audits])
    if len(set(rates[np.isfinite(rates)])) == 1:
        known.discard("learning_rate")
    present = [panel._replace(names=keep(panel.names, known), dotted=keep(panel.dotted, known)) for panel in PANELS]
    return [panel for panel in present if panel.names]


def heading(audits: Sequence[Audit]) -> str:
    """What the panels are of: a method that holds no step against an old policy has no audit."""
    return "Step audit" if any({"kl", "search_kl"} & audit.metrics.keys() for audit in audits) else "Learning"


def keep(names: tuple[str, ...], known: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in known)


def window_size(num_iterations: int) -> int:
    """How many iterations become one point."""
    return 1 if num_iterations <= MAX_POINTS else max(MIN_WINDOW, -(-num_iterations // MAX_POINTS))


def windowed(steps: Vector, value: Vector) -> Line:
    """One point for each window, at its last step; what is not known counts for nothing."""
    begins = np.arange(0, len(value), window_size(len(value)))
    ends = np.append(begins[1:], len(value))
    known = np.isfinite(value)
    count = np.add.reduceat(known.astype(float), begins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(known, value, 0.0), begins) / count
        deviation = np.where(known, value - np.repeat(mean, ends - begins), 0.0)
        error = np.sqrt(np.add.reduceat(deviation**2, begins) / (count * (count - 1)))
    return Line(steps[ends - 1], mean, np.fmin.reduceat(value, begins), np.fmax.reduceat(value, begins), error)


def predicted(metrics: dict[str, Vector]) -> Estimate:
    """What a step promised: as reported, or the mean of a window."""
    line = windowed(metrics["step"], metrics["predicted_improvement"])
    return Estimate(line.steps, line.mean, line.error if window_size(len(metrics["step"])) > 1 else metrics["predicted_improvement_error"])


def realised(metrics: dict[str, Vector]) -> Estimate:
    """What a step brought: the mean discounted return of the batch after it minus that of its own, or the same of windows per step.

    A line of metrics says what the step before it brought, and stands here at that step. Where no episode ended in the next
    batches, the steps until one did share the difference. Nothing is known yet of the last step.
    """
    line, num_iterations = windowed(metrics["step"], metrics["discounted_return"]), len(metrics["step"])
    size = window_size(num_iterations)
    begins = np.arange(0, num_iterations, size)
    middle = (begins + np.minimum(begins + size, num_iterations) - 1) / 2
    mean, error = np.full((2, len(begins)), np.nan)
    for before, after in pairwise(np.flatnonzero(np.isfinite(line.mean))):
        num_steps = middle[after] - middle[before]
        of_difference = np.hypot(line.error[before], line.error[after]) if size > 1 else metrics["realised_improvement_error"][after]
        mean[before:after] = (line.mean[after] - line.mean[before]) / num_steps
        error[before:after] = of_difference / num_steps
    return Estimate(line.steps, mean, error)


def has_improvements(audit: Audit) -> bool:
    """Whether there is anything to say about what steps promised and brought."""
    needed = "predicted_improvement", "predicted_improvement_error", "realised_improvement_error", "discounted_return"
    return all(name in audit.metrics for name in needed) and bool(np.isfinite(audit.metrics["predicted_improvement"]).any())


def draw(experiment: Experiment, audits: Sequence[Audit]) -> Figure:
    """The improvements of each run on top, then a panel for each group of metrics with the runs in one colour each."""
    improving, chosen = [index for index, audit in enumerate(audits) if has_improvements(audit)], panels(audits)
    if not chosen:
        raise ValueError(f"{experiment.settings['algorithm']} has reported nothing of the step audit here, so there is nothing to draw.")
    columns = min(len(chosen), min((4, 3), key=lambda n: -len(chosen) % n))  # with the fewest places left empty
    across = max(1, min(columns, len(improving)))
    rows = -(-len(improving) // across), -(-len(chosen) // columns)
    figure = Figure(figsize=(3.8 * columns, 0.6 + 2.8 * rows[0] + 2.3 * rows[1]), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=[2.8 * rows[0] or 0.01, 2.3 * rows[1]], hspace=0.04)
    for place, index in enumerate(improving, start=1):
        axes, hue = top.add_subplot(rows[0], across, place), style(index)["color"]
        draw_improvement(axes, audits[index], hue)
        name_panel(axes, *((f"seed {audits[index].seed}", hue) if len(audits) > 1 else (f"{IMPROVEMENT}, within a standard error",)))
    if len(audits) > 1 and improving:
        top.suptitle(f"{IMPROVEMENT}, within a standard error", x=0.01, ha="left", fontsize=10, color=INK)
    for place, panel in enumerate(chosen, start=1):
        axes = bottom.add_subplot(rows[1], columns, place)
        draw_panel(axes, panel, experiment.settings, audits)
        name_panel(axes, panel.title)
    for axes in bottom.axes[-columns:]:
        axes.set_xlabel("environment steps", color=INK)
    which = f"{len(audits)} seeds" if len(audits) > 1 else f"seed {audits[0].seed}"
    title = f"{heading(audits)}: {experiment.settings['algorithm']} on {experiment.settings['environment']}, {which}; {note(audits)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, parse_math=False)
    return figure


def draw_improvement(axes: Axes, audit: Audit, hue: str) -> None:
    """What was promised in grey and what came of it in the run's colour, each within its standard error."""
    axes.axhline(0, color=FRAME, linewidth=0.8)
    promised, brought = predicted(audit.metrics), realised(audit.metrics)
    for name, estimate, colour in (("predicted", promised, INK), ("realised", brought, hue)):
        steps, mean, error = estimate
        axes.plot(steps, mean, color=colour, linewidth=1.5, label=name)
        axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        lone = alone(mean)
        axes.errorbar(steps[lone], mean[lone], error[lone], fmt=".", color=colour, markersize=4, elinewidth=1)
    means = np.concatenate([[0.0], *(estimate.mean[np.isfinite(estimate.mean)] for estimate in (promised, brought))])
    room = 0.3 * (np.ptp(means) or 1.0)
    axes.set_ylim(means.min() - room, means.max() + room)  # one wide error must not press the lines flat
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9, labelcolor=INK, borderaxespad=0.1)
    plain(axes)


def draw_panel(axes: Axes, panel: Panel, settings: dict[str, Any], audits: Sequence[Audit]) -> None:
    """The panel's metrics, and the settings that they are held against."""
    for index, audit in enumerate(audits):
        for name in (*panel.names, *panel.dotted):
            if (value := audit.metrics.get(name)) is not None:
                line = windowed(audit.metrics["step"], value)
                shown = {"ratio_min": line.low, "ratio_max": line.high}.get(name, line.mean)
                dotted = {"linestyle": "dotted", "linewidth": 1.0, "label": "_" if index else name} if name in panel.dotted else {}
                axes.plot(line.steps, shown, **{"linewidth": 1.5} | style(index) | dotted)
                axes.plot(line.steps[alone(shown)], shown[alone(shown)], ".", color=style(index)["color"], markersize=4)
                if name in panel.names and len(audits) == 1 and shown is line.mean:
                    axes.fill_between(line.steps, line.low, line.high, color=style(index)["color"], alpha=0.2, linewidth=0)
        if "ratio_max" in panel.names and (clip := audit.metrics.get("clip")) is not None:
            for edge, name in ((1 + clip, "_" if index else "1 +- clip"), (1 - clip, "_")):
                axes.plot(audit.metrics["step"], edge, color=INK, linewidth=0.9, linestyle="dashed", label=name)
    for name in panel.bounds:
        if isinstance(bound := settings.get(name), int | float) and np.isfinite(bound):
            axes.axhline(bound, color=INK, linewidth=0.9, linestyle="dashed", label=f"{name} {bound:g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, borderaxespad=0.1)
    if panel.is_log:
        log_axis(axes)
    axes.set_ylim(*panel.limits)
    plain(axes)


def log_axis(axes: Axes) -> None:
    """A logarithmic axis of values with plain numbers at it."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=6)
    axes.yaxis.set_major_locator(decades if high > 4 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def alone(value: Vector) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Numbers without a number beside them, which no line leads to."""
    unknown = np.isnan(np.pad(value, 1, constant_values=np.nan))
    return unknown[:-2] & ~unknown[1:-1] & unknown[2:]


def name_panel(axes: Axes, title: str, colour: str = INK) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=colour)


def style(index: int) -> dict[str, Any]:
    """The line of a run."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def note(audits: Sequence[Audit]) -> str:
    """What a point of a line is, and a shade."""
    sizes = sorted({window_size(len(audit.metrics["step"])) for audit in audits})
    if sizes == [1]:
        return "one point for each iteration"
    shade = ", shaded from smallest to largest" if len(audits) == 1 else ""
    return f"a point is the mean of {' or '.join(map(str, sizes))} iterations{shade}"
