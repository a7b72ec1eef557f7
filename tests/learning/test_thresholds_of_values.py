"""Methods that learn values of actions: every seed reaches the bar, by final parameters, the preset's settings, 100 episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bars import SEEDS, assert_reaches

# Steps are rounded up to whole batches; these are whole, and within the budgets of 20,000, 100,000 and 200,000.
BARS: list[tuple[str, str, int, float, dict[str, Any]]] = [
    ("q-learning", "CliffWalking-v1", 99_968, -13.0, {}),  # the shortest way
    ("dqn", "CartPole-v1", 98_304, 450.0, {}),
    ("dqn", "CartPole-v1", 98_304, 450.0, {"double": True}),
    ("dqn", "CartPole-v1", 98_304, 450.0, {"dueling": True}),
    ("dqn", "CartPole-v1", 98_304, 450.0, {"n_step": 3, "target_rate": 0.01}),
    ("dqn", "CartPole-v1", 199_680, 450.0, {"exploration": "noisy"}),
    ("off-policy-actor-critic", "CartPole-v1", 199_936, 400.0, {}),
    ("ddpg", "Pendulum-v1", 19_968, -180.0, {}),
    ("td3", "Pendulum-v1", 19_968, -180.0, {}),
    ("sac", "Pendulum-v1", 19_968, -180.0, {}),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("algorithm", "environment", "steps", "bar", "settings"), BARS)
def test_mean_return_reaches_the_bar(
    algorithm: str, environment: str, steps: int, bar: float, settings: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    assert_reaches(bar, algorithm, environment, steps, settings, seed, tmp_path / "run")
