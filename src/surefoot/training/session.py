"""A run from its first step to its last: the run directory, its checkpoints, and the loop that yields reports."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..envs import environment_name, is_device, is_vector, make
from ..networks import find_factory
from .checkpoint import CheckpointError, SaveError, lock, newest, save
from .engine import DeviceEngine, Engine, HostEngine
from .logs import Logs
from .policy import Policy, describe, undescribe
from .presets import preset_for, with_settings
from .signals import StopRequest, catch_signals

RUN_FORMAT = 1


class Report(NamedTuple):
    """Where a run stands after an iteration."""

    step: int  # environment steps so far
    metrics: dict[str, Any]  # numbers; None where there is nothing to report
    policy: Policy


class Session:
    """One run in one process, holding the lock of its directory."""

    def __init__(self, path: Path, record: dict[str, Any], config: Any, env: Any):
        self.path, self.record, self.config = path, record, config
        self._open = ExitStack()
        self._open.enter_context(lock(path))
        self.environment, self.spec = make(env, record["num_envs"])
        engine = DeviceEngine if is_device(self.environment) else HostEngine
        self.engine: Engine = engine(config, self.environment, self.spec, seed=record["seed"], total_steps=record["steps"])
        if not is_vector(env):
            self._open.callback(self.engine.close)
        self.seconds = 0.0  # of training, in all the processes of this run
        self.metrics_size = 0

    @classmethod
    def start(cls, config: Any, env: Any, *, steps: float, seed: int, num_envs: int, preset: bool, out: str | Path | None) -> Session:
        """Make a new run directory; ValueError where it exists already or cannot be written."""
        steps = whole_number("steps", steps, minimum=1)
        seed = whole_number("seed", seed, minimum=0)
        name = environment_name(env)
        settings = preset_for(config, name) if preset else {}
        config = with_settings(config, settings)
        path = create_directory(out, f"{describe_name(config)}-{name}")
        record = {
            "format": RUN_FORMAT,
            "steps": steps,
            "seed": seed,
            "num_envs": num_envs,
            "preset": settings,
            "command": sys.argv,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "device": jax.devices()[0].device_kind,
            },
        }
        try:
            session = cls(path, record, config, env)
            session.record |= describe(config, session.spec) | {"resume": session.spec.resume}
            write_json(path / "run.json", session.record)
        except BaseException:
            remove_empty(path)
            raise
        return session

    @classmethod
    def resume(cls, path: Path, env: Any = None) -> Session:
        """Continue the run in `path` from its newest valid checkpoint, or from the start where it has none yet."""
        record = read_record(path)
        _, config, spec = undescribe(record)
        if config.network != "mlp":
            find_factory(config.network, import_module=True)
        session = cls(path, record, config, spec.name if env is None else env)
        now = describe(config, session.spec)
        if differences := [f"{key}: {record[key]} in the run, {now[key]} now" for key in now if record[key] != now[key]]:
            session.close()
            raise CheckpointError(f"{path} is a run on another environment: " + "; ".join(differences))
        installed = versions()
        if changed := [f"{name} {was} -> {installed.get(name)}" for name, was in record["versions"].items() if installed.get(name) != was]:
            warnings.warn(f"other versions than at the start, so the bits may differ: {', '.join(changed)}", stacklevel=2)
        checkpoint = newest(path / "checkpoints")
        if checkpoint is not None:
            try:
                session.engine.restore(checkpoint)
            except BaseException:
                session.close()
                raise
            session.seconds, session.metrics_size = checkpoint.info["seconds"], checkpoint.info["metrics_size"]
        return session

    def reports(self, *, checkpoint_seconds: float, stop: StopRequest | None = None) -> Iterator[Report]:
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
                            self._save(logs)
                            saved_step, saved_at = engine.step, time.monotonic()
                        request.poll(self.path)
                    yield Report(engine.step, metrics, self.policy)
                    mark = time.monotonic()  # what the caller did meanwhile is not training
            except GeneratorExit:
                if saved_step < engine.step:
                    self._save(logs)
                raise

    @property
    def policy(self) -> Policy:
        """The policy as it stands."""
        return Policy(self.config, self.spec, self.engine.learner.acting, seed=self.record["seed"])

    def close(self) -> None:
        """Release the environments and the lock."""
        self._open.close()

    def _times(self) -> dict[str, float]:
        """Where the time went: steps per second, seconds of training so far, and the share of each part of this iteration."""
        parts = dict(self.engine.seconds)
        total = parts.pop("total")
        shares = {f"time/{name}": round(seconds / total, 4) for name, seconds in parts.items()}
        return {"time/steps_per_second": round(self.engine.batch_steps / total, 1), "time/seconds": round(self.seconds, 3), **shares}

    def _save(self, logs: Logs) -> None:
        """Write a checkpoint and the policy; a full disk is a warning, since the run and its last checkpoint are intact."""
        trees, info = self.engine.snapshot()
        try:
            info |= {"seconds": self.seconds, "metrics_size": logs.sync()}
            save(self.path / "checkpoints", self.engine.step, trees, info)
            self.policy.save(self.path / "policy.safetensors")
        except (SaveError, OSError) as error:
            warnings.warn(f"{error}; training goes on and the next checkpoint will be tried as usual", stacklevel=2)


def whole_number(name: str, value: float, *, minimum: int) -> int:
    """`value` as an int: 1e6 is one, 1.5 is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer() or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")
    return int(value)


def describe_name(config: Any) -> str:
    return type(config).__name__.lower()


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


def read_record(path: Path) -> dict[str, Any]:
    """The run.json of a run directory; CheckpointError where there is none that can be used."""
    try:
        record = json.loads((path / "run.json").read_text())
        version = record["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a run directory: it holds no run.json.") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / 'run.json'} is corrupt: {error!r}.") from error
    if version != RUN_FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of surefoot reads format {RUN_FORMAT}.")
    return record


def versions() -> dict[str, str]:
    """Versions of what the bits depend on."""
    names = "surefoot", "jax", "jaxlib", "numpy", "equinox", "optax", "gymnasium"
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
