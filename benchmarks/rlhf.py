"""What the demonstration of language models comes to, by seed: the gold and the learned reward, divergence, time.

    python benchmarks/rlhf.py --seeds 0 1 2                          run, print the table, write results/rlhf.json and the picture of seed 0
    python benchmarks/rlhf.py --table benchmarks/results/rlhf.json   print the table of a recorded result

Each seed is `surefoot rlhf demo` and then, in the same directory, the rest of `--study`; compiled programs are kept in a cache that begins
empty for each. The runs stay in --out, where a benchmark that was stopped goes on. Needs the `rlhf` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import RESULTS, ROOT, provenance

PICTURE = ROOT / "docs" / "images" / "over-optimisation.png"
COLUMNS = {"gold": "+.2f", "score": "+.2f", "reference_kl": ".1f"}
NAMES = {"sft": "fine-tuned", "ppo": "PPO", "ppo-free": "PPO without penalty", "ppo-weak": "PPO without penalty, weak reward model"}


def run(seed: int, out: Path) -> dict[str, Any]:
    """One seed, as JSON; done already where its record is there."""
    record = out / f"seed-{seed}.json"
    if record.exists():
        return dict(json.loads(record.read_text()))
    directory, seconds = out / f"seed-{seed}", {}
    environment = os.environ | {"XDG_CACHE_HOME": str(out / f"cache-{seed}"), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    for name, options in (("demo", []), ("study", ["--study"])):
        command = [sys.executable, "-m", "surefoot", "rlhf", "demo", "--seed", str(seed), "--out", str(directory), *options]
        began = time.monotonic()
        subprocess.run(command, env=environment, check=True)
        seconds[name] = round(time.monotonic() - began, 1)
    summary = json.loads((directory / "summary.json").read_text())
    versions = json.loads((directory / "ppo" / "run.json").read_text())["versions"]
    result = {"seed": seed, "seconds": seconds, "versions": versions} | summary
    record.write_text(json.dumps(result, indent=1) + "\n")
    return result


def rows(seeds: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """What each model came to, of every seed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for seed in seeds:
        found["sft"].append(seed["runs"]["ppo"]["before"] | {"reference_kl": 0.0})
        for name, ends in seed["runs"].items():
            found[name].append(ends["after"])
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown: means over seeds, with the least and the most."""

    def cell(values: list[float], form: str) -> str:
        return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    seeds = record["seeds"]
    lines = ["| on held-out prompts | gold reward | learned reward | KL, nats per answer |", "| --- | ---: | ---: | ---: |"]
    for name, ends in rows(seeds).items():
        columns = [cell([end[column] for end in ends], form) for column, form in COLUMNS.items()]
        lines.append(f"| {NAMES[name]} | {' | '.join(columns)} |")
    accuracies = {name: cell([100 * seed["accuracies"][name] for seed in seeds], ".1f") for name in ("reward", "reward-weak")}
    spent = {name: [seed["seconds"][name] for seed in seeds] for name in ("demo", "study")}
    machine = record["machine"]
    facts = [
        f"reward model {accuracies['reward']} % of held-out comparisons, weak one {accuracies['reward-weak']} %",
        f"demo {max(spent['demo']):.0f} s, study {max(spent['study']):.0f} s more at most",
        f"seeds {', '.join(str(seed['seed']) for seed in seeds)}",
        f"{machine['processor']}, {machine['cores']} cores",
        record["date"],
        f"jax {seeds[0]['versions']['jax']}",
    ]
    return "\n".join([*lines, "", f"`{'; '.join(facts)}`"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf-benchmark"), help="where the runs are")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a record and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    record = provenance() | {"seeds": [run(seed, options.out) for seed in options.seeds]}
    print(table(record), end="")
    (RESULTS / "rlhf.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copy(options.out / f"seed-{options.seeds[0]}" / "over-optimisation.png", PICTURE)


if __name__ == "__main__":
    main()
