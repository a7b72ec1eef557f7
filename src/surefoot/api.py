"""What a user calls: train, iterate, resume, load."""

from __future__ import annotations

import atexit
import sys
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from .envs import NUM_ENVS
from .networks import BUILT_IN, find_factory
from .report import video
from .report.audit import plot_audit
from .report.curves import plot
from .report.page import write_report
from .report.progress import ControlProgress
from .training.cache import use_compilation_cache
from .training.control import ControlSession, read_record, recorded_environment
from .training.evaluate import evaluate
from .training.policy import Policy, load
from .training.session import Report
from .training.signals import StopRequest, catch_signals

__all__ = ["Run", "iterate", "load", "resume", "train"]


class Run:
    """A run directory, and the policy that came out of it."""

    def __init__(self, path: str | Path, env: Any = None):
        """`env` stands in for an environment that the run's record cannot name, such as a lambda."""
        self.path, self._env = Path(path), env

    @property
    def policy(self) -> Policy:
        """The policy of the newest save."""
        return load(self.path)

    def evaluate(self, episodes: int = 100, *, deterministic: bool = True, stop: StopRequest | None = None) -> np.ndarray[Any, Any]:
        """Returns of `episodes` whole episodes on seeds that training did not use, [episodes]; the same at every call."""
        poll = stop.poll if stop else lambda: None
        return evaluate(**self._to_play(), episodes=episodes, deterministic=deterministic, poll=poll)

    def record(self, out: str | Path, episodes: int = 1, *, deterministic: bool = True, **how: Any) -> list[float]:
        """Film the first episodes of `evaluate` into `out`, a .mp4 or .gif; their returns, [episodes]. More under `report.video.film`."""
        return video.record(**self._to_play(), out=out, episodes=episodes, deterministic=deterministic, **how)

    def watch(self, episodes: int = 1, *, deterministic: bool = True, **how: Any) -> list[float]:
        """Play them in a window; the returns of those that were over before it was closed."""
        return video.watch(**self._to_play(), episodes=episodes, deterministic=deterministic, **how)

    def plot_audit(self, out: str | Path | None = None) -> Path:
        """Draw the step audit into `out`, by default audit.png in the run, and return where it is. More under `report.audit.plot_audit`."""
        return plot_audit(self.path, self.path / "audit.png" if out is None else out)

    def report(self, out: str | Path | None = None) -> Path:
        """Write a page that tells all of the run into `out`, by default report.html in the run, and return where it is."""
        return write_report(self.path, self.path / "report.html" if out is None else out)

    def _to_play(self) -> dict[str, Any]:
        """The policy, its environment and the run's seed."""
        use_compilation_cache()
        record = read_record(self.path)
        if (network := record["config"].get("network", "mlp")) not in BUILT_IN:
            find_factory(network, import_module=True)
        env = recorded_environment(record) if self._env is None else self._env
        return {"policy": self.policy, "env": env, "seed": record["seed"]}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def iterate(
    config: Any,
    env: Any,
    *,
    steps: float = 1_000_000,
    seed: int = 0,
    num_envs: int = NUM_ENVS,
    preset: bool = True,
    out: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> Iterator[Report]:
    """Train, yielding a report after each iteration; leaving the loop at any time saves a checkpoint.

    Args:
        config: the algorithm and its settings, such as `PPO(clip=0.2)`.
        env: an environment id, `module:factory`, a callable that returns a `gymnasium.Env`, or a `gymnasium.vector.VectorEnv`.
        steps: environment steps in all, counted over the parallel environments, rounded up to whole batches.
        seed: everything random in the run follows from it.
        num_envs: environments stepped in parallel.
        preset: use settings known to work on this environment where `config` sets none.
        out: the run directory; by default a new one under `runs/`.
        checkpoint_seconds: time between checkpoints; there is always one at the end.

    Raises:
        ValueError: a setting, an environment or a directory that cannot be used, and what to do about it.
        NonFiniteError: NaN or infinity in an observation, a reward or an update. It was not learned from.
        KeyboardInterrupt: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    use_compilation_cache()
    session = ControlSession.start(config, env, steps=steps, seed=seed, num_envs=num_envs, preset=preset, out=out)
    reports = session.reports(checkpoint_seconds=checkpoint_seconds)
    _begun.add(reports)
    return reports


_begun: WeakSet[Generator[Report, None, None]] = WeakSet()


@atexit.register
def _close_reports() -> None:
    """Save what a program holds on to at its end, while it still can: Python itself would close it after taking JAX apart."""
    for reports in list(_begun):
        reports.close()


def train(
    config: Any,
    env: Any,
    *,
    steps: float = 1_000_000,
    seed: int = 0,
    num_envs: int = NUM_ENVS,
    preset: bool = True,
    out: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> Run:
    """Train to the end and return the run; arguments and errors as for `iterate`. `progress` prints how it goes."""
    use_compilation_cache()
    session = ControlSession.start(config, env, steps=steps, seed=seed, num_envs=num_envs, preset=preset, out=out)
    return _to_the_end(session, env, checkpoint_seconds, progress)


def resume(path: str | Path, env: Any = None, *, checkpoint_seconds: float = 60.0, progress: bool = True) -> Run:
    """Continue a run from its newest valid checkpoint to its end, as if it had never stopped.

    Args:
        env: the environment again, where the run was given one that its record cannot name, such as a lambda.

    Raises:
        CheckpointError: not a run, a corrupt one, or one of another environment, algorithm or version.
    """
    use_compilation_cache()
    return _to_the_end(ControlSession.resume(Path(path), env), env, checkpoint_seconds, progress)


def _to_the_end(session: ControlSession, env: Any, checkpoint_seconds: float, progress: bool) -> Run:
    with catch_signals() as stop, ControlProgress(session, sys.stderr if progress else None) as display:
        for report in session.reports(checkpoint_seconds=checkpoint_seconds, stop=stop):
            display.update(report)
    try:
        plot([session.path], session.path / "curve.png")
    except OSError as error:  # a full disk, after the run is saved
        warnings.warn(f"the learning curve was not drawn: {error}", stacklevel=3)
    return Run(session.path, env)
