"""Speeds are rightly timed, and their table is computed rightly from the record."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from surefoot.algorithms import named

ROOT = Path(__file__).parents[2]


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speed")


def row(library, speeds, *, algorithm="ppo", variant=None, environment="Task-v0"):
    return {
        "environment": environment,
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


def test_updates_and_the_ratio_of_each_backend(speed):
    rows = [
        row("environment alone", [10_000.0], algorithm=""),
        row("surefoot", [4_000.0], algorithm="dqn"),
        row("environment alone", [5_000.0], algorithm="", environment="gymnasium:Task-v0"),
        row("surefoot", [1_000.0], algorithm="dqn", environment="gymnasium:Task-v0"),
        row("tianshou", [500.0], algorithm="dqn", variant={"vec_env": "DummyVecEnv", "threads": 1}),
    ]
    for each in (rows[1], rows[3], rows[4]):
        each["repetitions"][0]["updates_per_second"] = each["repetitions"][0]["steps_per_second"] / 4
    lines = speed.table({"rows": rows, "machine": {"processor": "Abacus", "cores": 2}, "date": "2026-01-31"}).splitlines()
    assert lines[:7] == [
        "| | steps/s: median (range) | updates/s | Surefoot is faster by | of the environment's speed | start-up |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| Task-v0, environment alone | 10,000 (10,000-10,000) |  |  |  |  |",
        "| Task-v0, dqn, surefoot 1.2 | 4,000 (4,000-4,000) | 1,000 |  | 40.0% | 5.0 s |",
        "| gymnasium:Task-v0, environment alone | 5,000 (5,000-5,000) |  |  |  |  |",
        "| gymnasium:Task-v0, dqn, surefoot 1.2 | 1,000 (1,000-1,000) | 250 |  | 20.0% | 5.0 s |",
        "| Task-v0, dqn, tianshou 1.2 (DummyVecEnv, threads: 1) | 500 (500-500) | 125 | 8.0x, gymnasium 2.0x | 5.0% | 5.0 s |",
    ]


@pytest.mark.parametrize("group", ["on-policy", "replay"])
def test_an_environment_is_measured_once_and_every_task_has_its_rows(group, speed):
    tasks = speed.TASKS[group]
    rows = [(row["environment"], row["algorithm"], row["library"]) for row in speed.rows_of(tasks)]
    assert len(rows) == len(set(rows))
    alone = [environment for environment, _, library in rows if library == speed.ALONE]
    assert sorted(alone) == sorted({prefix + task.environment for task in tasks for prefix in task.prefixes})
    for task in tasks:
        found = [library for environment, algorithm, library in rows if (environment, algorithm) == task[1::-1]]
        assert found == ["surefoot", *task.peers]


def test_what_the_settings_leave_out_has_no_part_in_the_comparison(speed):
    in_each = {"network"}
    of_policies = in_each | {"shared_trunk", "memory", "memory_size", "state_discount"}
    of_options = {"learning_rate_schedule", "n_step", "num_atoms", "value_range", "priority_exponent", "importance_exponent"}
    unlike_peers = {"exploration", "double", "dueling", "distribution", "prioritised"}  # by default as they are
    untouched = {
        "ppo": of_policies | {"sequence_length", "clip_schedule", "learning_rate_schedule", "clip_value", "dual_clip", "target_kl"},
        "a2c": of_policies,
        "trpo": of_policies | {"kl_direction"},
        "sac": in_each | {"collect_beside_learning", "max_grad_norm", "temperature", "target_entropy"},
        "td3": in_each | {"collect_beside_learning", "max_grad_norm"},
        "dqn": in_each | {"collect_beside_learning"} | of_options | unlike_peers,
    }
    for algorithm, settings in speed.SETTINGS.items():
        config = named(algorithm).config(**settings)
        assert {field.name for field in dataclasses.fields(config)} - settings.keys() == untouched[algorithm]


CLOCKS = {
    # settings, seconds to measure; reports of (iterations, seconds) until that is enough; what is printed
    "on policy": ({"num_steps": 5}, 1.5, [(1, 3.0), (1, 1.0), (1, 1.0), (1, 1.0)], (10.0, 2, 2.0)),
    "several iterations to a report": ({"num_steps": 5}, 1.5, [(4, 9.0), (4, 5.0), (4, 4.0)], (10.0, 4, 5.0)),
    "quick": ({"num_steps": 5}, 0.0, [(1, 3.0), (1, 1.0), (1, 1.0)], (10.0, 1, 2.0)),
    # 25 steps are two iterations that only fill the replay; the third compiles the update.
    "a replay": (
        {"num_steps": 5, "learning_starts": 25, "update_to_data": 0.5},
        *(2.5, [(1, 0.1), (1, 0.1), (1, 7.8), (1, 2.0), (1, 2.0), (1, 2.0)], (5.0, 2, 6.0)),
    ),
    "a replay, several iterations to a report": (
        {"num_steps": 5, "learning_starts": 25, "update_to_data": 0.5},
        *(1.5, [(4, 9.0), (4, 8.0), (4, 8.0)], (5.0, 4, 5.0)),
    ),
}


@pytest.mark.parametrize(("settings", "seconds", "reports", "expected"), CLOCKS.values(), ids=CLOCKS)
def test_what_is_timed_is_steady_learning(settings, seconds, reports, expected, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "runners")
    clock_module = importlib.import_module("clock")
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    clock = clock_module.Clock({"settings": settings, "num_envs": 2, "warm_up": 2, "seconds": seconds})
    was_enough = []
    for iterations, duration in reports:
        now[0] += duration
        clock.tick(iterations)
        was_enough.append(clock.enough)
    assert was_enough == [False] * (len(reports) - 1) + [True]
    clock.print_result()
    result = json.loads(capsys.readouterr().out)["result"]
    steps_per_second, iterations, startup = expected
    assert (result["steps_per_second"], result["iterations"], result["startup_seconds"]) == (steps_per_second, iterations, startup)
    assert result.get("updates_per_second") == (steps_per_second * 0.5 if "update_to_data" in settings else None)
