"""A run on text as one HTML page that stands alone: results, what stands out, curves, answers, time, settings, sources, versions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report import curves
from ..report.audit import log_axis
from ..report.curves import COLOURS, INK, Vector, read_metrics
from ..report.page import LARGE, ORIGINS, SMALL, duration, fill, origin, plain, section, svg, table, time_bar
from . import alarms
from .runs import METHODS, read_text_record


class Panel(NamedTuple):
    """Metrics that share an axis, each with what the legend calls it."""

    title: str
    names: dict[str, str]
    bounds: tuple[str, ...] = ()  # settings drawn across, where the configuration has them
    is_log: bool = False
    limits: tuple[float | None, float | None] = (None, None)


SHARE, FROM_ZERO = (0.0, 1.02), (0.0, None)
TRAINED, HELD_OUT = "in training", "held out"
WIDE = (
    Panel("score of the answers", {"score": TRAINED, "held_out_score": HELD_OUT}),
    Panel("gold, which is only watched", {"gold": TRAINED, "held_out_gold": HELD_OUT}),
    Panel("KL(policy || reference), nats per answer", {"reference_kl": ""}, bounds=("kl_target",), limits=FROM_ZERO),
    Panel("loss", {"loss": TRAINED, "held_out_loss": HELD_OUT}),
    Panel("agreement with people, share of the comparisons", {"accuracy": TRAINED, "held_out_accuracy": HELD_OUT}, limits=SHARE),
)
NARROW = (
    Panel("tokens of an answer", {"response_length": ""}, bounds=("max_new_tokens",), limits=FROM_ZERO),
    Panel("answers, share", {"ended": "with an end token", "empty": "empty", "unscored": "without a score"}, limits=SHARE),
    Panel("groups of equal scores, share", {"flat_groups": ""}, limits=SHARE),
    Panel("entropy of a token, nats", {"entropy": ""}, limits=FROM_ZERO),
    Panel("KL(old || new) of the step, nats per token", {"kl": ""}, is_log=True),
    Panel("ratio new / old", {"ratio_min": "smallest", "ratio_max": "largest"}, is_log=True),
    Panel("effective sample size, share of the tokens", {"effective_sample_size": ""}, limits=SHARE),
    Panel("clip fraction, share of the tokens", {"clip_fraction": ""}, limits=FROM_ZERO),
    Panel("improvement by one step", {"predicted_improvement": "promised", "realised_improvement": "realised"}),
    Panel("price of divergence", {"kl_coef": ""}, limits=FROM_ZERO),
    Panel("explained variance of the critic", {"explained_variance": ""}, limits=(-1.0, 1.02)),
    Panel("gradient norm", {"gradient_norm": "", "critic_gradient_norm": "of the critic"}, bounds=("max_grad_norm",), is_log=True),
    Panel("learning rate", {"learning_rate": ""}, limits=FROM_ZERO),
)
RESULTS = {
    "loss": ("loss", "{:.3f}"),
    "held_out_loss": ("loss on held-out data", "{:.3f}"),
    "held_out_accuracy": ("agreement with people, held out", "{:.1%}"),
    "start_score": ("score of held-out prompts at the start", "{:+.3f}"),
    "held_out_score": ("score of held-out prompts at the end", "{:+.3f}"),
    "start_gold": ("gold at the start", "{:+.3f}"),
    "held_out_gold": ("gold at the end", "{:+.3f}"),
    "reference_kl": ("KL from the reference, nats per answer", "{:.2f}"),
    "response_length": ("tokens of an answer", "{:.1f}"),
    "kl_coef": ("price of divergence", "{:.3g}"),
}
NUM_ANSWERS = 4  # shown of each of three iterations


def write_report(run: str | Path, out: str | Path) -> Path:
    """Write the page of a run on text and return where it is; ValueError where there is nothing to tell yet, or for another ending."""
    run, out = Path(run), Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"A report is written as .html, got {out.name!r}; choose this ending.")
    if not out.parent.is_dir():
        raise ValueError(f"There is no directory {out.parent} to write {out.name} into; make it first.")
    out.write_text(page(run), encoding="utf-8", errors="xmlcharrefreplace")
    return out


def page(run: Path) -> str:
    """The page of one run."""
    record, metrics = read_text_record(run), read_metrics(run / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{run} has no metrics yet; `surefoot train --resume {run}` takes it through its first iterations.")
    title = f"{record['algorithm']} of {record['sources']['model']}"
    settings = record["config"]
    body = [
        f"<header><h1>{escape(title)}</h1><p class='note'>seed {record['seed']}, {metrics['step'][-1]:,.0f} sequences</p></header>",
        section("Results", table(results(metrics))),
        section("Worth knowing", *worth_knowing(run, record, metrics)),
        section("Curves", "<div class='wide'>", *pictures(WIDE, LARGE, settings, metrics), "</div>"),
        section("How far the steps went", "<div class='grid'>", *pictures(NARROW, SMALL, settings, metrics), "</div>"),
        section("Answers", *answers(run)),
        section("Where the time went", *time_bar(f"seed {record['seed']}", metrics, parts=("generating", "scoring", "learning"))),
        section("Settings", table(setting_rows(record), ["setting", "value", "from"])),
        section("Sources", table(source_rows(record))),
        section("Versions and machine", table(origin(record))),
    ]
    return fill(title, [part for part in body if "</h2>\n</section>" not in part])


def pictures(panels: Sequence[Panel], size: tuple[float, float], settings: dict[str, Any], metrics: dict[str, Vector]) -> list[str]:
    """Those for which there are numbers."""
    drawn = []
    for panel in panels:
        figure = Figure(figsize=size, layout="constrained")
        if draw(figure.add_subplot(), panel, settings, metrics):
            drawn.append(svg(figure, panel.title))
    return drawn


def draw(axes: Axes, panel: Panel, settings: dict[str, Any], metrics: dict[str, Vector]) -> bool:
    """The panel's metrics within their standard errors, and the settings that they are held against. Whether there was anything."""
    known = {name: np.isfinite(metrics[name]) for name in panel.names if name in metrics}
    for colour, (name, here) in zip(COLOURS, ((name, here) for name, here in known.items() if here.any()), strict=False):
        steps, value = metrics["step"][here], metrics[name][here]
        axes.plot(steps, value, color=colour, linewidth=1.5, marker="." if len(value) < 30 else "", label=panel.names[name] or "_")
        if (error := metrics.get(f"{name}_error")) is not None and "held_out" in name:
            axes.fill_between(steps, value - error[here], value + error[here], color=colour, alpha=0.2, linewidth=0)
    if not axes.lines:
        return False
    for name in panel.bounds:
        if isinstance(bound := settings.get(name), int | float) and np.isfinite(bound):
            axes.axhline(bound, color=INK, linewidth=0.9, linestyle="dashed", label=f"{name} {bound:g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, borderaxespad=0.1)
    if panel.is_log:
        log_axis(axes)
    axes.set_ylim(*panel.limits)
    curves.plain(axes)
    return True


def last(metrics: dict[str, Vector], name: str) -> float | None:
    """The last number of a metric that is known."""
    value = metrics.get(name, np.empty(0))
    value = value[np.isfinite(value)]
    return float(value[-1]) if len(value) else None


def results(metrics: dict[str, Vector]) -> list[tuple[str, str]]:
    """The last numbers, held-out ones with their standard errors."""
    rows = []
    for name, (words, form) in RESULTS.items():
        value, error = last(metrics, name), last(metrics, f"{name}_error")
        if value is not None:
            rows.append((words, form.format(value) + (f" +- {error:.3f} (standard error)" if error is not None else "")))
    return [*rows, ("time of training", duration(metrics["time/seconds"][-1]))]


def worth_knowing(run: Path, record: dict[str, Any], metrics: dict[str, Vector]) -> list[str]:
    """What stands out, and what to do."""
    found = []
    if (done := metrics["step"][-1]) < record["steps"]:
        found.append((f"The run is not complete: {done / record['steps']:.0%} of it.", f"Continue it with surefoot train --resume {run}"))
    if (run / "evidence.json").exists():
        problem = json.loads((run / "evidence.json").read_text())["problem"]
        found.append((problem, "Its answers are in evidence.json; a higher kl_coef or a smaller learning_rate keeps the policy nearer."))
    if "response_length" in metrics and (shrunk := alarms.shrunk_completions(metrics["response_length"])):
        found.append((shrunk, "Look at the answers: a reward that likes them short is easily found."))
    names = "held_out_score", "held_out_gold", "held_out_gold_error"
    if all(name in metrics for name in names):
        known = np.isfinite(metrics["held_out_gold"])
        if known.sum() > 1 and (warning := alarms.over_optimised(metrics["step"][known], *(metrics[name][known] for name in names))):
            found.append((warning, "Raise kl_coef, stop earlier, or train the reward model on answers of this policy."))
    if (empty := last(metrics, "empty")) is not None and empty > alarms.EMPTY_SHARE:
        found.append((f"{empty:.0%} of the last answers are empty.", "Empty answers are legal; see whether the reward should like them."))
    items = [f"<li><strong>{escape(what)}</strong> {escape(advice)}</li>" for what, advice in found]
    return ["<ul class='findings'>", *(items or ["<li class='fine'>Nothing stands out.</li>"]), "</ul>"]


def answers(run: Path) -> list[str]:
    """Some answers of the first, of a middle and of the last iteration."""
    path = run / "samples.jsonl"
    if not path.exists():
        return []
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = sorted({sample["step"] for sample in samples})
    shown = dict.fromkeys(steps[i] for i in (0, len(steps) // 2, -1))
    rows = []
    for step in shown:
        for sample in [sample for sample in samples if sample["step"] == step][:NUM_ANSWERS]:
            prompt = sample["prompt"] if isinstance(sample["prompt"], str) else json.dumps(sample["prompt"], ensure_ascii=False)
            rows.append((f"{step:,}", prompt, sample["completion"], f"{sample['score']:+.2f}", f"{sample['kl']:.2f}"))
    return [table(rows, ["after", "prompt", "answer", "score", "KL, nats"])]


def setting_rows(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The configuration with where each value comes from, what was set first."""
    defaults = dataclasses.asdict(METHODS[record["algorithm"]]())
    rows = []
    for name, value in record["config"].items():
        default = list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]
        rows.append((name, plain(value), "default" if value == default else "set by the user"))
    return sorted(rows, key=lambda row: ORIGINS.index(row[2]))


def source_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was given, with hashes of what was in it."""
    given = [(name, plain(value)) for name, value in record["sources"].items() if value not in (None, [])]
    return given + list(record["hashes"].items())
