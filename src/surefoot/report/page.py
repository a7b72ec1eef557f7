"""A run as one HTML page that stands alone: results, audit, where the time went, settings, environment, versions.

Pictures are SVG inside the page. They take their colours from its style sheet (`page.html`), and so follow the reader's light
or dark mode. Everything that comes from a run is escaped; there is no script, and nothing is fetched.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from textwrap import shorten
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..algorithms import named
from ..spaces import from_json
from ..training.control import read_record
from . import curves
from .audit import IMPROVEMENT, Audit, draw_improvement, draw_panel, has_improvements, heading, note, panels, read_audits, style
from .curves import COLOURS, FRAME, GRID, INK, Experiment, Vector
from .findings import findings
from .progress import clock

VARIABLES = {INK: "ink", FRAME: "frame", GRID: "grid"} | {colour: f"c{index}" for index, colour in enumerate(COLOURS)}
RESUME = {
    "exact": "exact: stopped and resumed, the run ends in the same bits",
    "episodes restart": "episodes start anew, since the environment cannot give its state; the rest is exact",
}
ORIGINS = "set by the user", "preset", "default"
NEEDED = {"episodes", "episode_return", "time/seconds", "time/steps_per_second"}
LARGE, SMALL = (5.2, 2.8), (4.0, 2.3)  # inches, of which the page makes what its width allows
FIRST, COMPILED = "first iteration, which compiles", "environment, acting and learning, compiled as one"


def write_report(run: str | Path, out: str | Path) -> Path:
    """Write the page of a run, or of a directory of seeds, and return where it is.

    Raises ValueError for another ending than .html, for no run, for several experiments, and for a run that has not begun.
    """
    out, runs = Path(out), curves.run_directories(Path(run))
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"A report is written as .html, got {out.name!r}; choose this ending.")
    if not out.parent.is_dir():
        raise ValueError(f"There is no directory {out.parent} to write {out.name} into; make it first.")
    out.write_text(page(runs), encoding="utf-8", errors="xmlcharrefreplace")
    return out


def page(runs: Sequence[Path]) -> str:
    """The page of the runs, which are the seeds of one experiment."""
    experiment, audits = read_audits(runs)
    records = [read_record(run) for run in runs]
    for run, audit in zip(runs, audits, strict=True):
        if lacking := NEEDED - audit.metrics.keys():
            raise ValueError(f"{run / 'metrics.jsonl'} lacks {', '.join(sorted(lacking))}, which every run writes; it is not one's file.")
    title = f"{records[0]['algorithm']} on {records[0]['environment']}"
    seeds = [f"seed {audit.seed}" for audit in audits]
    body = [
        f"<header><h1>{escape(title)}</h1><p class='note'>{escape(', '.join(seeds))}</p></header>",
        section("Results", "<div class='wide'>", learning_curve(experiment), table(results(runs, records, audits), ["", *seeds]), "</div>"),
        section("Worth knowing", *worth_knowing(runs, records, audits)),
        section(heading(audits), *step_audit(experiment, audits)),
        section("Where the time went", *(bar for seed, audit in zip(seeds, audits, strict=True) for bar in time_bar(seed, audit.metrics))),
        section("Settings", table(settings(records[0]), ["setting", "value", "from"])),
        section("Environment", table(environment(records))),
        section("Versions and machine", table(origin(records[0]))),
    ]
    return fill(title, body)


def fill(title: str, body: Iterable[str]) -> str:
    """The whole page around its sections."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(body))


def section(title: str, *content: str) -> str:
    """A heading and what stands under it, which is HTML already."""
    return "\n".join([f"<section><h2>{title}</h2>", *content, "</section>"])


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """A table of plain text; the first cell of a row is its name."""
    top = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in head)
    lines = (
        f"<tr><th scope='row'>{escape(str(name))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return "\n".join(
        ["<div class='scroll'><table>", f"<thead><tr>{top}</tr></thead>" if head else "", "<tbody>", *lines, "</tbody></table></div>"]
    )


