"""What the runners share: when iterations ended, when to stop, and the line of JSON that they print.

Needs nothing but Python, since every runner lives in the virtual environment of its library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

PACKAGES = [
    "surefoot",
    "stable-baselines3",
    "sb3-contrib",
    "sbx-rl",
    "tianshou",
    "jax",
    "torch",
    "transformers",
    "numpy",
    "gymnasium",
    "mujoco",
]


def read_job() -> dict[str, Any]:
    """What to measure: the command line's only argument."""
    return json.loads(sys.argv[1])


class Clock:
    """Times iterations from its creation, which includes setting up, until enough were seen after those of the warm-up."""

    def __init__(self, job: dict[str, Any]):
        self.job = job
        self.marks = [time.perf_counter()]  # the beginning, then the end of each iteration, or of several that are reported together
        self.done = [0]  # iterations by then

    def tick(self, iterations: int = 1) -> None:
        """So many iterations have ended."""
        self.marks.append(time.perf_counter())
        self.done.append(self.done[-1] + iterations)

    @property
    def enough(self) -> bool:
        warm_up = self.job["warm_up"]
        return len(self.marks) > warm_up + 1 and self.marks[-1] - self.marks[warm_up] >= self.job["seconds"]

    def print_result(self) -> None:
        """Steady speed after the warm-up, and what the first iteration took beyond a steady one: setting up and compiling."""
        settings = self.job["settings"]
        seconds = self.marks[-1] - self.marks[self.job["warm_up"]]
        iterations = self.done[-1] - self.done[self.job["warm_up"]]
        result = {
            "steps_per_second": round(iterations * settings["num_steps"] * self.job["num_envs"] / seconds, 1),
            "iterations": iterations,
            "seconds": round(seconds, 3),
            "startup_seconds": round(self.marks[1] - self.marks[0] - self.done[1] * seconds / iterations, 3),
        }
        print(json.dumps({"result": result, "versions": versions()}))


def print_time_of(call: Callable[[], Any], job: dict[str, Any], batches: int) -> None:
    """Microseconds that each of the `batches` of a call takes, over the job's seconds and after a few calls of warm-up."""
    for _ in range(3):
        call()
    calls, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < job["seconds"] or not calls:
        call()
        calls += 1
    result = {"microseconds": round(seconds / (calls * batches) * 1e6, 2), "batches": calls * batches}
    print(json.dumps({"result": result, "versions": versions()}))


def versions() -> dict[str, str]:
    """Those of PACKAGES that are installed here."""
    installed = {distribution.name.lower().replace("_", "-"): distribution.version for distribution in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}
