"""Every seed reaches the bar: final parameters, the preset's settings, deterministic policy, 100 episodes on other seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bars import SEEDS, assert_reaches

# Steps are rounded up to whole batches; these are whole, and within the budgets of 100,000, 150,000, 200,000 and 300,000.
ONLINE = {"num_steps": 1, "critic_epochs": 1, "fit_first": False, "learning_rate": 2e-4}
BARS: list[tuple[str, str, int, float, dict[str, Any]]] = [
    ("reinforce", "CartPole-v1", 149_504, 450.0, {}),
    ("vpg-adaptive", "CartPole-v1", 149_504, 450.0, {}),
    ("actor-critic", "CartPole-v1", 149_888, 450.0, {}),
    ("actor-critic", "CartPole-v1", 200_000, 400.0, ONLINE),
    ("a2c", "CartPole-v1", 150_000, 450.0, {}),
    ("a2c-trust-region", "CartPole-v1", 150_000, 450.0, {}),
    ("trpo", "CartPole-v1", 98_304, 475.0, {}),
    ("trpo", "Pendulum-v1", 198_656, -250.0, {}),
    ("trpo-penalty", "CartPole-v1", 98_304, 475.0, {}),
    ("ppo-penalty", "CartPole-v1", 98_304, 475.0, {}),
    ("ppo", "CartPole-v1", 99_840, 475.0, {}),
    ("ppo", "Pendulum-v1", 198_656, -250.0, {}),
    ("cem", "CartPole-v1", 299_776, 475.0, {}),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("algorithm", "environment", "steps", "bar", "settings"), BARS)
def test_mean_return_reaches_the_bar(
    algorithm: str, environment: str, steps: int, bar: float, settings: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    assert_reaches(bar, algorithm, environment, steps, settings, seed, tmp_path / "run")
