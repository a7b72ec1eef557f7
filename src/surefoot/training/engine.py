"""The moving parts of a run: collect, learn, check, one iteration at a time, with nothing of files or screens."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import of
from ..collect import HostCollector, as_rollout, scan_rollout, start_stream
from ..packing import packing_last, unpack
from ..pathwise import ReplayActorCriticSettings
from ..policies import where_rows
from ..replay import check_memory, replay_bytes
from ..types import EnvironmentSpec, HostEnvironment, PyTree, Rollout
from .checkpoint import Checkpoint
from .episodes import Ended, Recent, Running, follow
from .seeding import key_for, seed_for

SHORT, FUSED_STEPS = 8, 64  # steps of each environment: iterations of at most SHORT are one report, as many as fit into FUSED_STEPS
LARGE = 128  # rows and columns of products that are worth a thread of their own


Keys = tuple[jax.Array, jax.Array]  # of acting, of updating


class NonFiniteError(FloatingPointError):
    """Something was NaN or infinite. The parameters are those from before it, all finite."""


class Result(NamedTuple):
    """What K iterations give besides the new state of the learner."""

    metrics: dict[str, Any]  # [K] each
    ended: Ended  # [K, T, N]
    finite: Any  # [K] bool; where false the learner was left as it was


def finite(tree: PyTree) -> jax.Array:
    """[] whether every float in `tree` is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def compiler_options(config: Any = None) -> dict[str, Any]:
    """On a CPU, one operation after another: most are too small to be worth handing to other threads.

    Those of critics, their targets and an actor with large layers are not, and need not wait for each other.
    """
    if jax.default_backend() != "cpu":
        return {}
    several = isinstance(config, ReplayActorCriticSettings) and config.network == "mlp"
    kind = "CONCURRENCY" if several and min((config.minibatch_size, *config.hidden)) >= LARGE else "MEMORY"
    return {"xla_cpu_scheduler_type": f"CPU_SCHEDULER_TYPE_{kind}_OPTIMIZED"}


