"""A recorded learning study: train some seeds, evaluate what each ended with, and write benchmarks/results/....json.

    python benchmarks/learning.py --algorithm ppo --environment HalfCheetah-v5 --steps 1e6 --seeds 5
    python benchmarks/learning.py --table benchmarks/results/*HalfCheetah*.json                    print the table of recorded studies

Stopped in any way and started again, it goes on: a finished seed is not trained again, and an unfinished one is resumed.
The runs stay in runs/learning; delete them there to study a changed program.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from machine import RESULTS, ROOT, provenance

from surefoot.cli import run_side_by_side, user_errors

NUM_RESAMPLES = 10_000


def confidence_interval(means: list[float]) -> list[float]:
    """95 % percentile-bootstrap interval of the mean over seeds (Efron & Tibshirani 1993, ch. 13), the same at every call."""
    resampled = np.random.default_rng(0).choice(means, (NUM_RESAMPLES, len(means))).mean(axis=1)
    return np.percentile(resampled, [2.5, 97.5]).tolist()


def is_evaluated(run: Path, episodes: int) -> bool:
    """Evaluation follows the end of training, so nothing is left to do."""
    evaluation = run / "evaluation.json"
    return evaluation.exists() and json.loads(evaluation.read_text())["episodes"] == episodes


def train_and_evaluate(commands: dict[str, list[str]], directory: Path, episodes: int) -> None:
    """Bring every run to its end and its evaluation, as many at a time as there are cores.

    `commands` are what follows `surefoot train`, by the place of the run in `directory`.
    """
    unfinished = {name: command for name, command in commands.items() if not is_evaluated(directory / name, episodes)}
    training = {
        name: ["train", "--resume", str(directory / name)]
        if (directory / name / "run.json").exists()
        else ["train", *command, "--out", str(directory / name)]
        for name, command in unfinished.items()
    }
    evaluating = {name: ["eval", str(directory / name), "--episodes", str(episodes)] for name in unfinished}
    for each in (training, evaluating):
        run_side_by_side(each, directory)


def result_of(run: Path) -> dict[str, Any]:
    """What one seed came to."""
    record, evaluation = (json.loads((run / name).read_text()) for name in ("run.json", "evaluation.json"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "seed": record["seed"],
        "mean": evaluation["deterministic"]["mean"],
        "standard_deviation": evaluation["deterministic"]["standard_deviation"],
        "mean_of_drawn_actions": evaluation["stochastic"]["mean"],
        "episodes": evaluation["episodes"],
        "steps": last["step"],
        "seconds": last["time/seconds"],
        "created": record["created"],
    }


def study_of(runs: list[Path]) -> dict[str, Any]:
    """What runs that differ in nothing but the seed came to, and their settings."""
    seeds = [result_of(run) for run in runs]
    means = [seed["mean"] for seed in seeds]
    started = json.loads((runs[0] / "run.json").read_text())
    settings = {name: started[name] for name in ("algorithm", "environment", "config", "preset", "num_envs", "versions")}
    return settings | {"mean": float(np.mean(means)), "interval": confidence_interval(means), "seeds": seeds}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: what each study came to."""
    lines = ["| | settings | mean return (95 % interval) | seeds | steps |", "| --- | --- | ---: | ---: | ---: |"]
    for record in records:
        low, high = record["interval"]
        settings = ", ".join(f"{name}={value}" for name, value in record["preset"].items()) or "defaults"
        returns = f"{record['mean']:,.0f} ({low:,.0f}-{high:,.0f})"
        steps = record["seeds"][0]["steps"]
        lines.append(f"| {record['algorithm']}, {record['environment']} | {settings} | {returns} | {len(record['seeds'])} | {steps:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm")
    parser.add_argument("--environment")
    parser.add_argument("--steps", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--episodes", type=int, default=100, help="of the evaluation of each seed")
    parser.add_argument("--no-preset", dest="preset", action="store_false", help="the algorithm's defaults")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="where the runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record is written")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="print the table of records and train nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(path.read_text()) for path in options.table]), end="")
        return
    if not (options.algorithm and options.environment):
        parser.error("--algorithm and --environment are required, or --table")
    name = f"{options.algorithm}-{options.environment}{'' if options.preset else '-defaults'}"
    directory = options.runs / f"{name}-{options.steps}"
    directory.mkdir(parents=True, exist_ok=True)
    command = [options.algorithm, options.environment, "--steps", str(options.steps), *([] if options.preset else ["--no-preset"])]
    commands = {f"seed-{seed}": [*command, "--seed", str(seed)] for seed in range(options.seeds)}
    train_and_evaluate(commands, directory, options.episodes)

    record = provenance() | study_of([directory / name for name in commands])
    options.results.mkdir(parents=True, exist_ok=True)
    out = options.results / f"{name}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    low, high = record["interval"]
    print(f"{name}: mean return {record['mean']:.1f}, 95 % interval {low:.1f} to {high:.1f} over {options.seeds} seeds\n{out}")


if __name__ == "__main__":
    with user_errors():
        main()
