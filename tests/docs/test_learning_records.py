"""What a recorded learning study says of its seeds follows from its seeds."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORDS = [path for path in sorted(BENCHMARKS.glob("results/*.json")) if "learning.py" in json.loads(path.read_text())["command"]]


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("learning")


def test_the_interval_of_two_seeds_is_from_one_to_the_other(learning):
    # The mean of a resample is the lower with probability 1/4, the higher with 1/4, and between them with 1/2.
    assert learning.confidence_interval([3.0, 1.0]) == [1.0, 3.0]
    assert learning.confidence_interval([2.0]) == [2.0, 2.0]


def test_the_interval_is_the_same_at_every_call(learning):
    means = [1.0, 4.0, 9.0, 16.0, 25.0]
    assert learning.confidence_interval(means) == learning.confidence_interval(means)


def test_the_table_of_studies(learning):
    study = {"algorithm": "ppo", "environment": "Task-v0", "mean": 1234.5, "interval": [1000.2, 1500.0], "seeds": 2 * [{"steps": 4096}]}
    lines = learning.table([study | {"preset": {"clip": 0.1, "epochs": 3}}, study | {"preset": {}}]).splitlines()
    assert lines[2:] == [
        "| ppo, Task-v0 | clip=0.1, epochs=3 | 1,234 (1,000-1,500) | 2 | 4,096 |",
        "| ppo, Task-v0 | defaults | 1,234 (1,000-1,500) | 2 | 4,096 |",
    ]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_summary_of_a_record_is_that_of_its_seeds(path, learning):
    record = json.loads(path.read_text())
    means = [seed["mean"] for seed in record["seeds"]]
    assert record["mean"] == pytest.approx(sum(means) / len(means))
    assert record["interval"] == learning.confidence_interval(means)
    assert len({seed["steps"] for seed in record["seeds"]}) == len({seed["episodes"] for seed in record["seeds"]}) == 1