class Engine:
    """An algorithm on an environment. `advance` runs one iteration; `snapshot` and `restore` carry everything across processes."""

    def __init__(self, config: Any, environment: Any, spec: EnvironmentSpec, *, seed: int, total_steps: int):
        self.config, self.spec, self.seed = config, spec, seed
        self.algorithm = of(config)
        self.act = partial(self.algorithm.act, config)
        self.batch_steps = config.num_steps * spec.num_envs
        self.iteration = 0
        self.fused = FUSED_STEPS // config.num_steps if config.num_steps <= SHORT else 1  # iterations in one report; the last has fewer
        self.num_iterations = max(1, -(-total_steps // self.batch_steps))
        init = partial(self.algorithm.init, config, spec)
        shapes = jax.eval_shape(init, key_for(seed, "parameters"))
        check_memory(config, shapes)
        self.replay_bytes = replay_bytes(shapes)
        self.learner = jax.jit(init)(key_for(seed, "parameters"))
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
    def total_steps(self) -> int:
        """Environment steps of the whole run: whole batches."""
        return self.num_iterations * self.batch_steps

    @property
    def finished(self) -> bool:
        return self.iteration >= self.num_iterations

    def progress(self, index: Any) -> Any:
        """The fraction of the run before the iteration `index`, or before each of them."""
        return np.float32(index / self.num_iterations)

    def learn(self, learner: PyTree, running: Running, rollout: Rollout, key: jax.Array, index: Any) -> tuple[PyTree, Running, Result]:
        """The algorithm's update, not taken where it would leave anything non-finite; and the episodes that ended."""
        updated, metrics = self.algorithm.update(self.config, learner, rollout, None, jax.random.fold_in(key, index))
        has_replay = hasattr(learner, "replay")
        fine = finite((updated._replace(replay=None) if has_replay else updated, rollout))
        # What holds a replay is large: only that which can be seen of it, its policy, is kept from before at the price of a copy.
        before = updated._replace(acting=learner.acting) if has_replay else learner
        updated = jax.tree.map(lambda new, old: jnp.where(fine, new, old), updated, before)
        running, ended = follow(running, rollout, discount=self.config.gamma)
        return updated, running, Result(metrics, ended, fine)

    def advance(self) -> dict[str, Any]:
        """Run one iteration, or several short ones; their mean metrics, as numbers (None where there is nothing to report)."""
        began = time.perf_counter()
        self.seconds = {}
        index = self.iteration + np.arange(min(self.fused, max(1, self.num_iterations - self.iteration)))
        result = self._iterate(index.astype(np.int32))
        done = int(np.count_nonzero(result.finite))  # after the first that was not finite there are none
        self.iteration += done
        if done < len(index):
            self._explain_non_finite({name: values[done] for name, values in result.metrics.items()})
        self.steps_advanced = len(index) * self.batch_steps
        self.seconds["total"] = time.perf_counter() - began
        episodes = self.recent.take(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result.ended))  # [K, T, N] -> [K T, N]
        assert not episodes.keys() & result.metrics.keys(), f"{self.algorithm.name} reports what the engine reports"
        metrics = {name: mean_of_known(values) for name, values in sorted(result.metrics.items())}
        return {name: _number(value) for name, value in {**episodes, **metrics}.items()}

    def _iterate(self, index: np.ndarray[Any, Any]) -> Result:
        """The iterations `index` [K], up to the first that is not finite."""
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
        if hasattr(self.learner, "replay"):  # two of them may not fit into memory
            self.learner = self.learner._replace(replay=jax.eval_shape(lambda replay: replay, self.learner.replay))
        self.learner = checkpoint.restore("learner", self.learner)
        self.iteration = checkpoint.info["iteration"]
        self.recent.restore(checkpoint.info["episodes"])


class DeviceEngine(Engine):
    """Environment, policy and update in one compiled call for an iteration, or for several that are short."""

    def __init__(self, config: Any, environment: Any, spec: EnvironmentSpec, *, seed: int, total_steps: int):
        if collects_beside_learning(config):
            raise ValueError(
                f"{type(config).__name__}.collect_beside_learning is for environments that are stepped from Python; {spec.name} is "
                "compiled into one program with the learner, which does one after the other. Leave the setting out."
            )
        super().__init__(config, environment, spec, seed=seed, total_steps=total_steps)
        self.environment = environment
        act = partial(self.act, self.learner.acting)
        self.stream = jax.jit(lambda key: start_stream(environment, spec.num_envs, key, act))(key_for(seed, "environment"))
        self._collect_program = jax.jit(self._collect)
        # `acting` is not donated: a user may hold it, in the policy of a report.
        self._program = jax.jit(packing_last(self._iterations), donate_argnums=(1, 2, 3), compiler_options=compiler_options(config))

    def _collect(self, acting: PyTree, stream: PyTree, key: jax.Array, progress: Any) -> tuple[PyTree, Rollout]:
        return scan_rollout(self.environment, partial(self.act, acting), stream, self.config.num_steps, progress, key)

    def _whole_iteration(self, learner: PyTree, stream: PyTree, running: Running, keys: Keys, index: Any, progress: Any) -> Any:
        stream, rollout = self._collect(learner.acting, stream, jax.random.fold_in(keys[0], index), progress)
        learner, running, result = self.learn(learner, running, rollout, keys[1], index)
        return learner, stream, running, result

    def _iterations(self, acting: PyTree, others: PyTree, stream: PyTree, running: Running, keys: Keys, index: Any, progress: Any) -> Any:
        """Those of the iterations `index` [K] that are not negative, which come first, up to the first that is not finite."""

        def iteration(loop: tuple[jax.Array, Any, Result]) -> tuple[jax.Array, Any, Result]:
            i, (learner, stream, running), results = loop
            learner, following, running, result = self._whole_iteration(learner, stream, running, keys, index[i], progress[i])
            stream = jax.tree.map(lambda new, old: where_rows(result.finite, new, old), following, stream)
            return i + 1, (learner, stream, running), jax.tree.map(lambda all_of_them, one: all_of_them.at[i].set(one), results, result)

        def unfinished(loop: tuple[jax.Array, Any, Result]) -> jax.Array:
            # How often it is passed through is not known to the compiler, so that the bits do not depend on it.
            i, _, results = loop
            return (i < jnp.sum(index >= 0)) & ((i == 0) | results.finite[i - 1])

        start = others._replace(acting=acting), stream, running
        shapes = jax.eval_shape(self._whole_iteration, *start, keys, index[0], progress[0])[3]
        nothing_yet = jax.tree.map(lambda x: jnp.zeros((len(index), *x.shape), x.dtype), shapes)
        _, state, results = jax.lax.while_loop(unfinished, iteration, (jnp.zeros((), jnp.int32), start, nothing_yet))
        return *state, results

    def _iterate(self, index: np.ndarray[Any, Any]) -> Result:
        missing = self.fused - len(index)
        when = np.pad(index, (0, missing), constant_values=-1), np.pad(self.progress(index), (0, missing))
        state = self.learner.acting, self.learner._replace(acting=None), self.stream, self.running
        self.learner, self.stream, self.running, packed = self._program(*state, (self.acting_key, self.updating_key), *when)
        result: Result = jax.tree.map(lambda x: x[: len(index)], unpack(packed))
        return result

    def _explain_non_finite(self, metrics: dict[str, Any]) -> None:
        key = jax.random.fold_in(self.acting_key, np.int32(self.iteration))
        _, rollout = self._collect_program(self.learner.acting, self.stream, key, self.progress(self.iteration))
        name_non_finite(rollout)
        super()._explain_non_finite(metrics)

    def time_collecting(self) -> float:
        """Seconds of environment and acting in an iteration, measured by running that half alone and dropping the result."""
        marks = []
        for _ in range(4):  # the first compiles, and the fastest of the others was disturbed the least
            jax.block_until_ready(self._collect_program(self.learner.acting, self.stream, self.acting_key, np.float32(0.0)))
            marks.append(time.perf_counter())
        return min(end - begin for begin, end in pairwise(marks))

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        trees, info = super().snapshot()
        return trees | {"environment": self.stream, "running": self.running}, info

    def restore(self, checkpoint: Checkpoint) -> None:
        super().restore(checkpoint)
        self.stream = checkpoint.restore("environment", self.stream)
        self.running = checkpoint.restore("running", self.running)


def mean_of_known(values: np.ndarray[Any, Any]) -> Any:
    """The mean of those of `values` [K] that are not NaN, in their own dtype where there is but one."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if len(values) == 1:
        return values[0]
    return known.mean() if known.size else np.nan


def collects_beside_learning(config: Any) -> bool:
    """Whether iteration i collects, while it learns, what i + 1 will learn from: with what i - 1 left. A setting of methods with replay."""
    return getattr(config, "collect_beside_learning", False)


class HostEngine(Engine):
    """A Python loop over the environment with one small compiled call per vector step, and one for the whole update."""

    def __init__(self, config: Any, environment: HostEnvironment, spec: EnvironmentSpec, *, seed: int, total_steps: int):
        super().__init__(config, environment, spec, seed=seed, total_steps=total_steps)
        self.lag = int(collects_beside_learning(config))  # iterations that a rollout waits before it is learned from
        self.collector = HostCollector(environment, self.act, config.num_steps, seed_for(seed, "environment"), num_rollouts=1 + self.lag)
        self.collected: Rollout | None = None  # that waits
        # On a CPU the compiled calls of one thread run one after another, so that acting would wait for the update.
        self._thread = ThreadPoolExecutor(1) if self.lag else None
        # `acting` is not donated: a user may hold it, in the policy of a report.
        self._program = jax.jit(packing_last(self._update), donate_argnums=(1, 2), compiler_options=compiler_options(config))
        self._fold_in = jax.jit(jax.random.fold_in)
        # What acting with the newest parameters needs, computed by the call that learned them: in the rollout that is next to be
        # collected, or with a lag in the one after it.
        self.ahead: PyTree = None

    def _update(
        self, acting: PyTree, others: PyTree, running: Running, rollout: Rollout, acting_key: jax.Array, updating_key: jax.Array, index: Any
    ) -> Any:
        learner, running, result = self.learn(others._replace(acting=acting), running, rollout, updating_key, index)
        assert self.collector.actor is not None
        key = jax.random.fold_in(acting_key, index + (1 + self.lag))
        return learner, running, (result, self.collector.actor.ahead(learner.acting, key))

    def _collect(self, index: Any, acting: PyTree, ahead: PyTree) -> Rollout:
        """What the iteration `index` learns from."""
        key = self._fold_in(self.acting_key, index) if ahead is None else self.acting_key  # of which nothing is drawn then
        rollout = self.collector.collect(acting, self.progress(index), key, ahead)
        return rollout._replace(acting=acting) if self.lag else rollout

    def _learn(self, rollout: Rollout, index: Any) -> Any:
        """(learner, running, packed (result, what acting with the new parameters needs)), all of them ready."""
        state = self.learner.acting, self.learner._replace(acting=None), self.running
        # Waited for: the program reads the rollout's buffers while it runs, and a later collection writes into them.
        return jax.block_until_ready(self._program(*state, rollout, self.acting_key, self.updating_key, index))

    def _iterate(self, index: np.ndarray[Any, Any]) -> Result:
        self.collector.seconds = {"environment": 0.0, "acting": 0.0}
        results: list[Result] = []
        learning = 0.0  # seconds in which nothing was collected
        for i in index:
            acting, ahead, rollout = self.learner.acting, self.ahead, self.collected
            if rollout is None:
                rollout = self._collect(i, acting, None if self.lag else ahead)
            learned = self._thread.submit(self._learn, rollout, i) if self._thread else None
            try:
                self.collected = self._collect(i + 1, acting, ahead) if self.lag and i + 1 < self.num_iterations else None
            finally:  # where an environment fails too: the program was given the learner's arrays
                began = time.perf_counter()
                self.learner, self.running, packed = learned.result() if learned else self._learn(rollout, i)
                learning += time.perf_counter() - began
            result, self.ahead = unpack(packed)
            results.append(result)
            if not result.finite:
                break
        self.seconds = {**self.collector.seconds, "learning": learning}
        return jax.tree.map(lambda *each: np.stack(each), *results)

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        trees, info = super().snapshot()
        state = self.collector.get_state()
        if state is not None:
            arrays, environment = state
            trees |= {"environment": arrays, "running": self.running}
            info["environment"] = environment
            if self.collected is not None:  # of an environment that begins anew after a resume it is left out
                assert not jax.tree.leaves(self.collected.carry), "a method with replay and a memory"
                trees |= {"collected": self.collected._replace(acting=None), "acted": self.collected.acting}
        if self.ahead is not None:
            # A program that computes this alone may round otherwise than the one that did.
            trees["ahead"] = {f"{i}.{j}": leaf for i, part in enumerate(self.ahead) for j, leaf in enumerate(part)}
        return trees, info

    def restore(self, checkpoint: Checkpoint) -> None:
        super().restore(checkpoint)
        if "environment" in checkpoint.info:
            self.collector.set_state(checkpoint.arrays("environment"), checkpoint.info["environment"])
            self.running = checkpoint.restore("running", self.running)
        if "collected" in checkpoint.trees:
            collected = as_rollout(checkpoint.arrays("collected"), self.collector.obs)
            self.collected = collected._replace(acting=checkpoint.restore("acted", self.learner.acting))
        if "ahead" in checkpoint.trees:
            leaves = checkpoint.arrays("ahead")
            parts = [[name for name in leaves if name.startswith(f"{i}.")] for i in range(2)]
            self.ahead = tuple([leaves[f"{i}.{j}"] for j in range(len(part))] for i, part in enumerate(parts))


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
