"""A run of an algorithm on an environment."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from ..envs import environment_name, is_device, is_vector, make
from ..networks import find_factory, own_network
from .engine import DeviceEngine, Engine, HostEngine
from .policy import Policy, describe, undescribe
from .presets import preset_for, with_settings
from .session import Session, fresh_directory, new_record, whole_number
from .session import read_record as read_any_record


class ControlSession(Session):
    """One run in one process: `config` says which algorithm, `env` what it is trained on."""

    engine: Engine

    def __init__(self, path: Path, record: dict[str, Any], config: Any, env: Any):
        self.config, self._env = config, env
        super().__init__(path, record)

    @classmethod
    def start(
        cls, config: Any, env: Any, *, steps: float, seed: int, num_envs: int, preset: bool, out: str | Path | None
    ) -> ControlSession:
        """Make a new run directory; ValueError where it exists already or cannot be written."""
        steps = whole_number("steps", steps, minimum=1)
        seed = whole_number("seed", seed, minimum=0)
        name = environment_name(env)
        settings = preset_for(config, name) if preset else {}
        config = with_settings(config, settings)
        with fresh_directory(out, f"{type(config).__name__.lower()}-{name}") as path:
            session = cls(path, new_record(steps, seed) | {"num_envs": num_envs, "preset": settings}, config, env)
            session._begin()
        return session

    @classmethod
    def resume(cls, path: Path, env: Any = None) -> Self:
        """Continue the run in `path` from its newest valid checkpoint, or from the start where it has none yet."""
        record = read_record(path)
        _, config, _ = undescribe(record)
        if (network := own_network(config)) is not None:
            find_factory(network, import_module=True)
        session = cls(path, record, config, recorded_environment(record) if env is None else env)
        session._continue()
        return session

    def prepare(self, opened: ExitStack) -> Engine:
        """The environment, and the engine for its kind."""
        environment, self.spec = make(self._env, self.record["num_envs"])
        if not is_device(environment) and not is_vector(self._env):
            opened.callback(environment.close)
        self.record["resume"] = self.spec.resume
        engine = DeviceEngine if is_device(environment) else HostEngine
        return engine(self.config, environment, self.spec, seed=self.record["seed"], total_steps=self.record["steps"])

    @property
    def identity(self) -> dict[str, Any]:
        return describe(self.config, self.spec) | {"seed": self.record["seed"]}

    @property
    def policy(self) -> Policy:
        return Policy(self.config, self.spec, self.engine.learner.acting, seed=self.record["seed"])

    def save_policy(self) -> None:
        self.policy.save(self.path / "policy.safetensors")


def read_record(path: Path) -> dict[str, Any]:
    """The run.json of a run directory; CheckpointError where there is none that can be used."""

    def check(record: dict[str, Any]) -> None:
        whole_number("num_envs", record["num_envs"], minimum=1)
        undescribe(record)

    return read_any_record(path, check, "num_envs", "preset", "resume")


def recorded_environment(record: dict[str, Any]) -> str:
    """The environment that a record names; ValueError where the run was given something without a name, such as a lambda."""
    name = record["environment"]
    if "<" in name:
        raise ValueError(f"The run was given {name}, which cannot be found by that name; hand it over again, as env=...")
    return str(name)
