"""Collecting beside learning: who acted, that both happen at once, and that faults, guards and checkpoints stay what they were."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from support import BATCH, GOOD_STEPS, Walk, bits, metrics, steps_saved

import surefoot as sf
from surefoot.algorithms import Algorithm
from surefoot.config import configuration
from surefoot.training import engine as engines
from surefoot.training.cache import use_compilation_cache
from surefoot.training.checkpoint import newest
from surefoot.training.control import ControlSession

NOISE = 1000


class Numbers(Walk):
    """Rewarded with what was chosen."""

    action_space = spaces.Discrete(10**6)

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, float(action), *rest


@configuration
class Counting:
    """Its parameters are the number of updates so far."""

    gamma: float = 1.0
    num_steps: int = 3
    collect_beside_learning: bool = False


class State(NamedTuple):
    acting: jax.Array


def act(config: Any, acting: jax.Array, obs: Any, action_mask: Any, carry: Any, key: Any) -> Any:
    """Shows who acted, and what was drawn."""
    return NOISE * acting + jax.random.randint(key, (len(obs),), 0, NOISE), carry


def update(config: Any, state: State, rollout: Any, frozen: None, key: Any) -> Any:
    reported = {"updates": state.acting, "reward": rollout.reward[0, 0], "reward_sum": rollout.reward.sum(), "time": rollout.time[0, 0]}
    reported |= {
        "obs": rollout.obs.sum(),
        "last_obs": rollout.last_obs.sum(),
        "progress": rollout.progress,
        "named": state.acting if rollout.acting is None else rollout.acting,
    }
    return State(state.acting + 1), reported


COUNTING = Algorithm("counting", Counting, lambda *_: State(jnp.zeros((), jnp.int32)), act, update)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[dict[str, Any]]]:
    """What ten iterations of 3 steps of 2 environments report, in calls of one iteration, without and with the setting."""
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "of", lambda config: COUNTING)
        patch.setattr(engines, "FUSED_STEPS", 3)
        for beside in (False, True):
            rows[beside] = []
            session = ControlSession(
                tmp_path_factory.mktemp("counting"),
                {"num_envs": 2, "steps": 60, "seed": 0},
                Counting(collect_beside_learning=beside),
                Numbers,
            )
            if beside:
                meet(session.engine)
            while not session.engine.finished:
                rows[beside].append(session.engine.advance() | session._times())
            session.close()
    return rows


def meet(engine: Any) -> None:
    """Let no rollout be collected before the update beside it has begun, and no update go on before that rollout is complete."""
    learn, collect = engine._learn, engine._collect
    begun: list[int] = []
    collected: list[int] = []

    def wait_for(number: int, those: list[int]) -> None:
        deadline = time.monotonic() + 10.0
        while len(those) < number:
            assert time.monotonic() < deadline, "one waits for the other"
            time.sleep(0.001)

    def learn_when_collected(rollout: Any, index: Any) -> Any:
        begun.append(index)
        wait_for(min(index + 2, engine.num_iterations), collected)
        return learn(rollout, index)

    def collect_when_begun(index: Any, *others: Any) -> Any:
        wait_for(index, begun)
        rollout = collect(index, *others)
        collected.append(index)
        return rollout

    engine._learn, engine._collect = learn_when_collected, collect_when_begun


def test_a_rollout_is_of_the_parameters_one_iteration_before(counted: dict[bool, list[dict[str, Any]]]) -> None:
    alone, beside = counted[False], counted[True]
    assert [row["updates"] for row in beside] == [row["updates"] for row in alone] == list(range(10))
    assert [row["reward"] // NOISE for row in alone] == list(range(10))
    assert [row["reward"] // NOISE for row in beside] == [row["named"] for row in beside] == [0, *range(9)]


def test_the_order_of_rollouts_and_what_is_drawn_in_them_stay(counted: dict[bool, list[dict[str, Any]]]) -> None:
    """Every rollout is learned from, the last one too, in its own arrays, and with the random numbers of its index."""
    alone, beside = counted[False], counted[True]
    assert [row["time"] for row in beside] == [3 * i % 10 for i in range(10)]
    np.testing.assert_array_equal([row["progress"] for row in beside], [float(np.float32(i / 10)) for i in range(10)])
    for one, other in zip(alone, beside, strict=True):
        assert (other["obs"], other["last_obs"]) == (one["obs"], one["last_obs"])
        assert other["reward"] % NOISE == one["reward"] % NOISE
        lag = one["updates"] - other["named"]
        assert other["reward_sum"] == one["reward_sum"] - 6 * NOISE * lag  # of 6 rows, those that nothing has written over
    assert len({row["reward"] % NOISE for row in alone}) > 5


def test_the_shares_of_time_are_of_the_whole(counted: dict[bool, list[dict[str, Any]]]) -> None:
    for row in itertools.chain(*counted.values()):
        assert sum(row[f"time/{part}"] for part in ("environment", "acting", "learning")) <= 1.001


# Of a replay so small that its rings are written over.
TINY = {"hidden": (8,), "replay_size": 640, "learning_starts": 64, "minibatch_size": 16, "update_to_data": 0.125, "num_steps": 2}
RETRACE = sf.OffPolicyActorCritic(**TINY, critic_target="retrace", sequence_length=4, collect_beside_learning=True)
STEPS = 16 * 96


def start(path: Path, config: Any, env: Any = "support:Walk", steps: int = STEPS) -> ControlSession:
    use_compilation_cache()
    return ControlSession.start(config, env, steps=steps, seed=0, num_envs=8, preset=False, out=path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, with no checkpoint but the last."""
    path = tmp_path_factory.mktemp("beside") / "whole"
    list(start(path, RETRACE).reports(checkpoint_seconds=1e9))
    return path


