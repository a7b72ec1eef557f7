"""The ablation of Rainbow trains what it says, and its table follows from its seeds."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from surefoot.algorithms.dqn import DQN, Rainbow
from surefoot.cli import main

TAKEN_AWAY = {
    "double": {"double": False},
    "dueling": {"dueling": False},
    "n-step": {"n_step": 1},
    "noisy": {"exploration": "epsilon"},
    "categorical": {"distribution": "none"},
    "prioritised": {"prioritised": False},
}


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("ablation")


def test_each_ingredient_is_taken_away_once_and_none_is_left_out(ablation, monkeypatch):
    trained = {}

    def keep(config, env, **options):
        trained[str(options["out"])] = (config, env, options["seed"], options["steps"])
        raise SystemExit

    monkeypatch.setattr("surefoot.api.train", keep)
    for place, command in ablation.commands(1_000, 3).items():
        with pytest.raises(SystemExit):
            main(["train", *command, "--out", place])
    assert len(trained) == len(ablation.commands(1_000, 3)) == 3 * (8 + 2)

    def differing(config):
        ours, whole = dataclasses.asdict(config), dataclasses.asdict(Rainbow())
        return {
            name: ours[name]
            for name in ("double", "dueling", "n_step", "exploration", "distribution", "prioritised")
            if ours[name] != whole[name]
        }

    for seed in range(3):
        for name, settings in TAKEN_AWAY.items():
            config, env, own_seed, steps = trained[f"Breakout/without-{name}/seed-{seed}"]
            assert (differing(config), env, own_seed, steps) == (settings, "MinAtar/Breakout-v1", seed, 1_000)
        for game in ("Breakout", "SpaceInvaders"):
            assert differing(trained[f"{game}/rainbow/seed-{seed}"][0]) == {}
            assert type(trained[f"{game}/dqn/seed-{seed}"][0]) is DQN


def test_what_the_variants_came_to(ablation):
    row = {"game": "Breakout", "variant": "rainbow", "mean": 2.0, "interval": [1.0, 3.0], "versions": {"jax": "3.4"}}
    record = {
        "rows": [row | {"seeds": [{"mean": 1.0, "steps": 1_000}, {"mean": 3.0, "steps": 1_000}]}],
        "machine": {"processor": "Abacus", "cores": 2},
        "date": "2026-01-31",
    }
    lines = ablation.table(record).splitlines()
    assert lines[2:] == [
        "| Breakout, rainbow | 2.0 (1.0-3.0) | 1.0, 3.0 |",
        "",
        "`1,000 frames, 2 seeds, 100 episodes each; Abacus, 2 cores; 2026-01-31; jax 3.4`",
    ]