def svg(figure: Figure, name: str) -> str:
    """A figure as a part of the page, without ids that another might have too, and in the colours of the style sheet."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True)
    inside = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue().partition("<svg")[2].partition(">")[2], flags=re.DOTALL)
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)
    for colour, variable in VARIABLES.items():
        inside = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", inside, flags=re.IGNORECASE)
    width, height = figure.get_size_inches() * 72
    return f"<figure><figcaption>{escape(name)}</figcaption><svg viewBox='0 0 {width:g} {height:g}' role='img'>{inside}</figure>"


def learning_curve(experiment: Experiment) -> str:
    """The picture of `surefoot plot`, smaller, with its words around it."""
    figure = curves.draw([experiment])
    figure.set_size_inches(LARGE)
    (axes,) = figure.axes
    note, axis = axes.get_title("right"), axes.get_ylabel()
    for where in ("left", "right"):
        axes.set_title("", loc=where)
    axes.set_ylabel("")
    return svg(figure, f"{axis}; {note}")


def results(runs: Sequence[Path], records: Sequence[dict[str, Any]], audits: Sequence[Audit]) -> list[list[str]]:
    """The last numbers, a column for each run."""
    columns = [final_numbers(run, record, audit.metrics) for run, record, audit in zip(runs, records, audits, strict=True)]
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "") for column in columns)] for name in names]


def final_numbers(run: Path, record: dict[str, Any], metrics: dict[str, Vector]) -> dict[str, str]:
    """What came out of a run, in words."""
    step, episode_return = metrics["step"], metrics["episode_return"]
    numbers = {"environment steps": f"{step[-1]:,.0f} of {max(step[-1], record['steps']):,.0f}", "iterations": f"{len(step):,}"}
    numbers["episodes"] = f"{metrics['episodes'][-1]:,.0f}"
    if np.isfinite(episode_return).any():
        best = int(np.nanargmax(episode_return))
        numbers["mean return of the last 100 episodes"] = f"{episode_return[-1]:,.1f}"
        numbers["the same at its best"] = f"{episode_return[best]:,.1f} at step {step[best]:,.0f}"
    for name, result in evaluation(run).items():
        numbers[f"evaluation, {name}"] = result
    numbers["steps per second, median"] = f"{np.nanmedian(metrics['time/steps_per_second']):,.0f}"
    numbers["time of training"] = duration(metrics["time/seconds"][-1])
    return numbers


def evaluation(run: Path) -> dict[str, str]:
    """The last `surefoot eval`, if there was one."""
    path = run / "evaluation.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        kinds = {name: found[name] for name in ("deterministic", "stochastic")}
        return {
            name: f"{kind['mean']:,.1f} +- {kind['standard_deviation']:.1f} (standard deviation), {len(kind['returns'])} episodes"
            for name, kind in kinds.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); run `surefoot eval {run}` again, or remove the file.") from error


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def worth_knowing(runs: Sequence[Path], records: Sequence[dict[str, Any]], audits: Sequence[Audit]) -> list[str]:
    """What stands out, and what to do."""
    items = []
    for run, record, audit in zip(runs, records, audits, strict=True):
        which = f"Seed {audit.seed}: " if len(runs) > 1 else ""
        found = [(finding.what, finding.advice) for finding in findings(record, audit.metrics)]
        if (done := audit.metrics["step"][-1]) < record["steps"]:
            what = f"The run is not complete: {done / record['steps']:.0%} of its steps."
            found.insert(0, (what, f"Continue it with surefoot train --resume {run}"))
        items += [f"<li><strong>{escape(which + what)}</strong> {escape(advice)}</li>" for what, advice in found]
    return ["<ul class='findings'>", *(items or ["<li class='fine'>Nothing in the audit stands out.</li>"]), "</ul>"]


def step_audit(experiment: Experiment, audits: Sequence[Audit]) -> list[str]:
    """A picture for each panel, so that they flow with the width of the page."""
    large: list[str] = []
    small: list[str] = []
    for index, audit in enumerate(audits):
        if has_improvements(audit):
            figure = Figure(figsize=LARGE, layout="constrained")
            draw_improvement(figure.add_subplot(), audit, style(index)["color"])
            large.append(svg(figure, f"seed {audit.seed}: {IMPROVEMENT}" if len(audits) > 1 else IMPROVEMENT))
    for panel in panels(audits):
        kind, size = (large, LARGE) if "kl" in panel.names else (small, SMALL)
        figure = Figure(figsize=size, layout="constrained")
        draw_panel(figure.add_subplot(), panel, experiment.settings, audits)
        kind.append(svg(figure, panel.title))
    if not large + small:
        return [f"<p>{escape(experiment.settings['algorithm'])} reports nothing of it.</p>"]
    keys = "".join(f"{key(style(index)['color'])} seed {audit.seed} " for index, audit in enumerate(audits)) if len(audits) > 1 else ""
    if heading(audits) == "Step audit":
        about = "How far each step of the policy went, and whether it brought what it promised, against environment steps"
        shades = "Improvements are drawn within a standard error."
    else:
        about, shades = "What the updates reported, against environment steps", ""
    return [
        f"<p class='note'>{about}: {note(audits)}. {shades} {keys}</p>",
        *("<div class='wide'>", *large, "</div>", "<div class='grid'>", *small, "</div>"),
    ]


def key(colour: str) -> str:
    """A dot in one of the pictures' colours."""
    return f"<span class='key' style='background: var(--{VARIABLES[colour]})'></span>"


