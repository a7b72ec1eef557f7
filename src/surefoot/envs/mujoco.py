"""Gymnasium's MuJoCo-v5 tasks (`mujoco_tasks.py`) as a `HostEnvironment`: N simulations stepped at once on threads.

Seeds, observations, rewards and ends are Gymnasium's bit for bit, for the MuJoCo version that both run on; another version
of MuJoCo gives other bits in both.
"""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding

from ..types import HostEnvironment, Observation, Step
from .boundary import Boundary, EnvironmentFault, problem_of, stream_seeds, warn
from .gymnasium import gymnasium_environment
from .mujoco_tasks import TASKS, Array, Data, Start

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


def mujoco_environment(name: str, num_envs: int) -> HostEnvironment:
    """N streams of one of `TASKS`; through Gymnasium's serial loop where the installed MuJoCo has no thread pool.

    Raises ValueError where MuJoCo is not installed.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise ValueError(f'{name} needs MuJoCo, which is not installed: pip install "surefoot[mujoco]".')
    try:
        import mujoco.batch  # noqa: F401
    except ImportError:
        warn(
            f"{name} runs in Gymnasium's own loop, one environment at a time: its thread pool needs MuJoCo 3.17 or newer; "
            'pip install "surefoot[mujoco]" gives the version that this package is tested with.'
        )
        return gymnasium_environment(name, num_envs)
    return MujocoEnvironment(name, num_envs)


class MujocoEnvironment:
    """N streams of one task, each reset in the step that ends its episode."""

    def __init__(self, name: str, num_envs: int, num_threads: int | None = None):
        """`num_threads` None: one for each processor that this process may use, and at most one for each stream."""
        import mujoco

        task, self._unlogged = TASKS[name], Unlogged()
        self._task = task
        with self._unlogged:
            model = mujoco.MjModel.from_xml_path(str(ASSETS / task.model))
        simulations = Loop if task.has_contact_forces else Pool
        num_threads = num_threads or min(num_processors(), num_envs)
        self._simulations = simulations(model, num_envs, num_threads, ("qpos", "qvel", "ctrl", *task.fields))
        self._seconds = model.opt.timestep * task.frame_skip  # in a step
        self._generators: list[np.random.Generator] = []
        self._elapsed = np.zeros(num_envs, np.int32)  # steps since the reset
        self._position = np.zeros(num_envs)  # before the step
        self._alive = np.ones(num_envs, bool)  # where no episode terminates
        low, high = model.actuator_ctrlrange.astype(np.float32).T
        size = task.observe(self._simulations.data).shape[1]
        self._boundary = Boundary(
            name,
            gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64),
            gymnasium.spaces.Box(low, high, dtype=np.float32),
            num_envs,
            has_action_mask=False,
            close=self.close,
        )
        self.spec = self._boundary.spec("exact")

    def reset(self, seed: int) -> tuple[Observation, None]:
        """Begin every stream anew: (observation [N, D], no mask). Later episodes of a stream go on with its generator."""
        boundary = self._boundary
        boundary.begin(stream_seeds(seed, boundary.num_envs))
        self._generators = [seeding.np_random(seed)[0] for seed in boundary.seeds]
        with self._unlogged:
            self._begin(np.arange(boundary.num_envs))
        boundary.check(has_ended=False)
        return boundary.obs.arrays, None

    def step(self, action: Array) -> Step:
        """Take `action` [N, A]. Rows that ended hold the next episode's first observation; `valid` is true in all."""
        boundary, task, data = self._boundary, self._task, self._simulations.data
        boundary.num_steps += 1
        actions = data.ctrl[:] = boundary.actions(action)
        try:
            with self._unlogged:
                self._simulations.step(task.frame_skip)
                alive = self._alive if task.alive is None else task.alive(data)
                velocity = None
                if task.position is not None:
                    position = task.position(data).copy()  # may be live
                    velocity = (position - self._position) / self._seconds
                    self._position = position
                self._elapsed += 1
                boundary.obs.write_all(task.observe(data))
                boundary.reward[:] = task.reward(data, actions, velocity, alive)
                self._simulations.stay_awake()  # here too: on a busy machine this function outlasts their patience
                terminated = np.logical_not(alive, out=boundary.terminated)
                truncated = np.greater_equal(self._elapsed, task.max_episode_steps, out=boundary.truncated)
                ended = terminated | truncated
                has_ended = bool(np.count_nonzero(ended))
                if has_ended:
                    boundary.keep_final(ended)
                    self._begin(np.flatnonzero(ended))
        except EnvironmentFault as fault:
            boundary.fail_with(None, fault)
        boundary.check(has_ended)
        self._simulations.stay_awake()
        return boundary.step

    def _begin(self, streams: Array) -> None:
        """Begin an episode in each of `streams`."""
        task, data = self._task, self._simulations.data
        self._simulations.begin({index: task.begin(self._generators[index], data.model) for index in streams.tolist()})
        self._elapsed[streams] = 0
        if task.position is not None:
            self._position[streams] = task.position(data)[streams]
        self._boundary.obs.write_all(task.observe(data))  # those of the other streams are what they were

    def get_state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Everything `set_state` needs to go on bit for bit."""
        arrays = {"simulations": self._simulations.get_state(), "elapsed": self._elapsed.copy(), "position": self._position.copy()}
        generators = [generator.bit_generator.state for generator in self._generators]
        return arrays, {"num_steps": self._boundary.num_steps, "seeds": self._boundary.seeds, "generators": generators}

    def set_state(self, arrays: dict[str, Array], info: dict[str, Any]) -> None:
        """Continue from what `get_state` gave. Raises ValueError where it was given for other simulations than these."""
        ours, given = self._simulations.get_state().shape, arrays["simulations"].shape
        if ours != given:
            raise ValueError(
                f"The state holds {given[0]} environments of {given[1]} numbers, and this run has {ours[0]} of {ours[1]}; "
                "use the same number, and the same version of MuJoCo."
            )
        self._simulations.set_state(arrays["simulations"])
        self._elapsed, self._position = arrays["elapsed"].copy(), arrays["position"].copy()
        self._boundary.num_steps, self._boundary.seeds = info["num_steps"], info["seeds"]
        self._generators = [seeding.np_random(0)[0] for _ in info["generators"]]
        for generator, state in zip(self._generators, info["generators"], strict=True):
            generator.bit_generator.state = state

    def close(self) -> None:
        """End the threads."""
        self._simulations.close()


class Pool:
    """N simulations in MuJoCo's own thread pool; the fields of `data` are live."""

    def __init__(self, model: Any, num_envs: int, num_threads: int, fields: tuple[str, ...]):
        from mujoco.batch import Batch

        idle = num_threads if num_threads > 1 else 0  # simulations that never move, for `stay_awake`
        self._batch = Batch(model, num_envs + idle, num_threads)
        # Below the wrapper, which looks at the same indices anew in every call: 2 us of each environment's step.
        self._native = self._batch._b
        self._streams, self._idle = np.split(np.arange(num_envs + idle, dtype=np.int32), [num_envs])
        self._state = self._batch.state[:num_envs]
        self._fresh = self._state[0].copy()  # copied to a row it does what `reset` does, in a tenth of the time
        self.data = batched_data(model, {name: self._batch.bind(name)[:num_envs] for name in fields})

    def step(self, num_steps: int) -> None:
        """Advance every simulation."""
        try:
            self._batch._check(self._streams, self._native.step(self._streams, num_steps, 0))
        except Exception as error:
            raise EnvironmentFault(problem_of(error), int(getattr(error, "ids", [0])[0])) from error

    def stay_awake(self) -> None:
        """Give the threads a call of 3 us without effect: left alone for 30 us they fall asleep, and the next step waits for them."""
        if len(self._idle):
            self._native.forward(self._idle, 0)

    def begin(self, starts: dict[int, Start]) -> None:
        """Put the simulations named by the keys, in rising order, into new states."""
        indices = list(starts)
        self._state[indices] = self._fresh
        for index, (qpos, qvel) in starts.items():
            self.data.qpos[index], self.data.qvel[index] = qpos, qvel
        self._batch.forward(indices)

    def get_state(self) -> Array:
        """[N, S] all that the next step depends on."""
        return self._state.copy()

    def set_state(self, state: Array) -> None:
        """Continue from what `get_state` gave."""
        self._state[:] = state

    def close(self) -> None:
        """Nothing: the threads go with the object."""


