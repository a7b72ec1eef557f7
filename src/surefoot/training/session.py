"""A run from its first step to its last: the run directory, its checkpoints, and the loop that yields reports."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from ..spaces import from_json
from ..types import PyTree
from .checkpoint import Checkpoint, CheckpointError, RunLocked, SaveError, lock, newest, save
from .logs import Logs
from .signals import StopRequest, catch_signals

RUN_FORMAT = 1


class Report(NamedTuple):
    """Where a run stands after an iteration."""

    step: int  # environment steps so far; of a language model, sequences
    metrics: dict[str, Any]  # numbers; None where there is nothing to report
    policy: Any


class Trainer(Protocol):
    """The moving parts of a run, one iteration at a time; `advance` gives its metrics, the rest says where it stands."""

    iteration: int
    steps_advanced: int  # of the last call
    seconds: dict[str, float]  # of the last call, by part, and in "total"

    @property
    def step(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    @property
    def finished(self) -> bool: ...

    def advance(self) -> dict[str, Any]: ...

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]: ...

    def restore(self, checkpoint: Checkpoint) -> None: ...


class Session:
    """One run in one process, holding the lock of its directory. What it trains is a subclass's: see `prepare` and below."""

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path, self.record = path, record
        with ExitStack() as opened:
            opened.enter_context(lock(path))
            self.engine: Trainer = self.prepare(opened)
            self._open = opened.pop_all()  # all is well: it stays open until `close`
        self.seconds = 0.0  # of training, in all the processes of this run
        self.metrics_size = 0

    def prepare(self, opened: ExitStack) -> Trainer:
        """What `record` describes, ready to run; `opened` closes what must be."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with a run, as JSON."""
        raise NotImplementedError

    @property
    def policy(self) -> Any:
        """The policy as it stands."""
        raise NotImplementedError

    def save_policy(self) -> None:
        """Write it where users look for it."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Write the record of a new run."""
        try:
            self.record |= self.identity
            write_json(self.path / "run.json", self.record)
        except BaseException:
            self.close()
            raise

    def _continue(self) -> None:
        """Go on from the newest valid checkpoint, or from the start where there is none yet."""
        try:
            refuse_differences(self.path / "run.json", self.record, self.identity)
            checkpoint = newest(self.path / "checkpoints")
            if checkpoint is not None:
                self._restore(checkpoint)
        except BaseException:
            self.close()
            raise
        installed, before = versions(), self.record["versions"]
        if changed := [f"{name} {was} -> {installed.get(name)}" for name, was in before.items() if installed.get(name) != was]:
            warnings.warn(f"other versions than at the start, so the bits may differ: {', '.join(changed)}", stacklevel=3)

    def reports(self, *, checkpoint_seconds: float, stop: StopRequest | None = None) -> Generator[Report, None, None]:
        """Run to the end, a report for each iteration. Stopping early, by a signal or by the caller, saves a checkpoint first."""
        engine = self.engine
        with self._open, closing(Logs(self.path, step=engine.step, size=self.metrics_size)) as logs:
            saved_step = engine.step
            saved_at = mark = time.monotonic()
            try:
                while not engine.finished:
                    with ExitStack() as scope:
                        request = stop or scope.enter_context(catch_signals())
                        metrics = engine.advance()
                        now = time.monotonic()
                        self.seconds, mark = self.seconds + now - mark, now
                        metrics = {"step": engine.step, "iteration": engine.iteration} | metrics | self._times()
                        logs.write(metrics, engine.step)
                        if engine.finished or request.signal_number is not None or now - saved_at >= checkpoint_seconds:
                            saved_step = engine.step if self._save(logs) else saved_step
                            saved_at = time.monotonic()
                        request.poll(self.path)
                    yield Report(engine.step, metrics, self.policy)
                    mark = time.monotonic()  # what the caller did meanwhile is not training
            except GeneratorExit:
                if saved_step < engine.step:
                    self._save(logs)
                raise
            if saved_step < engine.step:
                remedy = f"make room, and `surefoot train --resume {self.path}` repeats what came after step {saved_step}"
                raise SaveError(f"The end of the run could not be saved; {remedy}.")

    def close(self) -> None:
        """Release the environments and the lock."""
        self._open.close()

    def _times(self) -> dict[str, float]:
        """Where the time went: steps per second, seconds of training so far, and the share of each part of this iteration."""
        parts = dict(self.engine.seconds)
        total = parts.pop("total")
        shares = {f"time/{name}": round(seconds / total, 4) for name, seconds in parts.items()}
        return {"time/steps_per_second": round(self.engine.steps_advanced / total, 1), "time/seconds": round(self.seconds, 3), **shares}

    def _save(self, logs: Logs) -> bool:
        """Write the policy and a checkpoint; a full disk is a warning, since the run and its last checkpoint are intact."""
        trees, info = self.engine.snapshot()
        try:
            info |= {"seconds": self.seconds, "metrics_size": logs.sync(), "run": self.identity}
            self.save_policy()  # first, so that a checkpoint's policy is never missing
            save(self.path / "checkpoints", self.engine.step, trees, info)
        except (SaveError, OSError) as error:
            warnings.warn(f"{error}; what was saved before is intact", stacklevel=2)
            return False
        return True

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; CheckpointError where it is another run's."""
        try:
            refuse_differences(checkpoint.path, checkpoint.info["run"], self.identity)
            self.engine.restore(checkpoint)
            self.seconds, self.metrics_size = checkpoint.info["seconds"], checkpoint.info["metrics_size"]
        except CheckpointError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path} is not a checkpoint of this run: {error!r}.") from error


