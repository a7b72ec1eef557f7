"""Drawing minibatches from a replay: Surefoot's inside the compiled program, beside those of its peers.

    python benchmarks/replay.py                                            measure, print the table, write results/replay.json
    python benchmarks/replay.py --table benchmarks/results/replay.json     print the table of a recorded result

A minibatch is drawn and gathered; where it is drawn by priority, its transitions are given new ones too. As in speed.py, every
measurement is a process of its own, and rounds go through all rows in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from machine import RESULTS, ROOT, provenance
from speed import PEERS, load_now, python_of, run

SIZES = 1_000, 100_000, 1_000_000
SETTINGS = {"batch_size": 256, "observation": 17, "action": 6, "num_envs": 8}


class Library(NamedTuple):
    runner: str
    requirements: tuple[str, ...] = ()  # of a virtual environment of its own
    batches: tuple[int, ...] = (1,)  # in one call
    draws: tuple[str, ...] = ("uniform", "prioritised")


LIBRARIES = {
    "surefoot": Library("measure_replay_surefoot.py", batches=(8, 1)),  # 8: an iteration of dqn or sac with their defaults
    "stable-baselines3": Library("measure_replay_sb3.py", PEERS["stable-baselines3"].requirements, draws=("uniform",)),
    "tianshou": Library("measure_replay_tianshou.py", PEERS["tianshou"].requirements),
}
Row = dict[str, Any]  # draw, library, batches, size; then what was measured


def rows_of(sizes: tuple[int, ...]) -> list[Row]:
    """What to measure."""
    return [
        {"draw": draw, "library": name, "batches": batches, "size": size}
        for draw in ("uniform", "prioritised")
        for name, library in LIBRARIES.items()
        if draw in library.draws
        for batches in library.batches
        for size in sizes
    ]


def benchmark(sizes: tuple[int, ...], *, repetitions: int, seconds: float, venvs: Path) -> dict[str, Any]:
    """The rounds; everything that was measured, as JSON."""
    pythons = {name: python_of(name, each.requirements, venvs) for name, each in LIBRARIES.items() if each.requirements}
    load, rows = load_now(), rows_of(sizes)
    for _ in range(repetitions):
        for row in rows:
            job = SETTINGS | {
                "prioritised": row["draw"] == "prioritised",
                "size": row["size"],
                "batches": row["batches"],
                "seconds": seconds,
            }
            python = pythons.get(row["library"], Path(sys.executable))
            measured = run(LIBRARIES[row["library"]].runner, job, python)
            row["versions"] = measured["versions"]
            row.setdefault("repetitions", []).append(measured["result"])
            name = f"{row['draw']} {row['library']} {row['batches']} of {row['size']:,}"
            print(f"{measured['result']['microseconds']:>12,.1f} us  {name}", file=sys.stderr)
    return provenance() | {"load": load, "settings": SETTINGS, "rows": rows}


def median(row: Row) -> float:
    return statistics.median(repetition["microseconds"] for repetition in row["repetitions"])


def table(record: dict[str, Any]) -> str:
    """Markdown: microseconds of each minibatch by size, medians with ranges, and how many times as long a peer takes."""
    rows = {(row["draw"], row["library"], row["batches"], row["size"]): row for row in record["rows"]}
    sizes = sorted({row["size"] for row in record["rows"]})
    lines = [
        f"| microseconds of a minibatch: median (range) | {' | '.join(f'{size:,} rows' for size in sizes)} |",
        f"| --- | {' | '.join('---:' for _ in sizes)} |",
    ]
    for draw, library, batches in dict.fromkeys(key[:3] for key in rows):
        cells = []
        for size in sizes:
            row = rows[draw, library, batches, size]
            times = [repetition["microseconds"] for repetition in row["repetitions"]]
            own = median(rows[draw, "surefoot", max(key[2] for key in rows if key[:2] == (draw, "surefoot")), size])
            ratio = "" if library == "surefoot" else f", {median(row) / own:.1f}x"
            cells.append(f"{median(row):,.0f} ({min(times):,.0f}-{max(times):,.0f}){ratio}")
        how = f", {batches} in a call" if library == "surefoot" else ""
        lines.append(f"| {draw}, {library} {row['versions'][library]}{how} | {' | '.join(cells)} |")
    versions = {name: version for row in record["rows"] for name, version in row["versions"].items() if name not in LIBRARIES}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if name in ("jax", "torch", "numpy"))
    machine = record["machine"]
    return "\n".join([*lines, "", f"`{machine['processor']}, {machine['cores']} cores; {record['date']}; {listed}`"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="rounds")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a measurement, after the warm-up")
    parser.add_argument("--quick", action="store_true", help="one call, one round, the smallest size: does it run?")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "surefoot" / "benchmarks", help="where the peers live")
    parser.add_argument("--out", type=Path, help=f"the record; by default {(RESULTS / 'replay.json').relative_to(ROOT)}, none with --quick")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a record and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    if options.quick:
        options.repetitions, options.seconds = 1, 0.0
    out = options.out or (None if options.quick else RESULTS / "replay.json")
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {"XDG_CACHE_HOME": directory, "JAX_PLATFORMS": "cpu"}
        sizes = SIZES[:1] if options.quick else SIZES
        record = benchmark(sizes, repetitions=options.repetitions, seconds=options.seconds, venvs=options.venvs.resolve())
    print(table(record), end="")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
