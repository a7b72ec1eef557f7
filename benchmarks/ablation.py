"""What each ingredient of Rainbow is worth on MinAtar: the method whole, without each, and the deep Q-network that has none.

    python benchmarks/ablation.py                                               train; write the record and its figure
    python benchmarks/ablation.py --table benchmarks/results/ablation.json      print the table of a recorded study

Hessel et al. 2018, fig. 3, asks the same of Atari. Stopped in any way and started again, it goes on: a finished run is not trained
again, and an unfinished one is resumed. The runs stay in runs/ablation; delete them there to study a changed program.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from learning import study_of, train_and_evaluate
from machine import RESULTS, ROOT, provenance
from matplotlib.figure import Figure

from surefoot.cli import user_errors
from surefoot.report.curves import draw, experiments

FIGURE = ROOT / "docs" / "images" / "ablation.png"
VARIANTS = {
    "rainbow": ["rainbow"],
    "without double": ["rainbow", "--no-double"],
    "without dueling": ["rainbow", "--no-dueling"],
    "without n-step": ["rainbow", "--n-step", "1"],
    "without noisy": ["rainbow", "--exploration", "epsilon", "--final-epsilon", "0.01"],
    "without categorical": ["rainbow", "--distribution", "none"],
    "without prioritised": ["rainbow", "--no-prioritised"],
    "dqn": ["dqn"],
}
GAMES = {"Breakout": list(VARIANTS), "SpaceInvaders": ["rainbow", "dqn"]}
EPISODES = 100  # of the evaluation of each seed


def places(game: str, variant: str, seeds: int) -> list[Path]:
    """Where the runs of a variant are, below the directory of all."""
    return [Path(game, variant.replace(" ", "-"), f"seed-{seed}") for seed in range(seeds)]


def commands(steps: int, seeds: int) -> dict[str, list[str]]:
    """What `surefoot train` is told for each run, by its place."""
    return {
        str(place): [
            *(VARIANTS[variant][0], f"MinAtar/{game}-v1", *VARIANTS[variant][1:]),
            *("--steps", str(steps), "--seed", str(seed)),
        ]
        for game, variants in GAMES.items()
        for variant in variants
        for seed, place in enumerate(places(game, variant, seeds))
    }


def curves(runs: Path, seeds: int) -> Figure:
    """Learning curves of every variant on Breakout."""
    drawn = []
    for variant in VARIANTS:
        (experiment,) = experiments([runs / place for place in places("Breakout", variant, seeds)])
        settings = {"algorithm": variant, "environment": experiment.settings["environment"]}
        drawn.append(experiment._replace(settings=settings))
    return draw(drawn)


def table(record: dict[str, Any]) -> str:
    """Markdown: what each variant came to in each game."""
    lines = ["| | mean return (95 % interval) | by seed |", "| --- | ---: | ---: |"]
    for row in record["rows"]:
        low, high = row["interval"]
        by_seed = ", ".join(f"{seed['mean']:.1f}" for seed in row["seeds"])
        lines.append(f"| {row['game']}, {row['variant']} | {row['mean']:.1f} ({low:.1f}-{high:.1f}) | {by_seed} |")
    first, machine = record["rows"][0], record["machine"]
    of_each = f"{first['seeds'][0]['steps']:,} frames, {len(first['seeds'])} seeds, {EPISODES} episodes each"
    made = f"{machine['processor']}, {machine['cores']} cores; {record['date']}; jax {first['versions']['jax']}"
    return "\n".join([*lines, "", f"`{of_each}; {made}`"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=lambda text: int(float(text)), default=1_000_000, help="frames of each run")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation", help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json", help="where the record is written")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the figure is written")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a record and train nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    options.runs.mkdir(parents=True, exist_ok=True)
    train_and_evaluate(commands(options.steps, options.seeds), options.runs, EPISODES)
    rows = [
        {"game": game, "variant": variant} | study_of([options.runs / place for place in places(game, variant, options.seeds)])
        for game, variants in GAMES.items()
        for variant in variants
    ]
    record = provenance() | {"rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    curves(options.runs, options.seeds).savefig(options.figure, dpi=160)
    print(f"{table(record)}\n{options.out}\n{options.figure}")


if __name__ == "__main__":
    with user_errors():
        main()