def whole_number(name: str, value: float, *, minimum: int) -> int:
    """`value` as an int: 1e6 is one, 1.5 is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer() or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")
    return int(value)


def create_directory(out: str | Path | None, name: str) -> Path:
    """A fresh directory: `out`, or one under `runs/` that nobody has yet. ValueError where it cannot be had."""
    plain_name = re.sub(r"[^\w.-]+", "-", name)
    path = Path(out) if out is not None else Path("runs") / f"{plain_name}-{datetime.now():%Y%m%d-%H%M%S}"
    attempt = 0
    while True:
        candidate = path if not attempt else path.with_name(f"{path.name}-{attempt}")
        try:
            candidate.mkdir(parents=True, exist_ok=out is not None)
        except FileExistsError:
            if out is not None:
                raise ValueError(f"{candidate} is a file; choose a directory for out.") from None
            attempt += 1
            continue
        except OSError as error:
            raise ValueError(f"The run directory {candidate} cannot be made: {error}. Choose another with out (--out).") from error
        break
    if (candidate / "run.json").exists():
        raise ValueError(f"{candidate} holds a run already; continue it with `surefoot train --resume {candidate}`, or choose another out.")
    if not os.access(candidate, os.W_OK):
        raise ValueError(f"The run directory {candidate} is read-only; choose another with out (--out).")
    return candidate


@contextmanager
def fresh_directory(out: str | Path | None, name: str) -> Iterator[Path]:
    """`create_directory`; gone again where no run could be started in it."""
    path = create_directory(out, name)
    try:
        yield path
    except RunLocked:
        raise  # another process has begun in this directory just now
    except BaseException:
        remove_empty(path)
        raise


def remove_empty(path: Path) -> None:
    """Remove a directory that a run could not be started in, unless something else is in it."""
    (path / "lock").unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(temporary, path)


def new_record(steps: int, seed: int) -> dict[str, Any]:
    """What every run records of its beginning, as JSON."""
    return {
        "format": RUN_FORMAT,
        "steps": steps,
        "seed": seed,
        "command": sys.argv,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": jax.devices()[0].device_kind},
    }


def read_record(path: Path, check: Callable[[dict[str, Any]], object], *fields: str) -> dict[str, Any]:
    """The run.json of a run directory; CheckpointError where there is none that can be used.

    `fields` must be there besides what every run records; `check` raises ValueError for what it does not like.
    """
    try:
        record = json.loads((path / "run.json").read_text())
        if not isinstance(record, dict) or "format" not in record:
            raise ValueError("it is not the record of a run.")
        if record["format"] != RUN_FORMAT:
            raise ValueError(f"it has format {record['format']}, and this version of surefoot reads format {RUN_FORMAT}.")
        if lacking := {"seed", "steps", "versions", *fields} - record.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}.")
        for name, minimum in {"steps": 1, "seed": 0}.items():
            whole_number(name, record[name], minimum=minimum)
        check(record)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a run directory: it holds no run.json.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / 'run.json'} cannot be used: {error}") from error
    return record


def kind_of(path: Path) -> str:
    """What a run directory is of: "control", or "text"; "control" also where there is no record to say it."""
    try:
        record = json.loads((path / "run.json").read_text())
        return str(record.get("kind", "control"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return "control"


def refuse_differences(source: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError, naming what differs, unless two `Session.identity` are the same."""

    def readable(value: Any) -> Any:
        return " ".join(str(from_json(value)).split()) if isinstance(value, dict) else repr(value)

    groups: dict[str, Any] = {"environment_settings": {}, "sources": {}, "hashes": {}}

    def flat(identity: dict[str, Any]) -> dict[str, Any]:
        parts = [identity["config"], *(identity.get(group, {}) for group in groups)]
        return identity | {name: value for part in parts for name, value in part.items()} | groups | {"config": {}}

    before, now = flat(before), flat(now)
    if differing := [name for name in now if before.get(name) != now[name]]:
        listed = "; ".join(f"{name} was {readable(before.get(name))} and is now {readable(now[name])}" for name in differing)
        raise CheckpointError(f"{source} does not belong to this run: {listed}.")


def versions() -> dict[str, str]:
    """Versions of what the bits depend on."""
    installed = {"python": platform.python_version()}
    for name in ("surefoot", "jax", "jaxlib", "numpy", "equinox", "optax", "gymnasium", "mujoco", "ale-py"):
        with suppress(metadata.PackageNotFoundError):  # some are extras
            installed[name] = metadata.version(name)
    return installed
