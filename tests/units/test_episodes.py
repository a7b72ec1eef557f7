"""Episodes against loops over rows; seeds by name."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.training.episodes import Ended, Recent, Running, follow
from surefoot.training.seeding import key_for, seed_for
from surefoot.types import Rollout

DISCOUNT = 0.9
follow = jax.jit(follow, static_argnames="discount")


def story(num_steps, num_streams, seed=0):
    """Reward, terminated, truncated, valid and time of streams in which a row is spent on some of the resets."""
    rng = np.random.default_rng(seed)
    shape = num_steps, num_streams
    reward = rng.normal(size=shape).astype(np.float32)
    terminated, truncated = rng.random((2, *shape)) < 0.25
    valid, time = np.ones(shape, bool), np.zeros(shape, np.int32)
    for n in range(num_streams):
        for t in range(1, num_steps):
            ended = terminated[t - 1, n] or truncated[t - 1, n]
            if ended and rng.random() < 0.5:
                valid[t, n] = terminated[t, n] = truncated[t, n] = False
                reward[t, n] = 1e6
            time[t, n] = 0 if ended or not valid[t - 1, n] else time[t - 1, n] + 1
    terminated[~valid] = True
    return reward, terminated, truncated, valid, time


def rows_of(columns, rows, **games):
    reward, terminated, truncated, valid, time = (column[rows] for column in columns)
    unused = dict.fromkeys(("obs", "action", "final_obs", "last_obs", "progress"))
    games = {name: column[rows] for name, column in games.items()}
    return Rollout(reward=reward, terminated=terminated, truncated=truncated, valid=valid, time=time, **unused, **games)


def batches_of(columns, **games):
    """What `follow` makes of a story in batches of 8 rows."""
    running, batches = Running.start(columns[0].shape[1]), []
    for begin in range(0, len(columns[0]), 8):
        running, ended = follow(running, rows_of(columns, slice(begin, begin + 8), **games), discount=DISCOUNT)
        batches.append(ended)
    return Ended(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


def test_episodes_are_followed_across_batches():
    num_steps, num_streams = 24, 3
    columns = reward, terminated, truncated, valid, _ = story(num_steps, num_streams)
    assert (terminated & truncated).any()
    assert (~valid).any()
    expected = {}
    for n in range(num_streams):
        rewards = []
        for t in range(num_steps):
            if not valid[t, n]:
                continue
            rewards.append(float(reward[t, n]))
            if terminated[t, n] or truncated[t, n]:
                expected[t, n] = sum(rewards), sum(DISCOUNT**k * r for k, r in enumerate(rewards)), len(rewards)
                rewards = []
    ended = batches_of(columns)
    np.testing.assert_array_equal(ended.here, ended.learned)
    assert {tuple(index) for index in np.argwhere(ended.here).tolist()} == expected.keys()
    assert any(t // 8 != (t - length + 1) // 8 for (t, _), (_, _, length) in expected.items())
    for row, outcome in expected.items():
        np.testing.assert_allclose([column[row] for column in ended[2:]], outcome, rtol=1e-5, atol=1e-6)


def test_running_sums_are_those_of_the_unfinished():
    columns = reward, _, truncated, valid, time = [np.zeros((3, 2), kind) for kind in (np.float32, bool, bool, bool, np.int32)]
    reward[:], valid[:], time[:] = [[1, 2], [3, 4], [5, 6]], True, [[4, 0], [5, 1], [6, 0]]
    truncated[1, 1] = True
    start = Running(jnp.asarray([10.0, 0.0]), jnp.asarray([100.0, 0.0]), jnp.asarray([4, 0]))
    running, _ = follow(start, rows_of(columns, slice(None)), discount=0.5)
    np.testing.assert_allclose(running.episode_return, [19.0, 6.0])
    np.testing.assert_allclose(running.discounted_return, [100 + 1 / 16 + 3 / 32 + 5 / 64, 6.0])
    assert running.length.tolist() == [7, 1]


def test_games_are_counted_whole_and_what_is_learned_from_as_it_was_learned():
    """A game is several of the learner's episodes, and its score is not the reward."""
    columns = reward, terminated, truncated, valid, _ = story(24, 3, seed=1)
    rng = np.random.default_rng(2)
    game_over, score = (terminated | truncated) & (rng.random(reward.shape) < 0.4), rng.normal(size=reward.shape).astype(np.float32)
    ended, lives = batches_of(columns, game_over=game_over, score=score), batches_of(columns)
    for plain, games in zip((lives.here, lives.discounted_return), (ended.learned, ended.discounted_return), strict=True):
        np.testing.assert_array_equal(plain, games)
    expected = {}
    for n in range(3):
        scores = []
        for t in np.flatnonzero(valid[:, n]).tolist():
            scores.append(float(score[t, n]))
            if game_over[t, n]:
                expected[t, n] = sum(scores), len(scores)
                scores = []
    assert {tuple(index) for index in np.argwhere(ended.here).tolist()} == expected.keys()
    assert 0 < ended.here.sum() < ended.learned.sum()
    for row, outcome in expected.items():
        np.testing.assert_allclose((ended.episode_return[row], ended.length[row]), outcome, rtol=1e-5, atol=1e-6)
    metrics = Recent().take(ended)
    assert metrics["episodes"] == len(expected)
    assert metrics["discounted_return"] == pytest.approx(float(ended.discounted_return[ended.learned].mean()))


