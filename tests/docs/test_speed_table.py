"""The speeds that the READMEs show are those that were recorded, and the table is computed rightly from the record."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from surefoot.algorithms import named

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "speed.json"
BEGIN, END = "<!-- speed:begin -->\n", "<!-- speed:end -->"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speed")


@pytest.mark.skipif(not RECORD.exists(), reason="no speeds are recorded")
@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_holds_the_recorded_speeds(page, speed):
    shown = (ROOT / page).read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == speed.table(json.loads(RECORD.read_text())).strip()


def row(library, speeds, *, algorithm="ppo", variant=None):
    return {
        "environment": "Task-v0",
        "algorithm": algorithm,
        "library": library,
        "variant": variant or {},
        "repetitions": [{"steps_per_second": s, "startup_seconds": 5.0 - i} for i, s in enumerate(speeds)],
        "versions": {library: "1.2", "jax": "3.4"},
    }


def test_medians_ratios_and_shares(speed):
    rows = [
        row("environment alone", [9_000.0, 20_000.0, 10_000.0], algorithm=""),
        row("surefoot", [4_000.0, 3_000.0, 2_000.0]),
        row("sbx-rl", [200.0, 100.0, 900.0], variant={"vec_env": "DummyVecEnv", "threads": 2}),
    ]
    record = {"rows": rows, "machine": {"processor": "Abacus", "cores": 2}, "date": "2026-01-31"}
    lines = speed.table(record).splitlines()
    assert lines[2:] == [
        "| Task-v0, environment alone | 10,000 (9,000-20,000) |  |  |  |",
        "| Task-v0, ppo, surefoot 1.2 | 3,000 (2,000-4,000) |  | 30.0% | 5.0 s |",
        "| Task-v0, ppo, sbx-rl 1.2 (DummyVecEnv, threads: 2) | 200 (100-900) | 15.0x | 2.0% | 5.0 s |",
        "",
        "`Abacus, 2 cores; 2026-01-31; jax 3.4`",
    ]


def test_an_environment_is_measured_once_and_every_task_has_its_rows(speed):
    rows = [(row["environment"], row["algorithm"], row["library"]) for row in speed.rows_of(speed.TASKS)]
    assert len(rows) == len(set(rows))
    assert [environment for environment, _, library in rows if library == speed.ALONE] == ["CartPole-v1", "HalfCheetah-v5"]
    for task in speed.TASKS:
        assert {library for environment, algorithm, library in rows if (environment, algorithm) == task[1::-1]} == {"surefoot", *task.peers}


def test_what_the_settings_leave_out_has_no_part_in_the_comparison(speed):
    untouched = {
        "ppo": {"sequence_length", "clip_schedule", "learning_rate_schedule", "clip_value", "dual_clip", "target_kl"},
        "a2c": set(),
        "trpo": {"kl_direction"},
    }
    of_all = {"network", "shared_trunk", "memory", "memory_size", "state_discount"}
    for algorithm, settings in speed.SETTINGS.items():
        config = named(algorithm).config(**settings)
        assert {field.name for field in dataclasses.fields(config)} - settings.keys() == untouched[algorithm] | of_all
