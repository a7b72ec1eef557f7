"""The moving parts of a run: collect, learn, check, one iteration at a time, with nothing of files or screens."""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import of
from ..collect import HostCollector, scan_rollout, start_stream
from ..packing import packing_last, unpack
from ..types import EnvironmentSpec, HostEnvironment, PyTree, Rollout
from .checkpoint import Checkpoint
from .episodes import Ended, Recent, Running, follow
from .seeding import key_for, seed_for

FUSED_STEPS = 16  # of each device environment: as many iterations as fit into them are one call, which costs as much as ten steps


class NonFiniteError(FloatingPointError):
    """Something was NaN or infinite. The parameters are those from before it, all finite."""


class Result(NamedTuple):
    """What one iteration gives besides the new state of the learner."""

    metrics: dict[str, Any]
    ended: Ended
    finite: Any  # [] bool; where false the learner was left as it was


def finite(tree: PyTree) -> jax.Array:
    """[] whether every float in `tree` is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def compiler_options() -> dict[str, Any]:
    """On a CPU, one operation after another: they are too small to be worth handing to other threads."""
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else {}


class Engine:
    """An algorithm on an environment. `advance` runs one iteration; `snapshot` and `restore` carry everything across processes."""

    def __init__(self, config: Any, environment: Any, spec: EnvironmentSpec, *, seed: int, total_steps: int):
        self.config, self.spec, self.seed = config, spec, seed
        self.algorithm = of(config)
        self.batch_steps = config.num_steps * spec.num_envs
        self.iteration = 0
        self.fused = 1  # iterations in one call, of which the last has fewer
        self.num_iterations = max(1, -(-total_steps // self.batch_steps))
        self.learner = jax.jit(partial(self.algorithm.init, config, spec))(key_for(seed, "parameters"))
        # Arguments of the compiled programs and not constants in them, so that every seed runs the same program.
        self.acting_key, self.updating_key = key_for(seed, "acting"), key_for(seed, "updating")
        self.running = Running.start(spec.num_envs)
        self.recent = Recent()
        self.steps_advanced = 0  # environment steps of the last call
        self.seconds: dict[str, float] = {}  # of the last call, by part

    @property
    def step(self) -> int:
        """Environment steps so far."""
        return self.iteration * self.batch_steps

    @property
    def finished(self) -> bool:
        return self.iteration >= self.num_iterations

    def act(self, acting: PyTree, obs: Any, action_mask: Any, carry: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        return self.algorithm.act(self.config, acting, obs, action_mask, carry, key)

    def learn(self, learner: PyTree, running: Running, rollout: Rollout, key: jax.Array, index: Any) -> tuple[PyTree, Running, Result]:
        """The algorithm's update, not taken where it would leave anything non-finite; and the episodes that ended."""
        updated, metrics = self.algorithm.update(self.config, learner, rollout, None, jax.random.fold_in(key, index))
        fine = finite((updated, rollout))
        updated = jax.tree.map(lambda new, old: jnp.where(fine, new, old), updated, learner)
        running, ended = follow(running, rollout, discount=self.config.gamma)
        return updated, running, Result(metrics, ended, fine)

    def advance(self) -> dict[str, Any]:
        """Run one iteration, or several short ones; their mean metrics, as numbers (None where there is nothing to report)."""
        began = time.perf_counter()
        self.seconds = {}
        index = self.iteration + np.arange(max(1, min(self.fused, self.num_iterations - self.iteration)))
        result = self._iterate(index.astype(np.int32), (index / self.num_iterations).astype(np.float32))
        if not result.finite and len(index) > 1:
            self.fused = 1  # nothing was kept of this call: one iteration at a time finds the one that was not finite
            return self.advance()
        if not result.finite:
            self._explain_non_finite(result.metrics)
        self.iteration += len(index)
        self.steps_advanced = len(index) * self.batch_steps
        self.seconds["total"] = time.perf_counter() - began
        episodes = self.recent.take(result.ended)
        assert not episodes.keys() & result.metrics.keys(), f"{self.algorithm.name} reports what the engine reports"
        return {name: _number(value) for name, value in {**episodes, **dict(sorted(result.metrics.items()))}.items()}

    def _iterate(self, index: np.ndarray[Any, Any], progress: np.ndarray[Any, Any]) -> Result:
        """The iterations `index` [K] after these fractions of the run [K]; of several nothing is kept unless all are finite."""
        raise NotImplementedError

    def _explain_non_finite(self, metrics: dict[str, Any]) -> None:
        bad = [f"{name} = {float(value)}" for name, value in metrics.items() if "loss" in name or "norm" in name if not np.isfinite(value)]
        leaves = ", ".join(bad) or "the updated parameters"
        raise NonFiniteError(
            f"Iteration {self.iteration} (after {self.step} steps) was not finite: {leaves}. The step was not taken; "
            "the parameters are those from before it. Try a smaller learning_rate or max_grad_norm, or normalise_reward=True."
        )

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """(trees of arrays, JSON) from which `restore` continues to the bit."""
        return {"learner": self.learner}, {"iteration": self.iteration, "episodes": self.recent.to_json()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from what `snapshot` gave."""
        self.learner = checkpoint.restore("learner", self.learner)
        self.iteration = checkpoint.info["iteration"]
        self.recent.restore(checkpoint.info["episodes"])


class DeviceEngine(Engine):
    """Environment, policy and update in one compiled call per iteration, or for several iterations that are short."""

    def __init__(self, config: Any, environment: Any, spec: EnvironmentSpec, *, seed: int, total_steps: int):
        super().__init__(config, environment, spec, seed=seed, total_steps=total_steps)
        self.environment = environment
        act = partial(self.act, self.learner.acting)
        self.stream = jax.jit(lambda key: start_stream(environment, spec.num_envs, key, act))(key_for(seed, "environment"))
        self._collect_program = jax.jit(self._collect)
        self.fused = self.room = max(1, FUSED_STEPS // config.num_steps)
        self._program = jax.jit(
            packing_last(self._iterations if self.room > 1 else self._whole_iteration), compiler_options=compiler_options()
        )

    def _collect(self, learner: PyTree, stream: PyTree, key: jax.Array, index: Any, progress: Any) -> tuple[PyTree, Rollout]:
        act = partial(self.act, learner.acting)
        return scan_rollout(self.environment, act, stream, self.config.num_steps, progress, jax.random.fold_in(key, index))

    def _whole_iteration(
        self, learner: PyTree, stream: PyTree, running: Running, acting_key: jax.Array, updating_key: jax.Array, index: Any, progress: Any
    ) -> Any:
        stream, rollout = self._collect(learner, stream, acting_key, index, progress)
        learner, running, result = self.learn(learner, running, rollout, updating_key, index)
        return learner, stream, running, result

    def _iterations(
        self, learner: PyTree, stream: PyTree, running: Running, acting_key: jax.Array, updating_key: jax.Array, index: Any, progress: Any
    ) -> Any:
        """Those of the iterations `index` [K] that are not negative, which come first; their mean metrics, and all that ended."""

        def iteration(i: jax.Array, carry: tuple[Any, Result]) -> tuple[Any, Result]:
            state, results = carry
            *state, result = self._whole_iteration(*state, acting_key, updating_key, index[i], progress[i])
            return tuple(state), jax.tree.map(lambda all_of_them, one: all_of_them.at[i].set(one), results, result)

        start = learner, stream, running
        shapes = jax.eval_shape(self._whole_iteration, *start, acting_key, updating_key, index[0], progress[0])[3]
        metrics = {name: jnp.full(len(index), jnp.nan) for name in shapes.metrics}
        ended = jax.tree.map(lambda x: jnp.zeros((len(index), *x.shape), x.dtype), shapes.ended)
        # How often it is passed through is not known to the compiler, so that the bits do not depend on it.
        count = jnp.sum(index >= 0)
        state, results = jax.lax.fori_loop(0, count, iteration, (start, Result(metrics, ended, jnp.ones(len(index), bool))))
        metrics = {name: jnp.nanmean(x) for name, x in results.metrics.items()}
        ended = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results.ended)  # [K, T, N] -> [K T, N]
        return *state, Result(metrics, ended, jnp.all(results.finite))

    def _iterate(self, index: np.ndarray[Any, Any], progress: np.ndarray[Any, Any]) -> Result:
        when = index[0], progress[0]
        if self.room > 1:
            missing = self.room - len(index)
            when = np.pad(index, (0, missing), constant_values=-1), np.pad(progress, (0, missing))
        keys = self.acting_key, self.updating_key
        learner, stream, running, packed = self._program(self.learner, self.stream, self.running, *keys, *when)
        result: Result = unpack(packed)
        if not result.finite:
            if len(index) > 1:
                return result
            _, rollout = self._collect_program(self.learner, self.stream, self.acting_key, index[0], progress[0])
            name_non_finite(rollout)
        self.learner, self.stream, self.running = learner, stream, running
        return result

    def time_collecting(self) -> float:
        """Seconds of environment and acting in an iteration, measured by running that half alone and dropping the result."""
        marks = []
        for _ in range(4):  # the first compiles, and the fastest of the others was disturbed the least
            jax.block_until_ready(self._collect_program(self.learner, self.stream, self.acting_key, np.int32(0), np.float32(0.0)))
            marks.append(time.perf_counter())
        return min(end - begin for begin, end in pairwise(marks))

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        trees, info = super().snapshot()
        return trees | {"environment": self.stream, "running": self.running}, info

    def restore(self, checkpoint: Checkpoint) -> None:
        super().restore(checkpoint)
        self.stream = checkpoint.restore("environment", self.stream)
        self.running = checkpoint.restore("running", self.running)


def joined(results: list[Result]) -> Result:
    """Several iterations as one: the mean of what is known of each metric, and all episodes that ended."""
    if len(results) == 1:
        return results[0]
    metrics = {}
    for name in results[0].metrics:
        every = np.array([result.metrics[name] for result in results])
        metrics[name] = every[~np.isnan(every)].mean() if not np.isnan(every).all() else np.nan
    ended = jax.tree.map(lambda *parts: np.concatenate(parts), *[result.ended for result in results])
    return Result(metrics, ended, np.True_)


class HostEngine(Engine):
    """A Python loop over the environment with one small compiled call per vector step, and one for the whole update."""

    def __init__(self, config: Any, environment: HostEnvironment, spec: EnvironmentSpec, *, seed: int, total_steps: int):
        super().__init__(config, environment, spec, seed=seed, total_steps=total_steps)
        self.collector = HostCollector(environment, self.act, config.num_steps, seed_for(seed, "environment"))
        self._program = jax.jit(packing_last(self.learn), compiler_options=compiler_options())
        self._fold_in = jax.jit(jax.random.fold_in)
        self.fused = max(1, FUSED_STEPS // config.num_steps)

    def _iterate(self, index: np.ndarray[Any, Any], progress: np.ndarray[Any, Any]) -> Result:
        self.collector.seconds = {"environment": 0.0, "acting": 0.0}
        results: list[Result] = []
        learning = 0.0
        for i, done in zip(index, progress, strict=True):
            rollout = self.collector.collect(self.learner.acting, done, self._fold_in(self.acting_key, i))
            began = time.perf_counter()
            # Waited for: the program reads the rollout's buffers while it runs, and the next collection writes into them.
            ready = jax.block_until_ready(self._program(self.learner, self.running, rollout, self.updating_key, i))
            self.learner, self.running, packed = ready
            results.append(unpack(packed))
            learning += time.perf_counter() - began
            if not results[-1].finite:
                self.iteration = int(i)  # those before it have been learned from
                self._explain_non_finite(results[-1].metrics)
        self.seconds = {**self.collector.seconds, "learning": learning}
        return joined(results)

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        trees, info = super().snapshot()
        state = self.collector.get_state()
        if state is not None:
            arrays, environment = state
            trees |= {"environment": arrays, "running": self.running}
            info["environment"] = environment
        return trees, info

    def restore(self, checkpoint: Checkpoint) -> None:
        super().restore(checkpoint)
        if "environment" in checkpoint.info:
            self.collector.set_state(checkpoint.arrays("environment"), checkpoint.info["environment"])
            self.running = checkpoint.restore("running", self.running)


def name_non_finite(rollout: Rollout) -> None:
    """Raise for the first NaN or infinity that a device environment gave or was given, naming where it stands."""
    for name in ("obs", "final_obs", "reward", "action"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(rollout, name)):
            x = np.asarray(leaf)
            if np.issubdtype(x.dtype, np.inexact) and not np.isfinite(x).all():
                t, n, *rest = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
                raise NonFiniteError(
                    f"{name}{jax.tree_util.keystr(path)}{rest or ''} of environment {n} at step {t} of the batch is {x[(t, n, *rest)]}. "
                    "It was not learned from; mend the environment."
                )


def _number(value: Any) -> float | int | None:
    """A JSON number; None for what is not finite."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    if not np.isfinite(number):
        return None
    return int(number) if np.issubdtype(np.asarray(value).dtype, np.integer) else number
