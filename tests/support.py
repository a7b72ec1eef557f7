"""What several tests share: a small configuration, environments that go wrong on purpose, and a run as comparable bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

import surefoot as sf
from surefoot.training.checkpoint import newest

SMALL = sf.PPO(num_steps=16, minibatch_size=128, epochs=1, hidden=(8,))
SMALL_OPTIONS = ["--no-preset", "--num-steps", "16", "--minibatch-size", "128", "--epochs", "1", "--hidden", "8"]
BATCH = 16 * 8  # environment steps of an iteration of SMALL on the default number of environments


def bits(run: Path) -> tuple[dict[str, bytes], dict[str, object], list[dict[str, object]]]:
    """Everything a run leaves but the time it took: tensors, generators and counters, metrics."""
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    tensors = {file.name: file.read_bytes() for file in checkpoint.path.glob("*.safetensors")}
    tensors["policy"] = (run / "policy.safetensors").read_bytes()
    info = {key: value for key, value in checkpoint.info.items() if key not in ("seconds", "metrics_size")}
    return tensors, info, [{name: value for name, value in row.items() if not name.startswith("time/")} for row in metrics(run)]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_saved(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").glob("step-*"))]


class Walk(gymnasium.Env):
    """Ten random steps, a reward for each 1 that is chosen; it can give its state."""

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.time = self.taken = 0  # steps of the episode, and in all

    def observe(self) -> Any:
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        self.taken += 1
        return self.observe(), float(action == 1), self.time == 10, False, {}

    def get_state(self) -> Any:
        return {}, {"time": self.time, "taken": self.taken}

    def set_state(self, arrays: Any, info: Any) -> None:
        self.time, self.taken = info["time"], info["taken"]


GOOD_STEPS = 45  # that each environment below takes before it goes wrong, in the third iteration of SMALL


class NanObservation(Walk):
    def observe(self) -> Any:
        obs = super().observe()
        obs[1] = np.nan if self.taken == GOOD_STEPS else obs[1]
        return obs


class InfiniteReward(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, np.inf if self.taken == GOOD_STEPS else reward, *rest


class NanInDictionary(Walk):
    observation_space = spaces.Dict(eye=Walk.observation_space, arm=spaces.Dict(angle=spaces.Box(-9.0, 9.0, (2,), np.float32)))

    def observe(self) -> Any:
        angle = np.array([0.0, np.nan if self.taken == GOOD_STEPS else 0.0], np.float32)
        return {"eye": super().observe(), "arm": {"angle": angle}}


class OtherShape(Walk):
    def observe(self) -> Any:
        return np.zeros(4 if self.taken == GOOD_STEPS else 3, np.float32)


class NoLegalAction(Walk):
    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0], {"action_mask": np.ones(2, np.int8)}

    def step(self, action: Any) -> Any:
        return *super().step(action)[:4], {"action_mask": np.full(2, self.taken != GOOD_STEPS, np.int8)}


class OldGym(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, *_ = super().step(action)
        return obs, reward, self.time == 10, {}


class Raises(Walk):
    def step(self, action: Any) -> Any:
        if self.taken == GOOD_STEPS:
            raise RuntimeError("the motor is on fire")
        return super().step(action)


class CountsFromFive(Walk):
    action_space = spaces.Discrete(3, start=5)

    def step(self, action: Any) -> Any:
        assert action in (5, 6, 7), action
        return super().step(action)


class Endless(Walk):
    def step(self, action: Any) -> Any:
        self.time = 0
        return super().step(action)


class OneStep(Walk):
    """Every episode is over, and cut, after one step."""

    def step(self, action: Any) -> Any:
        return self.observe(), 1.0, True, True, {}


class WideWalk(Walk):
    observation_space = spaces.Box(-2.0, 2.0, (3,), np.float32)
