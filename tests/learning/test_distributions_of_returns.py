"""Methods that learn distributions of returns: every seed reaches the bar, by final parameters, the preset's settings, 100 episodes.

Collected first, in a file of their own: they take as long as all the others together, beside which they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bars import SEEDS, assert_reaches

C51 = {"distribution": "categorical", "value_range": (0.0, 50.0), "target_rate": 0.01, "num_steps": 32, "learning_rate": 1e-3}
BARS: list[tuple[str, dict[str, Any]]] = [
    ("dqn", C51),
    ("dqn", {"distribution": "quantile", "num_atoms": 21}),
    ("rainbow", {}),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("algorithm", "settings"), BARS)
def test_mean_return_reaches_the_bar(algorithm: str, settings: dict[str, Any], seed: int, tmp_path: Path) -> None:
    assert_reaches(450.0, algorithm, "CartPole-v1", 199_680, settings, seed, tmp_path / "run")
