"""Every seed reaches the bar: final parameters, the preset's settings, deterministic policy, 100 episodes on other seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surefoot as sf

# Steps are rounded up to whole batches; these are whole, and within the budgets of 100,000 and 200,000.
BARS = [(sf.PPO(), "CartPole-v1", 99_840, 475.0), (sf.PPO(), "Pendulum-v1", 198_656, -250.0)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("config", "environment", "steps", "bar"), BARS, ids=lambda value: value if isinstance(value, str) else "")
def test_mean_return_reaches_the_bar(config: Any, environment: str, steps: int, bar: float, seed: int, tmp_path: Path) -> None:
    run = sf.train(config, environment, steps=steps, seed=seed, out=tmp_path / "run", progress=False)
    returns = run.evaluate(episodes=100)
    assert returns.shape == (100,)
    assert returns.mean() >= bar
