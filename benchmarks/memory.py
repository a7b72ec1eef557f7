"""Does a long run's memory stay flat? Train PPO on HalfCheetah-v5 in this process and write benchmarks/results/memory.json.

    python benchmarks/memory.py

Resident memory is read after every iteration, so after whatever the iteration saved and logged.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from machine import RESULTS, provenance

import surefoot as sf
from surefoot.cli import user_errors

SHARES = (0.05, 0.25, 0.5, 1.0)  # of the run; at the first, everything has been compiled
MEGABYTE = 2**20


def resident() -> float:
    """Megabytes of this process in memory, as Linux counts them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        samples = {report.step: resident() for report in sf.iterate(sf.PPO(), "HalfCheetah-v5", steps=options.steps, out=run)}
        started = json.loads((run / "run.json").read_text())

    warm = {step: memory for step, memory in samples.items() if step >= SHARES[0] * options.steps}
    at = {f"{share:.0%}": next(memory for step, memory in warm.items() if step >= share * options.steps) for share in SHARES}
    record = provenance() | {name: started[name] for name in ("algorithm", "environment", "config", "preset", "num_envs", "versions")}
    record |= {"steps": max(samples), "megabytes": at, "highest": max(warm.values())}
    options.results.mkdir(parents=True, exist_ok=True)
    out = options.results / "memory.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    shown = ", ".join(f"{memory:.0f} MB at {share}" for share, memory in at.items())
    print(f"{shown} of {record['steps']} steps; highest {record['highest']:.0f} MB\n{out}")


if __name__ == "__main__":
    with user_errors():
        main()
