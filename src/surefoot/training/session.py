"""A run from its first step to its last: the run directory, its checkpoints, and the loop that yields reports."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Generator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..envs import environment_name, is_device, is_vector, make
from ..networks import find_factory, own_network
from ..spaces import from_json
from .checkpoint import Checkpoint, CheckpointError, RunLocked, SaveError, lock, newest, save
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
        with ExitStack() as opened:
            opened.enter_context(lock(path))
            environment, self.spec = make(env, record["num_envs"])
            if not is_device(environment) and not is_vector(env):
                opened.callback(environment.close)
            engine = DeviceEngine if is_device(environment) else HostEngine
            self.engine: Engine = engine(config, environment, self.spec, seed=record["seed"], total_steps=record["steps"])
            self._open = opened.pop_all()  # all is well: it stays open until `close`
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
            session.record |= session.identity | {"resume": session.spec.resume}
            write_json(path / "run.json", session.record)
        except RunLocked:
            raise  # another process has begun in this directory just now
        except BaseException:
            remove_empty(path)
            raise
        return session

    @classmethod
    def resume(cls, path: Path, env: Any = None) -> Session:
        """Continue the run in `path` from its newest valid checkpoint, or from the start where it has none yet."""
        record = read_record(path)
        _, config, _ = undescribe(record)
        if (network := own_network(config)) is not None:
            find_factory(network, import_module=True)
        session = cls(path, record, config, recorded_environment(record) if env is None else env)
        try:
            refuse_differences(path / "run.json", record, session.identity)
            checkpoint = newest(path / "checkpoints")
            if checkpoint is not None:
                session._restore(checkpoint)
        except BaseException:
            session.close()
            raise
        installed = versions()
        if changed := [f"{name} {was} -> {installed.get(name)}" for name, was in record["versions"].items() if installed.get(name) != was]:
            warnings.warn(f"other versions than at the start, so the bits may differ: {', '.join(changed)}", stacklevel=2)
        return session

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

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with a run, as JSON."""
        return describe(self.config, self.spec) | {"seed": self.record["seed"]}

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
        return {"time/steps_per_second": round(self.engine.steps_advanced / total, 1), "time/seconds": round(self.seconds, 3), **shares}

    def _save(self, logs: Logs) -> bool:
        """Write the policy and a checkpoint; a full disk is a warning, since the run and its last checkpoint are intact."""
        trees, info = self.engine.snapshot()
        try:
            info |= {"seconds": self.seconds, "metrics_size": logs.sync(), "run": self.identity}
            self.policy.save(self.path / "policy.safetensors")  # first, so that a checkpoint's policy is never missing
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
        if not isinstance(record, dict) or "format" not in record:
            raise ValueError("it is not the record of a run.")
        if record["format"] != RUN_FORMAT:
            raise ValueError(f"it has format {record['format']}, and this version of surefoot reads format {RUN_FORMAT}.")
        if lacking := {"preset", "resume", "seed", "steps", "versions"} - record.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}.")
        for name, minimum in {"steps": 1, "seed": 0, "num_envs": 1}.items():
            whole_number(name, record[name], minimum=minimum)
        undescribe(record)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a run directory: it holds no run.json.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / 'run.json'} cannot be used: {error}") from error
    return record


def recorded_environment(record: dict[str, Any]) -> str:
    """The environment that a record names; ValueError where the run was given something without a name, such as a lambda."""
    name = record["environment"]
    if "<" in name:
        raise ValueError(f"The run was given {name}, which cannot be found by that name; hand it over again, as env=...")
    return str(name)


def refuse_differences(source: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError, naming what differs, unless two `Session.identity` are the same."""

    def readable(value: Any) -> Any:
        return " ".join(str(from_json(value)).split()) if isinstance(value, dict) else repr(value)

    spread = {"config": None, "environment_settings": None}
    before, now = ({**one, **one["config"], **one.get("environment_settings", {}), **spread} for one in (before, now))
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