def ended(returns, discounted, lengths):
    """A batch of one stream whose every second row ends an episode."""

    def column(values):
        return np.array([[value] for pair in zip(np.full(len(values), -99), values, strict=True) for value in pair])

    here = column(np.ones(len(returns))) == 1
    return Ended(here, here, column(returns), column(discounted), column(lengths))


def test_recent_counts_and_averages():
    recent = Recent()
    first = recent.take(ended([], [], []))
    assert first == {
        "episodes": 0,
        "episode_return": None,
        "episode_length": None,
        "discounted_return": None,
        "realised_improvement": None,
        "realised_improvement_error": None,
    }
    second = recent.take(ended([1.0, 2.0, 6.0], [0.5, 1.0, 3.0], [4, 5, 9]))
    assert second == first | {"episodes": 3, "episode_return": 3.0, "episode_length": 6.0, "discounted_return": 1.5}
    assert recent.take(ended([], [], [])) == second | {"discounted_return": None}


def test_realised_improvement_is_the_difference_of_batches_and_its_error():
    recent = Recent()
    one, other = np.array([0.5, 1.0, 3.0]), np.array([2.0, 5.0])
    recent.take(ended(one, one, [1] * 3))
    recent.take(ended([], [], []))  # without an episode there is nothing to compare, and the comparison waits
    metrics = recent.take(ended(other, other, [1] * 2))
    assert metrics["realised_improvement"] == pytest.approx(other.mean() - one.mean(), rel=1e-12)
    error = math.sqrt(one.var(ddof=1) / 3 + other.var(ddof=1) / 2)
    assert metrics["realised_improvement_error"] == pytest.approx(error, rel=1e-12)
    alone = recent.take(ended([7.0], [7.0], [1]))
    assert alone["realised_improvement"] == pytest.approx(7.0 - other.mean())
    assert math.isnan(alone["realised_improvement_error"])


def test_recent_forgets_all_but_a_hundred():
    recent = Recent()
    for batch in np.arange(120.0).reshape(4, 30):
        metrics = recent.take(ended(batch, batch, batch.astype(int)))
    assert metrics["episodes"] == 120
    assert metrics["episode_return"] == metrics["episode_length"] == np.arange(20, 120).mean()


@pytest.mark.parametrize("batches", [[], [[1.0, 2.5]], [[4.0]], [[1.0, 2.0], []]])
def test_recent_survives_json(batches):
    recent, copy = Recent(), Recent()
    for batch in batches:
        recent.take(ended(batch, batch, [3] * len(batch)))
    copy.restore(json.loads(json.dumps(recent.to_json())))
    following = ended([5.0, 7.5], [0.1, 0.2], [8, 9])
    np.testing.assert_equal(copy.take(following), recent.take(following))
    assert copy.to_json() == recent.to_json()


# Seeds


def test_every_component_has_its_own_generator():
    names, seeds = ["parameters", "acting", "updating", "environment", "evaluation"], [0, 1, 2**32 - 1]
    keys = {tuple(jax.random.key_data(key_for(seed, name)).tolist()) for name in names for seed in seeds}
    numbers = {seed_for(seed, name) for name in names for seed in seeds}
    assert len(keys) == len(numbers) == len(names) * len(seeds)


def test_generators_do_not_change_between_versions():
    """Every number of every run hangs on these."""
    assert jax.random.key_data(key_for(0, "acting")).tolist() == [807673402, 1388497533]
    assert seed_for(0, "environment") == 3880469095


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_seeds_that_would_wrap_around_are_refused(seed):
    with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\^32\), got {seed}"):
        key_for(seed, "acting")
