"""Every seed reaches the bar: final parameters, the preset's settings, deterministic policy, 100 episodes on other seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surefoot as sf
from surefoot.algorithms import named

# Steps are rounded up to whole batches; these are whole, and within the budgets of 100,000, 150,000, 200,000 and 300,000.
ONLINE = {"num_steps": 1, "critic_epochs": 1, "fit_first": False}
C51 = {"distribution": "categorical", "value_range": (0.0, 50.0), "target_rate": 0.01, "num_steps": 32}
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
    ("q-learning", "CliffWalking-v1", 99_968, -13.0, {}),  # the shortest way
    ("dqn", "CartPole-v1", 98_304, 450.0, {}),
    ("dqn", "CartPole-v1", 98_304, 450.0, {"double": True}),
    ("dqn", "CartPole-v1", 98_304, 450.0, {"dueling": True}),
    ("dqn", "CartPole-v1", 98_304, 450.0, {"n_step": 3, "target_rate": 0.01}),
    ("dqn", "CartPole-v1", 98_304, 450.0, {"prioritised": True, "learning_rate": 1e-3}),
    ("dqn", "CartPole-v1", 199_680, 450.0, {"exploration": "noisy"}),
    ("dqn", "CartPole-v1", 199_680, 450.0, C51),
    ("dqn", "CartPole-v1", 199_680, 450.0, {"distribution": "quantile", "num_atoms": 21}),
    ("rainbow", "CartPole-v1", 199_680, 450.0, {}),
    ("off-policy-actor-critic", "CartPole-v1", 199_936, 400.0, {}),
    ("ddpg", "Pendulum-v1", 19_968, -180.0, {}),
    ("td3", "Pendulum-v1", 19_968, -180.0, {}),
    ("sac", "Pendulum-v1", 19_968, -180.0, {}),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("algorithm", "environment", "steps", "bar", "settings"), BARS)
def test_mean_return_reaches_the_bar(
    algorithm: str, environment: str, steps: int, bar: float, settings: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    run = sf.train(named(algorithm).config(**settings), environment, steps=steps, seed=seed, out=tmp_path / "run", progress=False)
    returns = run.evaluate(episodes=100)
    assert returns.shape == (100,)
    assert returns.mean() >= bar