class Loop:
    """N simulations of one mjData each, in blocks on threads (`mj_step` releases the GIL); `data` holds copies of their fields.

    The contact forces in an observation come from `mj_rnePostConstraint` *after* the step, a call that the pool does not make.
    """

    def __init__(self, model: Any, num_envs: int, num_threads: int, fields: tuple[str, ...]):
        import mujoco

        self._mujoco, self._model = mujoco, model
        self._simulations = [mujoco.MjData(model) for _ in range(num_envs)]
        stacked = {name: np.zeros((num_envs, *getattr(self._simulations[0], name).shape)) for name in fields}
        self.data = batched_data(model, stacked)
        self._copies = [[(stacked[name][i], getattr(one, name)) for name in fields] for i, one in enumerate(self._simulations)]
        self._blocks = np.array_split(np.arange(num_envs), num_threads)
        self._threads = ThreadPoolExecutor(num_threads)

    def step(self, num_steps: int) -> None:
        """Advance every simulation."""
        own, *others = self._blocks
        pending = [self._threads.submit(self._step_block, block, num_steps) for block in others]
        self._step_block(own, num_steps)
        for future in pending:
            future.result()

    def stay_awake(self) -> None:
        """Nothing: a step takes too long for its threads' sleep to matter."""

    def _step_block(self, block: Array, num_steps: int) -> None:
        for index in block.tolist():
            one = self._simulations[index]
            try:
                one.ctrl[:] = self.data.ctrl[index]
                self._mujoco.mj_step(self._model, one, num_steps)
                self._mujoco.mj_rnePostConstraint(self._model, one)
            except Exception as error:
                raise EnvironmentFault(problem_of(error), index) from error
            self._copy(index)

    def _copy(self, index: int) -> None:
        for row, field in self._copies[index]:
            row[...] = field

    def begin(self, starts: dict[int, Start]) -> None:
        """Put the simulations named by the keys into new states."""
        for index, (qpos, qvel) in starts.items():
            one = self._simulations[index]
            self._mujoco.mj_resetData(self._model, one)
            one.qpos[:], one.qvel[:] = qpos, qvel
            self._mujoco.mj_forward(self._model, one)
            self._copy(index)

    def get_state(self) -> Array:
        """[N, S] all that the next step depends on."""
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.zeros((len(self._simulations), self._mujoco.mj_stateSize(self._model, kind)))
        for row, one in zip(state, self._simulations, strict=True):
            self._mujoco.mj_getState(self._model, one, row, kind)
        return state

    def set_state(self, state: Array) -> None:
        """Continue from what `get_state` gave."""
        for row, one in zip(state, self._simulations, strict=True):
            self._mujoco.mj_setState(self._model, one, row, self._mujoco.mjtState.mjSTATE_INTEGRATION)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def batched_data(model: Any, fields: dict[str, Array]) -> Data:
    return Data(model=model, body={model.body(i).name: i for i in range(model.nbody)}, **fields)


class Unlogged:
    """Keep MuJoCo's warnings from the screen and from a MUJOCO_LOG.TXT in the working directory."""

    def __init__(self) -> None:
        from mujoco import MjLogConfig

        self._current, self._silent = MjLogConfig.get, MjLogConfig.get()
        self._silent.logto_console = self._silent.logto_file = False

    def __enter__(self) -> None:
        self._before = self._current()
        self._silent.set()

    def __exit__(self, *error: object) -> None:
        self._before.set()


def num_processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
