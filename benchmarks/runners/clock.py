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
    """Times iterations from its creation, which includes setting up, until enough were seen after those of the warm-up.

    Iterations that only fill a replay belong to the warm-up, so that what is timed is learning.
    """

    def __init__(self, job: dict[str, Any]):
        self.job = job
        self.iteration_steps = job["settings"]["num_steps"] * job["num_envs"]
        self.filling = job["settings"].get("learning_starts", 0) // self.iteration_steps  # iterations without learning
        self.marks = [time.perf_counter()]  # the beginning, then the end of each iteration, or of several that are reported together
        self.done = [0]  # iterations by then
        self.warm = 0  # the mark with which the warm-up ends, once it has

    def tick(self, iterations: int = 1) -> None:
        """So many iterations have ended."""
        self.marks.append(time.perf_counter())
        self.done.append(self.done[-1] + iterations)
        # Two reports at least, since the second may compile what the first did not need.
        if not self.warm and len(self.marks) > 2 and self.done[-1] >= self.filling + self.job["warm_up"]:
            self.warm = len(self.marks) - 1

    @property
    def enough(self) -> bool:
        is_measured = self.warm and len(self.marks) > self.warm + 1
        return bool(is_measured) and self.marks[-1] - self.marks[self.warm] >= self.job["seconds"]

    def print_result(self) -> None:
        """Steady speed after the warm-up, and what all up to the first iteration that learns took beyond a steady one."""
        settings = self.job["settings"]
        seconds, iterations = self.marks[-1] - self.marks[self.warm], self.done[-1] - self.done[self.warm]
        first = next(i for i, done in enumerate(self.done) if done > self.filling)
        startup = self.marks[first] - self.marks[0] - (self.done[first] - self.filling) * seconds / iterations
        speed = iterations * self.iteration_steps / seconds
        result = {"steps_per_second": round(speed, 1)}
        if "update_to_data" in settings:
            result["updates_per_second"] = round(speed * settings["update_to_data"], 1)
        result |= {"iterations": iterations, "seconds": round(seconds, 3), "startup_seconds": round(startup, 3)}
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