def test_a_run_that_is_left_and_resumed_has_the_bits_of_one_without_checkpoints(whole: Path, tmp_path: Path) -> None:
    """Three calls of 32 iterations; what was collected beside the last of a call lies in its checkpoint."""
    reports = start(tmp_path / "left", RETRACE).reports(checkpoint_seconds=0.0)
    assert next(reports).step == 512
    reports.close()
    reports = ControlSession.resume(tmp_path / "left").reports(checkpoint_seconds=0.0)
    assert next(reports).step == 1024
    reports.close()
    sf.resume(tmp_path / "left", progress=False)
    assert bits(tmp_path / "left") == bits(whole)
    assert metrics(whole)[-1]["critic_loss"] is not None


class Forgets(Walk):
    """It cannot give its state."""

    get_state = None  # type: ignore[assignment]


def test_an_environment_that_cannot_give_its_state_begins_anew_and_nothing_waits(tmp_path: Path) -> None:
    """The steps that were taken and not yet learned from are taken again: every checkpoint is of as many transitions as steps."""
    reports = start(tmp_path, RETRACE, Forgets).reports(checkpoint_seconds=0.0)
    next(reports)
    reports.close()
    checkpoint = newest(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert not {"collected", "acted", "environment"} & set(checkpoint.trees)
    sf.resume(tmp_path, Forgets, progress=False)
    checkpoint = newest(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert int(checkpoint.arrays("learner")["replay.written"].sum()) == STEPS


def test_more_steps_can_be_asked_for_afterwards(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"steps": 2 * STEPS}))
    sf.resume(run, progress=False)
    assert metrics(run)[-1]["step"] == 2 * STEPS


LONGER = TINY | {"num_steps": 16, "learning_starts": BATCH + 1}  # a fault of `support` comes in the third rollout


def test_a_fault_is_named_while_the_program_learns_and_the_last_checkpoint_stands(tmp_path: Path) -> None:
    """A rollout earlier than without: the second iteration learns while the third rollout is collected."""
    session = start(tmp_path, sf.DQN(**LONGER, collect_beside_learning=True), "support:NanObservation")
    reports = session.reports(checkpoint_seconds=0.0)
    held = next(reports).policy
    with pytest.raises(
        ValueError, match=rf"^support:NanObservation: environment 0 \(seed \d+\), step {GOOD_STEPS}: the observation is nan"
    ):
        next(reports)
    assert steps_saved(tmp_path) == [BATCH]
    assert int(session.engine.learner.replay.size) == 2 * BATCH  # what the program had been given is there
    for leaf in jax.tree.leaves((held.acting, session.engine.learner)):
        assert np.isfinite(leaf).all()


def test_an_update_that_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    config = sf.OffPolicyActorCritic(**LONGER, critic_learning_rate=1e30, collect_beside_learning=True)
    session = start(tmp_path, config)
    reports = session.reports(checkpoint_seconds=0.0)
    assert next(reports).metrics["critic_loss"] is None
    before = jax.tree.map(np.array, session.engine.learner.acting)
    with pytest.raises(sf.NonFiniteError, match=r"Iteration 1 \(after 128 steps\) was not finite: .*The step was not taken"):
        next(reports)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, session.engine.learner.acting)))
    assert steps_saved(tmp_path) == [BATCH]


@pytest.mark.parametrize("config", [sf.SAC, sf.DQN])
def test_a_device_environment_is_refused_with_the_reason(config: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^{config.__name__}\.collect_beside_learning .*; CartPole-v1 is compiled into one program .* Leave"
    ):
        start(tmp_path / "run", config(collect_beside_learning=True), "CartPole-v1")
    assert not (tmp_path / "run").exists()
