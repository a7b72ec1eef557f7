"""What a learning run has to reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import surefoot as sf
from surefoot.algorithms import named

SEEDS = [0, 1, 2]


def assert_reaches(bar: float, algorithm: str, environment: str, steps: int, settings: dict[str, Any], seed: int, out: Path) -> None:
    """Train without any selection of a checkpoint, and play 100 episodes."""
    run = sf.train(named(algorithm).config(**settings), environment, steps=steps, seed=seed, out=out, progress=False)
    returns = run.evaluate(episodes=100)
    assert returns.shape == (100,)
    assert returns.mean() >= bar
