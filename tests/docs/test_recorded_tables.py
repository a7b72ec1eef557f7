"""What the pages show of recorded figures is what was recorded, and the tables are computed rightly from the records."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name)


PAGES = {
    "speed": "README",
    "learning": "README",
    "speed-replay": "docs/replay",
    "replay": "docs/replay",
    "frames": "docs/replay",
    "rlhf": "docs/rlhf",
    "sampling": "docs/rlhf",
}


@pytest.mark.parametrize("language", ["", ".zh-CN"])
@pytest.mark.parametrize("name", PAGES)
def test_the_page_holds_what_was_recorded(name, language, monkeypatch):
    text = (ROOT / f"{PAGES[name]}{language}.md").read_text()
    shown = text.partition(f"<!-- {name}:begin -->\n")[2].partition(f"<!-- {name}:end -->")[0]
    table = module(name.partition("-")[0], monkeypatch).table
    if name == "learning":
        records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
        expected = table([record for record in records if "learning.py" in record["command"]])
    else:
        record = RESULTS / f"{name}.json"
        expected = table(json.loads(record.read_text())) if record.exists() else ""
    assert shown.strip() == expected.strip()


MACHINE = {"machine": {"processor": "Abacus", "cores": 2}, "date": "2026-01-31"}


def test_medians_ranges_and_ratios_of_draws(monkeypatch):
    replay = module("replay", monkeypatch)
    rows = [
        {
            "draw": "uniform",
            "library": library,
            "batches": batches,
            "size": size,
            "repetitions": [{"microseconds": m * factor} for m in (3.0, 10.0, 5.0)],
            "versions": {library: "1.2", "jax": "3.4", "mujoco": "5"},
        }
        for library, batches, factor in (("surefoot", 8, 10.0), ("surefoot", 1, 30.0), ("tianshou", 1, 20.0))
        for size in (1_000, 2_000)
    ]
    rows[-1]["repetitions"][2]["microseconds"] = 150.0
    assert replay.table({"rows": rows, **MACHINE}).splitlines() == [
        "| microseconds of a minibatch: median (range) | 1,000 rows | 2,000 rows |",
        "| --- | ---: | ---: |",
        "| uniform, surefoot 1.2, 8 in a call | 50 (30-100) | 50 (30-100) |",
        "| uniform, surefoot 1.2, 1 in a call | 150 (90-300) | 150 (90-300) |",
        "| uniform, tianshou 1.2 | 100 (60-200), 2.0x | 150 (60-200), 3.0x |",
        "",
        "`Abacus, 2 cores; 2026-01-31; jax 3.4`",
    ]


def test_every_library_draws_what_it_can(monkeypatch):
    replay = module("replay", monkeypatch)
    rows = [tuple(row.values()) for row in replay.rows_of((1_000, 2_000))]
    assert len(rows) == len(set(rows)) == 2 * (2 + 1 + 1) + 2 * (2 + 1)
    assert {draw for draw, library, *_ in rows if library == "stable-baselines3"} == {"uniform"}


def test_costs_of_frames_by_size(monkeypatch):
    frames = module("frames", monkeypatch)
    names = [name for name in frames.ROWS if name != "bytes"]
    sizes = [{"size": size, "bytes": 7_074 * size} | dict.fromkeys(names, 1.26 * size) for size in (1_000, 2_000)]
    lines = frames.table({"sizes": sizes, "jax": "0.10", **MACHINE}).splitlines()
    assert lines[0] == "| | 1,000 rows | 2,000 rows |"
    assert lines[2:4] == ["| memory | 0.01 GB | 0.01 GB |", "| inserting 4 steps of 8 environments | 1.26 ms | 2.52 ms |"]
    assert lines[5] == "| the first checkpoint | 1260.0 s | 2520.0 s |"
    assert len(lines) == 2 + len(frames.ROWS) + 2
    assert lines[-1] == "`Abacus, 2 cores; 2026-01-31; jax 0.10`"


def test_what_the_demonstration_came_to_by_seed(monkeypatch):
    def end(gold):
        return {"gold": gold, "score": 2 * gold, "reference_kl": 3 * gold}

    seeds = [
        {
            "seed": seed,
            "seconds": {"demo": 200.0 + seed, "study": 300.0 - seed},
            "versions": {"jax": "3.4"},
            "accuracies": {"reward": 0.5 + seed / 10, "reward-weak": 0.5},
            "runs": {name: {"before": end(0.0), "after": end(1.0 + seed)} for name in ("ppo", "ppo-free", "ppo-weak")},
        }
        for seed in (0, 1)
    ]
    lines = module("rlhf", monkeypatch).table({"seeds": seeds, **MACHINE}).splitlines()
    assert lines[2:4] == [
        "| fine-tuned | +0.00 (+0.00 to +0.00) | +0.00 (+0.00 to +0.00) | 0.0 (0.0 to 0.0) |",
        "| PPO | +1.50 (+1.00 to +2.00) | +3.00 (+2.00 to +4.00) | 4.5 (3.0 to 6.0) |",
    ]
    assert lines[-1] == (
        "`reward model 55.0 (50.0 to 60.0) % of held-out comparisons, weak one 50.0 (50.0 to 50.0) %; demo 201 s, "
        "study 300 s more at most; seeds 0, 1; Abacus, 2 cores; 2026-01-31; jax 3.4`"
    )
