"""Running statistics against NumPy over everything seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from surefoot.normalise import CLIP, EPSILON, Moments, ReturnScale, normalise, observation_normaliser, update_normaliser

CLOSE = {"rtol": 2e-6, "atol": 2e-6}
update_moments = jax.jit(Moments.update)
update_observations = jax.jit(update_normaliser)
update_scale = jax.jit(ReturnScale.update, static_argnames="discount")


def batches(shape, *, num_steps=(5, 5, 5), num_streams=3, seed=0):
    """Batches with means that drift, and about a third of the rows invalid, which hold rubbish."""
    rng = np.random.default_rng(seed)
    for index, steps in enumerate(num_steps):
        valid = rng.random((steps, num_streams)) < 0.7
        x = rng.normal(loc=index, scale=1 + index, size=(steps, num_streams, *shape)).astype(np.float32)
        x[~valid] = rng.choice([1e6, -1e6], size=x[~valid].shape)
        yield x, valid


# Moments


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_moments_are_those_of_everything_valid(shape):
    moments, seen = Moments.start(shape), []
    for x, valid in batches(shape):
        moments = update_moments(moments, x, valid)
        seen.append(x[valid].astype(np.float64))
        everything = np.concatenate(seen)
        np.testing.assert_allclose(moments.mean, everything.mean(0), **CLOSE)
        np.testing.assert_allclose(moments.variance, everything.var(0), **CLOSE)
        assert moments.count == len(everything)
        assert moments.mean.shape == moments.variance.shape == shape
    assert len(seen) == 3


def test_batches_of_different_sizes_are_weighed():
    moments, seen = Moments.start(()), []
    for x, valid in batches((), num_steps=(1, 9), num_streams=4):
        moments = update_moments(moments, x, valid)
        seen.append(x[valid].astype(np.float64))
    np.testing.assert_allclose(moments.mean, np.concatenate(seen).mean(), **CLOSE)
    np.testing.assert_allclose(moments.variance, np.concatenate(seen).var(), **CLOSE)


@pytest.mark.parametrize("has_history", [False, True])
def test_a_batch_without_a_valid_row_changes_nothing(has_history):
    moments = Moments.start((2,))
    if has_history:
        ((x, valid),) = batches((2,), num_steps=(5,))
        moments = update_moments(moments, x, valid)
    rubbish = jnp.asarray([np.nan, np.inf, -np.inf])[:, None, None] * jnp.ones((3, 4, 2))
    after = update_moments(moments, rubbish, jnp.zeros((3, 4), bool))
    for new, old in zip(after, moments, strict=True):
        np.testing.assert_array_equal(new, old)


def test_rubbish_in_invalid_rows_is_never_looked_at():
    ((x, valid),) = batches((2,), num_steps=(5,))
    expected = update_moments(Moments.start((2,)), x, valid)
    x[~valid] = np.nan
    for one, other in zip(update_moments(Moments.start((2,)), x, valid), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_large_offset_does_not_drown_the_variance():
    x = (1e4 + np.random.default_rng(0).normal(size=(64, 4))).astype(np.float32)
    moments = update_moments(Moments.start(()), x, np.ones((64, 4), bool))
    np.testing.assert_allclose(moments.variance, x.astype(np.float64).var(), rtol=1e-3)


# Observations


def test_before_the_first_batch_observations_are_as_they_are():
    normaliser = observation_normaliser(Box(-9.0, 9.0, (3,)))
    obs = jnp.asarray([[0.5, -2.0, 9.0]])
    np.testing.assert_allclose(normalise(normaliser, obs), obs, rtol=1e-7)


def test_observations_become_standard_and_are_clipped():
    normaliser = Moments(jnp.asarray([1.0, -2.0]), jnp.asarray([4.0, 0.25]), jnp.asarray(10.0))
    obs = jnp.asarray([[1.0, -2.0], [3.0, -1.5], [20.9, -7.1], [1000.0, -1000.0]])
    expected = (np.asarray(obs) - [1.0, -2.0]) / np.sqrt(np.array([4.0, 0.25]) + EPSILON)
    assert expected[2, 0] < CLIP < -expected[2, 1]
    np.testing.assert_allclose(normalise(normaliser, obs), np.clip(expected, -CLIP, CLIP), rtol=1e-6)


def test_a_constant_input_stays_finite():
    normaliser = update_observations(Moments.start((1,)), jnp.full((7, 3, 1), 0.1), jnp.ones((7, 3), bool))
    np.testing.assert_allclose(normalise(normaliser, jnp.full((1, 1), 0.1)), 0.0, atol=1e-3)
    np.testing.assert_array_equal(normalise(normaliser, jnp.asarray([[1.0], [-1.0]])), [[CLIP], [-CLIP]])


SPACE = Dict(
    inner=Dict(image=Box(0, 255, (2, 2), np.uint8), speed=Box(-9.0, 9.0, ())), place=Discrete(3), position=Box(-9.0, 9.0, (2,), np.float64)
)


def dictionary(x):
    return {
        "inner": {"image": np.full((*x.shape[:2], 2, 2), 7, np.uint8), "speed": x[..., 0]},
        "place": np.ones(x.shape[:2], np.int32),
        "position": x[..., 1:],
    }


def test_only_the_float_leaves_of_a_dictionary_are_normalised():
    ((x, valid),) = batches((3,), num_steps=(5,))
    obs = dictionary(x)
    start = observation_normaliser(SPACE)
    assert start["place"] is None
    assert start["inner"]["image"] is None
    normaliser = update_observations(start, obs, valid)
    assert normaliser["place"] is normaliser["inner"]["image"] is None
    np.testing.assert_allclose(normaliser["inner"]["speed"].mean, x[valid][:, 0].mean(0, np.float64), **CLOSE)
    np.testing.assert_allclose(normaliser["position"].variance, x[valid][:, 1:].var(0, np.float64), **CLOSE)
    normalised = jax.jit(normalise)(normaliser, obs)
    np.testing.assert_array_equal(normalised["inner"]["image"], obs["inner"]["image"])
    assert normalised["inner"]["image"].dtype == np.uint8
    np.testing.assert_array_equal(normalised["place"], obs["place"])
    np.testing.assert_allclose(normalised["position"], normalise(normaliser["position"], obs["position"]), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(normalised["position"])[valid].mean(0), 0.0, atol=1e-5)


@pytest.mark.parametrize("space", [Box(0, 255, (2,), np.uint8), Discrete(3)])
def test_where_nothing_is_normalised_there_are_no_statistics(space):
    assert observation_normaliser(space) is None
    assert update_normaliser(None, jnp.ones((2, 3, 2)), jnp.ones((2, 3), bool)) is None
    obs = jnp.ones((3, 2), jnp.uint8)
    assert normalise(None, obs) is obs


# Rewards


def discounted_returns(reward, ended, discount):
    """Of each row the discounted sum of the rewards of its episode so far, by definition."""
    result = np.zeros(reward.shape)
    for n in range(reward.shape[1]):
        for t in range(len(reward)):
            begin = max((s + 1 for s in range(t) if ended[s, n]), default=0)
            result[t, n] = sum(discount ** (t - s) * reward[s, n] for s in range(begin, t + 1))
    return result


def test_return_scale_is_the_standard_deviation_of_the_discounted_returns():
    rng = np.random.default_rng(0)
    reward = rng.normal(1.0, 2.0, (12, 3)).astype(np.float32)
    ended = rng.random((12, 3)) < 0.2
    valid = rng.random((12, 3)) < 0.8
    valid[0], ended[~valid], reward[~valid] = True, False, 0.0
    assert ended[:8].any()
    returns = discounted_returns(reward, ended, 0.9)
    scale = ReturnScale.start(3)
    assert scale.scale() == 1
    for first, last in ((0, 4), (4, 8), (8, 12)):  # episodes go on from batch to batch
        rows = slice(first, last)
        scale = update_scale(scale, reward[rows], ended[rows], valid[rows], discount=0.9)
        np.testing.assert_allclose(scale.scale(), returns[:last][valid[:last]].std(), rtol=1e-5)
    np.testing.assert_allclose(scale.running_return, np.where(ended[-1], 0.0, returns[-1]), rtol=1e-5)


def test_a_batch_without_a_valid_row_leaves_the_scale():
    update = functools.partial(update_scale, discount=0.9)
    no, yes = jnp.zeros((3, 2), bool), jnp.ones((3, 2), bool)
    scale = update(ReturnScale.start(2), jnp.arange(6.0).reshape(3, 2), no, yes)
    assert update(scale, jnp.zeros((3, 2)), no, no).scale() == scale.scale()


def test_the_first_reward_of_a_sparse_task_is_not_blown_up():
    """Batches without any reward have no spread, and dividing by none would make values of 10^4 of a reward of 1."""
    zeros, valid = jnp.zeros((3, 2)), jnp.ones((3, 2), bool)
    scale = update_scale(ReturnScale.start(2), zeros, ~valid, valid, discount=0.9)
    assert scale.scale() == 1
    scale = update_scale(scale, zeros.at[2, 0].set(1.0), ~valid, valid, discount=0.9)
    np.testing.assert_allclose(scale.scale(), np.std([1.0] + [0.0] * 11), rtol=1e-6)
