"""Speed of Atari alone: this backend beside Gymnasium's environment with its own preprocessing, in one process, without a policy.

    python benchmarks/atari.py                   measure, print the table, write results/atari.json

Needs opencv-python-headless, with which Gymnasium scales pictures. Both play random actions, hold each for four frames, show the
larger of the last two in grey at 84 x 84, and stack four pictures. Rounds alternate; the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from machine import RESULTS, provenance

from surefoot.envs import make

GAME, NOOPS = "Breakout", 30
PACKAGES = "surefoot", "ale-py", "gymnasium", "numpy", "opencv-python-headless"
Play = Callable[[np.ndarray], object]


def surefoot_games(num_envs: int) -> Play:
    environment, _ = make(f"{GAME}NoFrameskip-v4", num_envs)
    environment.reset(0)
    return environment.step


def gymnasium_games(num_envs: int) -> Play:
    """One after the other, each reset where its game is over."""
    gymnasium.register_envs(ale_py)

    def one() -> gymnasium.Env:
        game = gymnasium.make(f"ALE/{GAME}-v5", frameskip=1, repeat_action_probability=0.0)
        return FrameStackObservation(AtariPreprocessing(game, noop_max=NOOPS, frame_skip=4, screen_size=84), 4)

    games = [one() for _ in range(num_envs)]
    for seed, game in enumerate(games):
        game.reset(seed=seed)

    def step(action: np.ndarray) -> None:
        for game, own in zip(games, action, strict=True):
            _, _, terminated, truncated, _ = game.step(own)
            if terminated or truncated:
                game.reset()

    return step


def measure(step: Play, num_envs: int, seconds: float) -> dict[str, float]:
    """Steps per second of all the games together, and processor time of one step in microseconds."""
    actions = np.random.default_rng(0).integers(4, size=(50, num_envs))
    for action in actions[:10]:
        step(action)
    wall, processor, num_steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        for action in actions:
            step(action)
        num_steps += actions.size
    rate = num_steps / (time.perf_counter() - wall)
    return {"steps_per_second": round(rate, 1), "processor_microseconds": round((time.process_time() - processor) / num_steps * 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record is written")
    options = parser.parse_args()
    builders = {"surefoot": surefoot_games, "gymnasium, a plain loop": gymnasium_games}
    rows = {(library, num_envs): (build(num_envs), []) for num_envs in (8, 16) for library, build in builders.items()}
    for _ in range(options.rounds):
        for (_, num_envs), (step, rounds) in rows.items():
            rounds.append(measure(step, num_envs, options.seconds))
    medians = {row: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]} for row, (_, rounds) in rows.items()}
    for (library, num_envs), median in medians.items():
        ratio = median["steps_per_second"] / medians["gymnasium, a plain loop", num_envs]["steps_per_second"]
        print(
            f"{num_envs:>3} games  {library:<24} {median['steps_per_second']:>9,.0f} steps/s ({ratio:.2f}x), "
            f"{median['processor_microseconds']:.0f} us of processor time a step"
        )
    record = provenance() | {"game": GAME, "versions": {name: metadata.version(name) for name in PACKAGES}}
    record["rows"] = [
        {"library": library, "num_envs": num_envs, "median": medians[library, num_envs], "rounds": rounds}
        for (library, num_envs), (_, rounds) in rows.items()
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "atari.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
