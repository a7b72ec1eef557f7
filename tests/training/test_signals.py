"""SIGINT and SIGTERM at any moment: a checkpoint, the right exit code, and a run that goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import BATCH, SMALL, SMALL_OPTIONS, bits, steps_saved

import surefoot as sf
from surefoot.cli import main
from surefoot.collect import HostCollector
from surefoot.training import control, engine, session
from surefoot.training.checkpoint import lock

ENV = "gymnasium:CartPole-v1"
STEPS = 4 * BATCH
PHASES = {
    "collecting": (HostCollector, "collect"),
    "updating": (engine.Recent, "take"),  # the update has run, its iteration is not over
    "saving": (session, "save"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody has stopped."""
    return sf.train(SMALL, ENV, steps=STEPS, out=tmp_path_factory.mktemp("whole"), progress=False, preset=False).path


@pytest.fixture(autouse=True)
def _handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])  # which `main` changes, as a process may
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with SIGINT ignored
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, given)
    assert after == before


def strike(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, number: int, call: int = 2) -> None:
    """Send this process a signal when `name` is called for the `call`-th time."""
    original, calls = getattr(holder, name), iter(range(1, 1000))

    def struck(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            signal.raise_signal(number)
        return original(*arguments, **keywords)

    monkeypatch.setattr(holder, name, struck)


def exit_code(command: list[str]) -> Any:
    with pytest.raises(SystemExit) as exited:
        main(command)
    return exited.value.code


@pytest.mark.parametrize(("phase", "number"), [(phase, signal.SIGINT) for phase in PHASES] + [("collecting", signal.SIGTERM)])
def test_a_signal_finishes_the_iteration_saves_and_exits(
    phase: str, number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        strike(patch, *PHASES[phase], number)
        code = exit_code(["train", "ppo", ENV, "--steps", str(STEPS), "--out", str(run), "--checkpoint-seconds", "0", *SMALL_OPTIONS])
    assert code == 128 + number
    err = capfd.readouterr().err
    assert err.endswith(f"surefoot: stopped by {number.name}; {run} can be resumed\n")
    assert f"stopped after {2 * BATCH} steps" in err
    assert steps_saved(run) == [BATCH, 2 * BATCH]
    main(["train", "--resume", str(run)])
    assert bits(run) == bits(whole)


def test_a_signal_while_evaluating_ends_it_and_writes_nothing(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = sorted(whole.rglob("*"))
    strike(monkeypatch, HostCollector, "collect", signal.SIGINT, call=1)
    assert exit_code(["eval", str(whole), "--episodes", "3"]) == 130
    assert capfd.readouterr().err == "surefoot: stopped by SIGINT\n"
    assert sorted(whole.rglob("*")) == files


def test_a_signal_before_the_run_has_begun_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strike(monkeypatch, control, "make", signal.SIGINT, call=1)
    with pytest.raises(KeyboardInterrupt):
        sf.train(SMALL, ENV, steps=STEPS, out=tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_train_and_iterate_raise_stopped_with_the_signal_and_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, begin in {
        "train": lambda path: sf.train(SMALL, ENV, steps=STEPS, out=path, progress=False, preset=False),
        "iterate": lambda path: list(sf.iterate(SMALL, ENV, steps=STEPS, out=path, preset=False)),
    }.items():
        with monkeypatch.context() as patch:
            strike(patch, HostCollector, "collect", signal.SIGTERM)
            with pytest.raises(sf.Stopped) as stopped:
                begin(tmp_path / name)
        assert isinstance(stopped.value, KeyboardInterrupt)
        assert (stopped.value.signal_number, stopped.value.path) == (signal.SIGTERM, tmp_path / name)
        assert steps_saved(tmp_path / name) == [2 * BATCH]


def test_between_two_iterations_ctrl_c_is_the_callers_and_the_run_is_saved(whole: Path, tmp_path: Path) -> None:
    def loop() -> None:
        for report in sf.iterate(SMALL, ENV, steps=STEPS, out=tmp_path, preset=False):
            if report.step == 3 * BATCH:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert steps_saved(tmp_path) == [3 * BATCH]
    sf.resume(tmp_path, progress=False)
    assert bits(tmp_path) == bits(whole)


def test_training_works_in_a_thread_which_can_have_no_handlers(whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: sf.train(SMALL, ENV, steps=STEPS, out=tmp_path, progress=False, preset=False))
    thread.start()
    thread.join()
    assert bits(tmp_path) == bits(whole)


SECOND = """
import os, signal, sys, time
from surefoot.cli import main
fsync = os.fsync
def strike(file):
    if ".step-000000000256.tmp/info.json" in os.readlink(f"/proc/self/fd/{file}"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same request, passed on by a wrapper
        time.sleep(0.6)
        open("lived", "w").close()
        signal.raise_signal(signal.SIGTERM)
        open("lived too long", "w").close()
    fsync(file)
os.fsync = strike
main(sys.argv[1:])
"""


def test_the_second_signal_ends_the_process_at_once_and_the_checkpoint_before_is_intact(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "ppo", ENV, "--steps", str(STEPS), "--out", str(run), "--checkpoint-seconds", "0", *SMALL_OPTIONS]
    done = subprocess.run([sys.executable, "-c", SECOND, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lived", "run"]
    assert steps_saved(run) == [BATCH]
    assert (run / "checkpoints" / ".step-000000000256.tmp" / "info.json").exists()
    with lock(run):
        pass
    sf.resume(run, progress=False)
    assert bits(run) == bits(whole)
    assert list(run.rglob("*.tmp")) == []


def test_seeds_stop_together_and_go_on_together(
    tmp_path: Path, surefoot: Callable[..., Any], wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    """Ctrl-C in the terminal reaches the parent, which tells its children."""
    out = tmp_path / "out"
    command = [
        "train",
        "ppo",
        "CartPole-v1",
        "--seeds",
        "3",
        "--steps",
        "1e9",
        "--checkpoint-seconds",
        "0",
        "--out",
        str(out),
        *SMALL_OPTIONS,
    ]
    parent = subprocess.Popen([sys.executable, "-m", "surefoot", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = min(3, len(os.sched_getaffinity(0)))
    wait_for(lambda: len(list(out.glob("seed-*/checkpoints/step-*"))) >= running)
    parent.send_signal(signal.SIGINT)
    output, errors = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert errors.endswith(f"surefoot: stopped by SIGINT; {out} can be resumed\n")
    assert output.count("surefoot: stopped by SIGTERM") == running
    assert errors.count(" had not begun; start it with `surefoot train ppo CartPole-v1 ") == 3 - running
    assert not alive(out)
    for run in out.glob("seed-*"):
        assert steps_saved(run)
        record = (run / "run.json").read_text()
        steps = (steps_saved(run)[-1] // BATCH + 1) * BATCH
        (run / "run.json").write_text(record.replace('"steps": 1000000000', f'"steps": {steps}'))
    done = surefoot("train", "--resume", out)
    assert done.stdout.endswith(f"runs   {out}\ncurve  {out}/curve.png\n")
    assert done.stderr == ""
    assert (out / "curve.png").exists()
    for run in out.glob("seed-*"):
        assert steps_saved(run)[-1] == json.loads((run / "run.json").read_text())["steps"]


def test_children_do_not_outlive_a_parent_that_is_killed(tmp_path: Path, wait_for: Callable[[Callable[[], bool]], None]) -> None:
    out = tmp_path / "out"
    command = ["train", "ppo", "CartPole-v1", "--seeds", "2", "--steps", "1e9", "--out", str(out), *SMALL_OPTIONS]
    parent = subprocess.Popen([sys.executable, "-m", "surefoot", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(out.glob("seed-*/metrics.jsonl")))
    assert alive(out)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(out))
    assert all(steps_saved(log.parent) for log in out.glob("seed-*/metrics.jsonl"))


def alive(out: Path) -> list[int]:
    """The processes whose command names `out`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (directory / "cmdline").read_text():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(1200):
            if condition():
                return
            threading.Event().wait(0.05)
        pytest.fail("waited in vain")

    return wait