PARTS = "environment", "acting", "learning"


def time_spent(metrics: dict[str, Vector], parts: Sequence[str] = PARTS) -> dict[str, float]:
    """Seconds of training by what they went into; the rest is what no part of an iteration accounts for."""
    seconds = np.diff(metrics["step"], prepend=0) / metrics["time/steps_per_second"]
    spent = {FIRST: float(seconds[0])}
    if known := [part for part in parts if f"time/{part}" in metrics]:
        spent |= {part: float(np.nansum((seconds * metrics[f"time/{part}"])[1:])) for part in known}
    else:
        spent[COMPILED] = float(np.nansum(seconds[1:]))
    return spent | {"rest": max(0.0, float(metrics["time/seconds"][-1]) - sum(spent.values()))}


def time_bar(seed: str, metrics: dict[str, Vector], parts: Sequence[str] = PARTS) -> list[str]:
    """A bar of the parts, and its key."""
    spent = time_spent(metrics, parts)
    total = sum(spent.values())
    colours = dict(zip(spent, (INK, *COLOURS), strict=False))
    pieces = (
        f"<span style='width: {100 * part / total:.2f}%; background: var(--{VARIABLES[colours[name]]})'></span>"
        for name, part in spent.items()
    )
    keys = (f"<li>{key(colours[name])}{escape(name)}: {duration(part)}, {part / total:.0%}</li>" for name, part in spent.items())
    return [
        f"<p class='note'>{escape(seed)}: {duration(total)} in all</p>",
        f"<div class='bar'>{''.join(pieces)}</div>",
        f"<ul class='keys'>{''.join(keys)}</ul>",
    ]


def settings(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The configuration with where each value comes from, what was set first."""
    defaults = dataclasses.asdict(named(record["algorithm"]).config())
    rows = []
    for name, value in record["config"].items():
        default = list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]
        rows.append((name, plain(value), "preset" if name in record["preset"] else "default" if value == default else "set by the user"))
    return sorted(rows, key=lambda row: ORIGINS.index(row[2]))


def plain(value: Any) -> str:
    """A value of JSON as one would say it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value).strip("[]")


def environment(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was learned on."""
    record = records[0]
    return [
        ("name", record["environment"]),
        *((f"{kind} space", shorten(str(from_json(record[f"{kind}_space"])), 400)) for kind in ("observation", "action")),
        ("action masks", "yes" if record["has_action_mask"] else "no"),
        ("streams stepped in parallel", f"{record['num_envs']:,}"),
        *((name.replace("_", " "), plain(value)) for name, value in record.get("environment_settings", {}).items()),
        ("seeds", ", ".join(str(record["seed"]) for record in records)),
        ("resume", RESUME.get(record["resume"], record["resume"])),
    ]


def origin(record: dict[str, Any]) -> list[tuple[str, str]]:
    """With what, where and how the run was made."""
    lines = {
        "begun": record.get("created"),
        "command": shlex.join(map(str, record.get("command", []))),
        **record.get("machine", {}),
        **record["versions"],
    }
    return [(name, str(value)) for name, value in lines.items() if value]
