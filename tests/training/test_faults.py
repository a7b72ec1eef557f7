"""What goes wrong while a run trains: named where it happened, learned from never, and nothing that was saved is lost."""

from __future__ import annotations

import json
import resource
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support import BATCH, GOOD_STEPS, SMALL, Endless, OneStep, bits, metrics, steps_saved

import surefoot as sf
from surefoot.training import evaluate
from surefoot.training.cache import use_compilation_cache
from surefoot.training.checkpoint import SaveError
from surefoot.training.control import ControlSession


def start(path: Path, env: Any = "CartPole-v1", steps: float = 4 * BATCH, config: Any = SMALL) -> ControlSession:
    use_compilation_cache()
    return ControlSession.start(config, env, steps=steps, seed=0, num_envs=8, preset=False, out=path)


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.array(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("NanObservation", r"the observation is nan at \[1\]"),
        ("InfiniteReward", "the reward is inf"),
        ("NanInDictionary", r"the observation 'arm/angle' is nan at \[1\]"),
        ("OtherShape", r"the observation has shape \(4,\), but its space says \(3,\)"),
        ("NoLegalAction", "no legal action"),
        ("Raises", "it raised RuntimeError: the motor is on fire"),
    ],
)
def test_a_fault_is_named_with_its_place_and_the_last_checkpoint_stands(name: str, what: str, tmp_path: Path) -> None:
    session = start(tmp_path, f"support:{name}")
    reports = session.reports(checkpoint_seconds=0.0)
    held = [next(reports) for _ in range(GOOD_STEPS // SMALL.num_steps)][-1].policy
    learner = leaves(session.engine.learner)
    policy = (tmp_path / "policy.safetensors").read_bytes()
    step = GOOD_STEPS + (name == "Raises")
    with pytest.raises(ValueError, match=rf"^support:{name}: environment 0 \(seed \d+\), step {step}: {what}") as caught:
        next(reports)
    assert steps_saved(tmp_path) == [BATCH, 2 * BATCH]
    assert (tmp_path / "policy.safetensors").read_bytes() == policy
    assert all(np.array_equal(old, new) for old, new in zip(learner, leaves(session.engine.learner), strict=True))
    assert all(np.isfinite(leaf).all() for leaf in leaves(held.acting))
    if name == "Raises":  # where the user's code went wrong
        assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(StopIteration):
        next(reports)


def test_an_environment_of_old_gym_is_told_how_to_move(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step returned 4 values; this is the API of old Gym\. Port it to Gymnasium"):
        next(sf.iterate(SMALL, "support:OldGym", out=tmp_path))


def test_discrete_actions_that_start_at_five_reach_the_environment_as_such(tmp_path: Path) -> None:
    run = sf.train(SMALL, "support:CountsFromFive", steps=BATCH, out=tmp_path, progress=False, preset=False)
    obs = np.zeros((4, 3), np.float32)
    assert set(run.policy.act(obs, deterministic=False).tolist()) <= {5, 6, 7}
    assert run.evaluate(3).tolist() == run.evaluate(3).tolist()


def test_episodes_of_one_step_that_terminate_and_are_truncated_have_no_future(tmp_path: Path) -> None:
    """With no future and no difference between actions, the critic's target is the reward: nothing is bootstrapped."""
    config = sf.PPO(num_steps=16, minibatch_size=16, epochs=8, hidden=(8,), learning_rate=1e-2, normalise_reward=False)
    session = start(tmp_path, OneStep, 8 * BATCH, config)
    rows = [report.metrics for report in session.reports(checkpoint_seconds=60.0)]
    assert rows[0]["episodes"] == BATCH
    assert rows[-1]["episode_length"] == rows[-1]["episode_return"] == 1.0
    value = jax.vmap(session.engine.learner.critic, (0, None))(np.zeros((1, 3), np.float32), None)
    np.testing.assert_allclose(value, 1.0, atol=0.1)


def test_an_environment_that_never_ends_trains_says_so_and_cannot_hang_an_evaluation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sf.train(SMALL, Endless, steps=2 * BATCH, out=tmp_path)
    assert "no episode yet" in capfd.readouterr().err
    assert {row["episode_return"] for row in metrics(tmp_path)} == {None}
    assert {row["episodes"] for row in metrics(tmp_path)} == {0}
    assert (tmp_path / "curve.png").exists()
    monkeypatch.setattr(evaluate, "MAX_STEPS", 300)
    with pytest.raises(ValueError, match="After 300 steps an episode had still not ended; give the environment a time limit"):
        run.evaluate(2)


@pytest.mark.parametrize("env", ["CartPole-v1", "support:Walk"])
def test_an_update_that_is_not_finite_is_not_taken(env: str, tmp_path: Path) -> None:
    config = sf.PPO(num_steps=16, minibatch_size=16, epochs=2, hidden=(8,), learning_rate=1e30)
    session = start(tmp_path, env, config=config)
    before = leaves(session.engine.learner)
    with pytest.raises(
        sf.NonFiniteError, match=r"Iteration 0 .*(policy_loss|value_loss) = nan.*The step was not taken.*smaller learning_rate"
    ):
        next(session.reports(checkpoint_seconds=60.0))
    after = leaves(session.engine.learner)
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(np.isfinite(leaf).all() for leaf in after)


REPLAY = {"hidden": (8,), "num_steps": 16, "minibatch_size": 16, "replay_size": 1024, "update_to_data": 1 / 16}


@pytest.mark.parametrize("algorithm", [sf.SAC, sf.OffPolicyActorCritic])
@pytest.mark.parametrize("env", ["CartPole-v1", "support:Walk"])
def test_an_update_from_a_replay_that_is_not_finite_is_not_taken(env: str, algorithm: Any, tmp_path: Path) -> None:
    config = algorithm(**REPLAY, learning_starts=BATCH + 1, critic_learning_rate=1e30)
    session = start(tmp_path, env, config=config)
    reports = session.reports(checkpoint_seconds=0.0)
    assert next(reports).metrics["critic_loss"] is None
    before = leaves(session.engine.learner.acting)
    with pytest.raises(
        sf.NonFiniteError,
        match=r"Iteration 1 \(after 128 steps\) was not finite: .* = -?(nan|inf).*The step was not taken.*smaller learning_rate",
    ):
        next(reports)
    after = leaves(session.engine.learner.acting)  # all that is kept
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(np.isfinite(leaf).all() for leaf in after)
    assert steps_saved(tmp_path) == [BATCH]


@pytest.mark.parametrize("name", ["NanObservation", "InfiniteReward"])
def test_a_fault_does_not_reach_a_replay(name: str, tmp_path: Path) -> None:
    session = start(tmp_path, f"support:{name}", config=sf.DQN(**REPLAY, learning_starts=1))
    reports = session.reports(checkpoint_seconds=0.0)
    for _ in range(GOOD_STEPS // 16):
        next(reports)
    before = leaves(session.engine.learner)
    with pytest.raises(ValueError, match=rf"^support:{name}: environment 0 \(seed \d+\), step {GOOD_STEPS}: the (observation|reward) is "):
        next(reports)
    assert all(np.array_equal(old, new) for old, new in zip(before, leaves(session.engine.learner), strict=True))
    assert steps_saved(tmp_path) == [BATCH, 2 * BATCH]


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """A disk that takes no file beyond `largest_file` bytes: the system call then fails as it does when no space is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore:the logs cannot be written")
@pytest.mark.parametrize("largest_file", [0, 1500], ids=["nothing can be written", "checkpoints and logs do not fit"])
def test_a_full_disk_stops_nothing_and_what_it_refused_is_written_later(largest_file: int, tmp_path: Path) -> None:
    sf.train(SMALL, "CartPole-v1", steps=6 * BATCH, out=tmp_path / "whole", progress=False, preset=False)
    run = tmp_path / "run"
    session = start(run, steps=6 * BATCH)
    reports = session.reports(checkpoint_seconds=0.0)
    next(reports)
    with full_disk(largest_file):
        for _ in range(3):
            with pytest.warns(UserWarning, match="what was saved before is intact"):
                next(reports)
    assert steps_saved(run) == [BATCH]
    assert list(run.rglob("*.tmp")) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(reports)) == 2
    assert steps_saved(run) == [5 * BATCH, 6 * BATCH]
    assert bits(run)[0] == bits(tmp_path / "whole")[0]
    assert bits(run)[2] == bits(tmp_path / "whole")[2]  # every line, though some had to wait


@pytest.mark.filterwarnings("ignore:the logs cannot be written")
def test_a_disk_that_is_full_at_the_end_is_an_error_and_a_resume_repeats_what_was_lost(tmp_path: Path) -> None:
    sf.train(SMALL, "CartPole-v1", steps=3 * BATCH, out=tmp_path / "whole", progress=False, preset=False)
    run = tmp_path / "run"
    reports = start(run, steps=3 * BATCH).reports(checkpoint_seconds=0.0)
    next(reports)
    is_warned = pytest.warns(UserWarning, match="what was saved before is intact")
    with full_disk(0), is_warned, pytest.raises(SaveError, match=f"make room, and .* repeats what came after step {BATCH}"):
        list(reports)
    sf.resume(run, progress=False)
    assert bits(run)[::2] == bits(tmp_path / "whole")[::2]


def test_a_curve_that_cannot_be_drawn_does_not_cost_the_run(tmp_path: Path) -> None:
    (tmp_path / "curve.png").mkdir()
    with pytest.warns(UserWarning, match="the learning curve was not drawn"):
        run = sf.train(SMALL, "CartPole-v1", steps=BATCH, out=tmp_path, progress=False, preset=False)
    assert run.policy.act(np.zeros(4, np.float32)) in (0, 1)


def test_a_clock_that_jumps_back_moves_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    sf.train(SMALL, "CartPole-v1", steps=3 * BATCH, out=tmp_path, progress=False, preset=False)
    seconds = [row["time/seconds"] for row in metrics(tmp_path)]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2] < 100
    assert all(row["time/steps_per_second"] > 0 for row in metrics(tmp_path))


def test_counters_go_on_beyond_32_bits(tmp_path: Path) -> None:
    session = start(tmp_path, steps=2**33)
    session.engine.iteration = 2**32 // BATCH
    session.engine.recent.episodes = 2**32
    reports = session.reports(checkpoint_seconds=0.0)
    report = next(reports)
    reports.close()
    assert report.step == 2**32 + BATCH
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 2**32 + BATCH
    assert report.metrics["episodes"] >= 2**32
    resumed = ControlSession.resume(tmp_path)
    assert resumed.engine.step == 2**32 + BATCH
    assert resumed.engine.recent.episodes == report.metrics["episodes"]
    assert next(resumed.reports(checkpoint_seconds=60.0)).step == 2**32 + 2 * BATCH
