"""What every test shares: one compilation cache for all processes, and the command line as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from surefoot.training import engine

os.environ.setdefault("SUREFOOT_TESTS_BEGAN", str(time.time()))  # workers inherit it
# Most tests run a program once or twice: compiling it takes a quarter of the time this way, and running it four times as long. Those
# whose subject are the bits of the programs that users run ask for `optimised` ones; learning runs are a process without these flags.
GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "")
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if QUICK not in GIVEN_FLAGS and "SUREFOOT_TESTS_RUN_LONG" not in os.environ:  # a worker inherits them
    os.environ["XLA_FLAGS"] = f"{QUICK} {GIVEN_FLAGS}".strip()
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
# Programs are compiled once for the whole suite, in this process and in those it starts.
CACHE = Path(os.environ.setdefault("XDG_CACHE_HOME", str(Path(__file__).parent.parent / ".pytest_cache" / "home")))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_let_go() -> Iterator[None]:
    """Every compiled program maps memory. A process may hold 65,530 maps on Linux, and XLA ends it by a segmentation fault beyond that."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The programs of iterations as users run them, here and in the processes that a test starts; what compiles others so."""
    usual = engine.compiler_options
    monkeypatch.setattr(engine, "compiler_options", lambda config=None: usual(config) | OPTIMISED)
    monkeypatch.setenv("XLA_FLAGS", GIVEN_FLAGS.replace(QUICK, ""))
    return OPTIMISED


@pytest.fixture
def surefoot(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `surefoot ARGUMENTS` in a process of its own, in an empty directory; the exit code must be as given."""

    def run(*arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "surefoot", *map(str, arguments)]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300, "check": False} | options
        done = subprocess.run(command, **options)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
