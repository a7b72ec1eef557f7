"""Tokens per second of sampling from a small language model: Surefoot beside `transformers.generate`, on the same cores.

    python benchmarks/sampling.py                                             measure, print the table, write results/sampling.json
    python benchmarks/sampling.py --table benchmarks/results/sampling.json    print the table of a recorded result

Every measurement is a process of its own, which is given one core or all of them, and has as many threads. Rounds go through
all rows in turn, so that a slow moment of a shared machine hits all alike; the median over rounds counts. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import RESULTS, ROOT, provenance

from surefoot.rlhf.model import init_model
from surefoot.rlhf.pretrained import from_hugging_face, save_model
from surefoot.rlhf.tiny_reviews import MAX_PROMPT_TOKENS, MAX_TOKENS, MODEL_CONFIG

RUNNERS = {name: Path(__file__).parent / "runners" / f"sample_{name}.py" for name in ("surefoot", "transformers")}
CONFIG = from_hugging_face(MODEL_CONFIG)  # of `surefoot rlhf demo`, as are the lengths
ROWS, PROMPT_TOKENS, NEW_TOKENS = 64, MAX_PROMPT_TOKENS, (24, MAX_TOKENS - MAX_PROMPT_TOKENS)
CALLS_OF_WARM_UP = 2


def prompts() -> dict[str, Any]:
    """As many prompts as rows, of 6 to 16 tokens, padded on their left."""
    generator = np.random.default_rng(0)
    mask = np.arange(PROMPT_TOKENS) >= generator.integers(0, PROMPT_TOKENS - 5, (ROWS, 1))
    tokens = np.where(mask, generator.integers(3, CONFIG.vocab_size, mask.shape), CONFIG.pad_token)
    return {"prompts": tokens.tolist(), "mask": mask.tolist(), "stop": CONFIG.eos_tokens[0], "pad": CONFIG.pad_token}


def measure(row: dict[str, Any], job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One process: {"result": ..., "versions": ...}. What the runners count as a step is a token of each row."""
    job = job | {"settings": {"num_steps": row["new_tokens"]}, "num_envs": ROWS, "warm_up": CALLS_OF_WARM_UP, "seconds": seconds}
    job["threads"] = row["threads"]
    environment, every_core = os.environ | {"OMP_NUM_THREADS": str(row["threads"])}, os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every_core)[: row["threads"]])  # the new process has the same
    try:
        command = [sys.executable, RUNNERS[row["library"]], json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        os.sched_setaffinity(0, every_core)
    if done.returncode:
        sys.exit(f"{name_of(row)}: {RUNNERS[row['library']].name} failed.\n{done.stdout}{done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{measured['result']['steps_per_second']:>12,.0f} tokens/s  {name_of(row)}", file=sys.stderr)
    return measured


def name_of(row: dict[str, Any]) -> str:
    return f"{row['new_tokens']} new tokens, threads: {row['threads']}, {row['library']}"


def benchmark(*, repetitions: int, seconds: float) -> dict[str, Any]:
    """All rounds, as JSON."""
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}), so the numbers will be low", file=sys.stderr)
    threads = sorted({1, len(os.sched_getaffinity(0))})
    rows: list[dict[str, Any]] = [
        {"new_tokens": new, "threads": number, "library": library, "repetitions": []}
        for new in NEW_TOKENS
        for number in threads
        for library in RUNNERS
    ]
    with tempfile.TemporaryDirectory() as directory:
        # Compiled programs are kept in a cache that begins empty: the first round compiles, the others load.
        os.environ |= {"XDG_CACHE_HOME": directory, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        model = init_model(CONFIG, jax.random.key(0))
        job = prompts() | {"model": str(save_model(model, Path(directory) / "model"))}
        for _ in range(repetitions):
            for row in rows:
                measured = measure(row, job, seconds)
                row["versions"] = measured["versions"]
                row["repetitions"].append(measured["result"])
    settings = {"model": dataclasses.asdict(CONFIG), "parameters": sum(x.size for x in jax.tree.leaves(model))}
    settings |= {"rows": ROWS, "prompt_tokens": PROMPT_TOKENS, "temperature": 1.0}
    return provenance() | {"load": load, "settings": settings, "rows": rows}


def speed(row: dict[str, Any]) -> float:
    return statistics.median(repetition["steps_per_second"] for repetition in row["repetitions"])


def table(record: dict[str, Any]) -> str:
    """Markdown: tokens per second of every row, and how many times those of `transformers` Surefoot's are."""
    rows, settings = record["rows"], record["settings"]
    own = {(row["new_tokens"], row["threads"]): speed(row) for row in rows if row["library"] == "surefoot"}
    lines = ["| | tokens/s: median (range) | Surefoot is faster by | start-up |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        speeds = [repetition["steps_per_second"] for repetition in row["repetitions"]]
        ratio = f"{own[row['new_tokens'], row['threads']] / speed(row):.1f}x" if row["library"] != "surefoot" else ""
        startup = f"{row['repetitions'][0]['startup_seconds']:.1f} s"
        name = f"{name_of(row)} {row['versions'][row['library']]}"
        lines.append(f"| {name} | {speed(row):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f}) | {ratio} | {startup} |")
    versions = {name: version for row in rows for name, version in row["versions"].items() if name in ("jax", "torch", "numpy")}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    machine = record["machine"]
    what = f"{settings['parameters'] / 1e6:.1f}M parameters, {settings['rows']} prompts of at most {settings['prompt_tokens']} tokens"
    return "\n".join([*lines, "", f"`{what}; {machine['processor']}, {machine['cores']} cores; {record['date']}; {listed}`"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="rounds")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a measurement, after the warm-up")
    parser.add_argument("--quick", action="store_true", help="one call, one round: does it run?")
    parser.add_argument(
        "--out", type=Path, help=f"the record; by default {(RESULTS / 'sampling.json').relative_to(ROOT)}, none with --quick"
    )
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a record and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    if options.quick:
        options.repetitions, options.seconds = 1, 0.0
    record = benchmark(repetitions=options.repetitions, seconds=options.seconds)
    print(table(record), end="")
    if out := options.out or (None if options.quick else RESULTS / "sampling.json"):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
