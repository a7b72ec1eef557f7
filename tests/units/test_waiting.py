"""Rows that wait for the end of their episode: what is kept, which are complete, against loops over episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from surefoot.types import EnvironmentSpec, Rollout
from surefoot.waiting import Rows, empty_window, join, mean_of_others, rows_of

NUM_ENVS = 3


def spec(observation_space, action_space, **options):
    return EnvironmentSpec("here", observation_space, action_space, NUM_ENVS, **options)


def stream(num_steps, seed=0):
    """Rows whose `reward` numbers them, of episodes of 1 to 9 steps, some ended by a row that NEXT_STEP spends on a reset."""
    rng = np.random.default_rng(seed)
    columns = []
    for n in range(NUM_ENVS):
        column = []
        while len(column) < num_steps:
            length, terminates = rng.integers(1, 10), rng.random() < 0.5
            for time in range(length):
                ended = time == length - 1
                column.append((time, True, ended and terminates, ended and not terminates))
            if n > 0:
                column.append((0, False, False, False))
        columns.append(column[:num_steps])
    time, valid, terminated, truncated = (np.array(x).T for x in zip(*(zip(*column, strict=True) for column in columns), strict=True))
    number = np.arange(num_steps * NUM_ENVS, dtype=np.float32).reshape(num_steps, NUM_ENVS)
    return Rows(
        obs=number[..., None],
        action=number.astype(np.int32),
        action_mask=None,
        reward=number,
        old_log_prob=-number,
        value=2 * number,
        terminated=terminated.astype(bool),
        truncated=truncated.astype(bool),
        valid=valid.astype(bool),
        time=time.astype(np.int32),
    )


def cut(rows, begin, end):
    return jax.tree.map(lambda x: x[begin:end], rows)


def complete_rows(rows, begin, end, window):
    """Numbers of the rows of the episodes that end among rows `begin` to `end` and began at most `window` rows before `begin`."""
    found = set()
    for n in range(NUM_ENVS):
        for t in range(begin, end):
            first = t - rows.time[t, n]
            if rows.valid[t, n] and (rows.terminated[t, n] or rows.truncated[t, n]) and first >= begin - window:
                found |= {float(rows.reward[row, n]) for row in range(first, t + 1)}
    return found


@pytest.mark.parametrize(("window", "batch"), [(8, 5), (8, 1), (3, 4), (1, 12), (0, 6), (30, 5)])
def test_complete_are_the_rows_of_episodes_that_end_now_and_are_here_from_their_beginning(window, batch):
    rows, waiting = stream(120), empty_window(spec(Box(0, 1, (1,)), Discrete(2)), window)
    joining, used_so_far = jax.jit(join), []
    for begin in range(0, 120, batch):
        joined, waiting, complete = joining(waiting, cut(rows, begin, begin + batch))
        assert joined.time.shape == complete.shape == (window + batch, NUM_ENVS)
        assert waiting.time.shape == (window, NUM_ENVS)
        used = np.asarray(joined.reward)[complete]
        assert set(used.tolist()) == complete_rows(rows, begin, begin + batch, window)
        used_so_far += used.tolist()
        for name in ("obs", "action", "old_log_prob", "value", "time"):  # every column goes along
            expected = getattr(rows, name)[begin : begin + batch]
            np.testing.assert_array_equal(getattr(joined, name)[window:], expected, err_msg=name)
        np.testing.assert_array_equal(joined.value, 2 * joined.reward)
        np.testing.assert_array_equal(waiting.reward, np.asarray(joined.reward)[batch:])
    assert len(used_so_far) == len(set(used_so_far))
    if window >= 8:  # enough for every episode of 9 rows
        ended = [np.flatnonzero((rows.terminated | rows.truncated)[:, n])[-1] for n in range(NUM_ENVS)]
        assert len(used_so_far) == sum(int(rows.valid[: last + 1, n].sum()) for n, last in enumerate(ended))


def test_an_episode_whose_stream_began_anew_is_not_joined_to_the_next():
    rows = stream(40)
    time = np.arange(40) - 37  # the last three rows belong to an episode that goes on
    rows = rows._replace(**{name: getattr(rows, name).copy() for name in ("time", "valid", "terminated", "truncated")})
    rows.time[37:], rows.valid[37:] = time[37:, None], True
    rows.terminated[37:], rows.truncated[37:], rows.terminated[36] = False, False, True
    _, waiting, _ = join(empty_window(spec(Box(0, 1, (1,)), Discrete(2)), 8), cut(rows, 0, 40))
    anew = stream(12, seed=1)
    joined, _, complete = join(waiting, anew)
    assert not np.any(complete[:8])
    np.testing.assert_array_equal((joined.terminated | joined.truncated)[7], True)  # so that no sum over episodes goes across
    assert set(np.asarray(joined.reward)[complete].tolist()) == complete_rows(anew, 0, 12, 0)
    going_on = anew._replace(time=anew.time + np.where(np.cumsum(anew.terminated | anew.truncated, axis=0) == 0, 3, 0))
    going_on.time[0] = 3
    joined, _, complete = join(waiting, going_on)
    assert np.all(complete[5:8])
    assert not np.any((joined.terminated | joined.truncated)[5:8])


def test_a_window_has_the_kinds_of_arrays_that_the_rollout_has():
    place = Dict(a=Discrete(3), b=Box(-1, 1, (2,), np.float32))
    window = empty_window(spec(place, Discrete(4, start=1), has_action_mask=True), 5)
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), window.obs) == {"a": ((5, 3), "int32"), "b": ((5, 3, 2), "float32")}
    assert (window.action.shape, window.action.dtype) == ((5, 3), jnp.int32)
    assert (window.action_mask.shape, window.action_mask.dtype) == ((5, 3, 4), bool)
    assert not np.any(window.valid)
    window = empty_window(spec(place, Box(-1, 1, (2, 2))), 5)
    assert (window.action.shape, window.action.dtype, window.action_mask) == ((5, 3, 4), jnp.float32, None)


def test_rows_hold_what_the_rollout_has_and_what_they_are_given():
    rows = stream(6, seed=2)
    same = {name: getattr(rows, name) for name in ("obs", "action", "terminated", "truncated", "valid", "time", "action_mask")}
    rollout = Rollout(**same, reward=rows.reward + 99, final_obs=None, last_obs=None, progress=None)
    log_prob = jnp.where(rows.valid, rows.old_log_prob, jnp.nan)
    made = rows_of(rollout, rows.reward, log_prob, rows.value)
    np.testing.assert_array_equal(made.old_log_prob, np.where(rows.valid, rows.old_log_prob, 0))
    jax.tree.map(np.testing.assert_array_equal, made._replace(old_log_prob=None), rows._replace(old_log_prob=None))
    assert not rows.valid.all()


def test_mean_of_the_other_episodes():
    """Three episodes of 1, 2 and 3 rows; the last row does not count."""
    x, episode = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 99.0]), np.array([0, 1, 1, 2, 2, 2, 3])
    mask = episode < 3
    own_sum, own_count = (np.array([np.sum(y[mask & (episode == k)]) for k in episode]) for y in (x, np.ones(7)))
    mean = mean_of_others(jnp.asarray(x), jnp.asarray(own_sum), jnp.asarray(own_count), jnp.asarray(mask))
    expected = [np.mean(x[mask & (episode != k)]) for k in episode]
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_where_there_is_no_other_episode_the_mean_is_zero():
    x = jnp.asarray([0.1, 0.2, 0.3])
    mean = mean_of_others(x, jnp.full(3, 0.6000001), jnp.full(3, 3.0), jnp.ones(3, bool))
    np.testing.assert_array_equal(mean, 0.0)
