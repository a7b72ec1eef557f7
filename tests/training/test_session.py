"""What a run directory can be found in, and what becomes of it: used where it is sound, else refused with what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import BATCH, SMALL, bits, metrics, steps_saved

import surefoot as sf
from surefoot.training import session
from surefoot.training.checkpoint import CheckpointError, RunLocked, lock, newest, save
from surefoot.training.control import read_record
from surefoot.training.presets import with_settings
from surefoot.training.session import create_directory, whole_number

STEPS = 3 * BATCH


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    return sf.train(
        SMALL, "CartPole-v1", steps=STEPS, out=tmp_path_factory.mktemp("whole"), progress=False, preset=False, checkpoint_seconds=0
    ).path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(run: Path, **changes: Any) -> None:
    """Change values in run.json; `None` removes one."""
    record = json.loads((run / "run.json").read_text())
    for name, value in changes.items():
        holder = record if name in record else record["config"]
        if value is None:
            del holder[name]
        else:
            holder[name] = value
    (run / "run.json").write_text(json.dumps(record))


def test_a_run_directory_holds_what_the_documents_say(whole: Path) -> None:
    assert {path.name.split(".")[0] for path in whole.iterdir()} == {
        "run", "metrics", "events", "checkpoints", "policy", "curve", "lock"
    }  # fmt: skip
    record = json.loads((whole / "run.json").read_text())
    assert (record["algorithm"], record["environment"], record["steps"], record["seed"]) == ("ppo", "CartPole-v1", STEPS, 0)
    assert record["versions"].keys() >= {"surefoot", "python", "jax", "numpy", "gymnasium", "mujoco"}
    assert record["command"] == sys.argv
    assert [row["step"] for row in metrics(whole)] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert steps_saved(whole) == [2 * BATCH, 3 * BATCH]


def test_a_complete_run_is_left_as_it_is(whole: Path, run: Path) -> None:
    sf.resume(run, progress=False)
    assert bits(run) == bits(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("learner.safetensors", flip_a_bit),
        ("environment.safetensors", lambda path: os.truncate(path, 100)),
        ("info.json", Path.unlink),
        ("manifest.json", lambda path: os.truncate(path, 0)),
    ],
)
def test_a_damaged_file_costs_one_checkpoint_and_no_more(name: str, damage: Any, whole: Path, run: Path) -> None:
    damage(run / "checkpoints" / f"step-{3 * BATCH:012d}" / name)
    with pytest.warns(UserWarning, match=rf"{name}.*; the checkpoint of step {2 * BATCH} is used instead"):
        sf.resume(run, progress=False)
    assert bits(run) == bits(whole)


def test_a_run_without_a_valid_checkpoint_does_not_silently_start_anew(run: Path) -> None:
    for file in run.glob("checkpoints/*/learner.safetensors"):
        flip_a_bit(file)
    with pytest.raises(CheckpointError, match=r"has no valid checkpoint: .*is corrupt"):
        sf.resume(run, progress=False)
    with lock(run):  # and it is free again
        pass


def test_a_run_killed_before_its_first_checkpoint_starts_anew(whole: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "policy.safetensors").unlink()
    sf.resume(run, progress=False)
    assert bits(run) == bits(whole)


def test_a_kill_right_after_the_last_checkpoint_finds_the_policy_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is complete is not taken up again, so that what is not there by then never will be."""

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        sf.train(SMALL, "CartPole-v1", steps=STEPS, out=tmp_path, progress=False, preset=False, checkpoint_seconds=1e9)
    assert bits(tmp_path) == bits(whole)


@pytest.mark.parametrize(("kept", "steps"), [(0, [3]), (0.4, [1, 3])], ids=["removed", "cut"])
def test_metrics_that_somebody_has_cut_are_not_made_up(kept: float, steps: list[int], run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{3 * BATCH:012d}")
    text = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(text[: int(kept * len(text))])
    sf.resume(run, progress=False)
    assert [row["step"] // BATCH for row in metrics(run)] == steps


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", r"Expecting value"),
        ("\xff garbage", r"codec can't decode|Expecting value"),
        ("[1, 2]", "it is not the record of a run"),
        ("{}", "it is not the record of a run"),
        ('{"format": 7}', "it has format 7, and this version of surefoot reads format 1"),
        ('{"format": 1}', "it lacks num_envs, preset, resume, seed, steps, versions"),
        ("[" * 100_000, ""),
    ],
)
def test_a_record_that_is_none_is_refused(text: str, what: str, run: Path) -> None:
    (run / "run.json").write_bytes(text.encode("latin-1"))
    for use in (lambda: sf.resume(run), lambda: sf.Run(run).evaluate(1)):
        with pytest.raises(CheckpointError, match=f"run.json cannot be used: .*{what}"):
            use()


def test_a_directory_without_a_record_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"is not a run directory: it holds no run\.json"):
            sf.resume(path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"environment": "Acrobot-v1"}, r"observation_space was Box\(.* \(4,\), float32\) and is now Box\(.* \(6,\), float32\)"),
        ({"environment": "gymnasium:CartPole-v1"}, "environment was 'CartPole-v1' and is now 'gymnasium:CartPole-v1'"),
        ({"environment": "NoSuch-v0"}, "There is no environment 'NoSuch-v0'"),
        ({"algorithm": "muzero"}, "There is no algorithm 'muzero'"),
        ({"algorithm": None}, "'algorithm'"),
        ({"gamma": 0.5}, "gamma was 0.99 and is now 0.5"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"hidden": [16]}, r"hidden was \[8\] and is now \[16\]"),
        ({"network": "os:path"}, "The network 'os:path' is not an equinox.Module class"),
        ({"network": "no_such_module:Net"}, "no_such_module"),
        ({"num_envs": 4, "minibatch_size": 64}, "num_envs was 8 and is now 4"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"steps": "many"}, "steps must be a whole number of at least 1, got 'many'"),
        ({"steps": None}, "it lacks steps"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(changes: dict[str, Any], what: str, run: Path) -> None:
    edit(run, **changes)
    before = bits(run)
    with pytest.raises(ValueError, match=what):
        sf.resume(run, progress=False)
    assert bits(run) == before
    with lock(run):
        pass


def test_a_checkpoint_with_sound_hashes_and_senseless_contents_is_refused(run: Path) -> None:
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    trees = {name: checkpoint.arrays(name) for name in checkpoint.trees}
    for info in ({}, {"run": {}}, checkpoint.info | {"iteration": None, "episodes": 3}):
        save(run / "checkpoints", 3 * BATCH, trees, info)
        with pytest.raises(CheckpointError, match="is not a checkpoint of this run"):
            sf.resume(run, progress=False)


def test_more_steps_can_be_asked_for_afterwards(run: Path) -> None:
    edit(run, steps=5 * BATCH)
    sf.resume(run, progress=False)
    assert [row["step"] // BATCH for row in metrics(run)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("env", ["CartPole-v1", "gymnasium:CartPole-v1"])
@pytest.mark.parametrize("config", [sf.PPO(num_steps=16, minibatch_size=64, sequence_length=8, epochs=2), sf.A2C(), sf.TRPO(num_steps=16)])
def test_a_memory_goes_on_where_it_was(config: Any, env: str, tmp_path: Path) -> None:
    config = with_settings(config, {"memory": "gru", "memory_size": 8, "hidden": (8,)})
    steps, where = 6 * 8 * config.num_steps, {name: tmp_path / name for name in ("whole", "halves")}
    for _ in sf.iterate(config, env, steps=steps, seed=3, preset=False, out=where["whole"]):
        pass
    for report in sf.iterate(config, env, steps=steps, seed=3, preset=False, out=where["halves"]):
        if report.step >= steps // 2:
            break
    sf.resume(where["halves"], progress=False)
    assert bits(where["halves"]) == bits(where["whole"])


def test_other_versions_are_announced(run: Path) -> None:
    record = read_record(run)
    edit(run, versions=record["versions"] | {"jax": "0.1.2", "mujoco": "2.0.0", "surefoot": "0.0.0"})
    with pytest.warns(UserWarning, match=r"other versions .* the bits may differ: surefoot 0.0.0 -> .*, jax 0.1.2 -> .*, mujoco 2.0.0 -> "):
        sf.resume(run, progress=False)


def test_a_changed_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import support

    sf.train(SMALL, "support:Walk", steps=BATCH, out=tmp_path, progress=False)
    monkeypatch.setattr(support, "Walk", support.WideWalk)
    with pytest.raises(CheckpointError, match=r"observation_space was Box\(-1.0, 1.0, \(3,\), float32\) and is now Box\(-2.0, 2.0, "):
        sf.resume(tmp_path, progress=False)


def test_a_second_process_is_refused_and_told_who_has_the_run(run: Path) -> None:
    with lock(run), pytest.raises(RunLocked, match=rf"is in use by pid {os.getpid()} on .*; wait for it or stop it"):
        sf.resume(run)
    sf.resume(run, progress=False)  # a lock file that nobody holds is no lock


def test_a_start_that_comes_second_leaves_the_first_ones_lock(tmp_path: Path) -> None:
    with lock(tmp_path):
        for _ in range(2):
            with pytest.raises(RunLocked):
                sf.train(SMALL, "CartPole-v1", out=tmp_path)
        assert (tmp_path / "lock").exists()


def test_iterating_holds_the_lock_and_leaving_gives_it_back(tmp_path: Path) -> None:
    reports = sf.iterate(SMALL, "CartPole-v1", steps=STEPS, out=tmp_path, preset=False)
    next(reports)
    with pytest.raises(RunLocked):
        sf.resume(tmp_path)
    reports.close()
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("wrong", [{"num_envs": 0}, {"env": "NoSuch-v0"}, {"num_envs": 7}, {"steps": 0.5}, {"seed": -1}])
def test_a_run_that_cannot_start_leaves_nothing_behind(wrong: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"env": "CartPole-v1", "out": tmp_path / "run"} | wrong
    with pytest.raises(ValueError, match=r"whole number|at least 1|does not divide|no environment"):
        sf.train(SMALL, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_resumed_lets_go_of_it(run: Path) -> None:
    edit(run, environment="NoSuch-v0")
    with pytest.raises(ValueError, match="There is no environment") as held:  # the traceback lives on, as in an interactive session
        sf.resume(run)
    with lock(run):
        assert held


def test_where_a_run_may_go(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert create_directory(tmp_path / "a" / "b", "name").is_dir()
    assert create_directory(tmp_path / "a" / "b", "name").is_dir(), "an empty directory will do"
    with pytest.raises(ValueError, match="holds a run already; continue it with `surefoot train --resume "):
        create_directory(whole, "name")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; choose a directory"):
        create_directory(tmp_path / "file", "name")
    with pytest.raises(ValueError, match=r"below cannot be made: .*Choose another with out \(--out\)"):
        create_directory(tmp_path / "file" / "below", "name")
    monkeypatch.chdir(tmp_path)
    paths = [create_directory(None, "ppo-module:factory/../x") for _ in range(3)]
    assert len(set(paths)) == 3
    assert {path.parent for path in paths} == {Path("runs")}


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A directory that this process may not write to; root first becomes somebody who is not."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o555)
        is_root = os.getuid() == 0
        if is_root:
            os.setresuid(65534, 65534, 0)
        try:
            yield Path(path)
        finally:
            if is_root:
                os.setresuid(0, 0, 0)
            os.chmod(path, 0o755)


def test_a_read_only_directory_is_refused_at_the_start(read_only: Path) -> None:
    with pytest.raises(ValueError, match=r"is read-only; choose another with out \(--out\)"):
        sf.train(SMALL, "CartPole-v1", out=read_only)
    with pytest.raises(ValueError, match=r"cannot be made: .*Permission denied"):
        sf.train(SMALL, "CartPole-v1", out=read_only / "run")


@pytest.mark.parametrize(("value", "number"), [(1, 1), (1e6, 1_000_000), (2.0, 2), (10**12, 10**12)])
def test_whole_numbers_may_be_written_as_floats(value: float, number: int) -> None:
    assert whole_number("steps", value, minimum=1) == number
    assert isinstance(whole_number("steps", value, minimum=1), int)


@pytest.mark.parametrize("value", [0, -3, 1.5, float("nan"), float("inf"), "abc", None, True])
def test_other_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got "):
        whole_number("steps", value, minimum=1)


HELD = """
import surefoot as sf
from support import BATCH, SMALL
reports = sf.iterate(SMALL, "gymnasium:CartPole-v1", steps=9 * BATCH, out="run", preset=False)
for report in reports:
    if report.step == 2 * BATCH:
        raise RuntimeError("of the caller")
"""


def test_a_program_that_ends_while_it_holds_its_reports_still_saves(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", HELD], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "RuntimeError: of the caller"
    assert steps_saved(tmp_path / "run") == [2 * BATCH]


def test_nothing_is_warned_of_where_nothing_is_wrong(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = sf.train(SMALL, "gymnasium:CartPole-v1", steps=BATCH, out=tmp_path, progress=False, preset=False)
        run.evaluate(2)
        sf.resume(run.path, progress=False)
