"""Epochs of minibatches: who is in which, when they end, and what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.algorithms.ppo import PPO
from surefoot.minibatches import check_minibatch, descend, sequence_length, shuffled

NUM_STEPS, NUM_ENVS = 6, 4
SIZE = NUM_STEPS * NUM_ENVS
TRANSITIONS = {"index": np.arange(SIZE).reshape(NUM_STEPS, NUM_ENVS), "pair": np.arange(2 * SIZE).reshape(NUM_STEPS, NUM_ENVS, 2)}


def record(*, epochs, minibatch_size, seed=0, limit=None):
    """(order [steps, minibatch] in which the transitions came, metrics)."""
    num_steps = epochs * SIZE // minibatch_size

    def step(carry, minibatch):
        seen, count = carry
        assert minibatch["pair"].shape == (1, minibatch_size, 2)
        minibatch = jax.tree.map(lambda x: x[0], minibatch)
        seen = seen.at[count].set(minibatch["index"] + 1000 * (minibatch["pair"][:, 0] != 2 * minibatch["index"]))
        return (seen, count + 1), {"step": count.astype(float), "first": minibatch["index"][0]}

    @jax.jit
    def run(key, transitions):
        start = jnp.full((num_steps, minibatch_size), -1), jnp.zeros((), int)
        go_on = {} if limit is None else {"go_on": lambda metrics: metrics["step"] < limit}
        return descend(step, start, transitions, key, epochs=epochs, minibatch_size=minibatch_size, **go_on)

    (seen, _), metrics = run(jax.random.key(seed), TRANSITIONS)
    return np.asarray(seen), metrics


@pytest.mark.parametrize("minibatch_size", [1, 6, SIZE])
def test_every_epoch_sees_every_transition_once_and_whole_in_a_new_order(minibatch_size):
    seen, metrics = record(epochs=3, minibatch_size=minibatch_size)
    epochs = seen.reshape(3, SIZE)
    np.testing.assert_array_equal(np.sort(epochs, axis=-1), np.broadcast_to(np.arange(SIZE), (3, SIZE)))
    assert len({tuple(order) for order in [*epochs, np.arange(SIZE)]}) == 4
    assert metrics["epochs"] == 3


def test_sequences_are_rows_of_one_stream_one_after_another():

    def step(carry, minibatch):
        count, _ = carry
        assert minibatch["pair"].shape == (3, 4, 2)
        return (count + 1, minibatch["index"]), {"none": jnp.zeros(())}

    @jax.jit
    def last_minibatch(key, transitions):
        start = jnp.zeros((), int), jnp.zeros((3, 4), int)
        return descend(step, start, transitions, key, epochs=1, minibatch_size=12, length=3)[0]

    beginnings = set()
    for seed in range(4):
        count, index = last_minibatch(jax.random.key(seed), TRANSITIONS)
        assert count == 2
        for sequence in np.asarray(index).T:
            assert np.diff(sequence).tolist() == [NUM_ENVS, NUM_ENVS]
            assert sequence[0] // NUM_ENVS in (0, 3)
        beginnings.add(tuple(sorted(index[0].tolist())))
    assert len(beginnings) > 1


@pytest.mark.parametrize(("num_steps", "minibatch_size", "name"), [(9, 6, "minibatch_size=6"), (6, 12, "num_steps=6")])
def test_sequences_must_fit_batch_and_minibatch(num_steps, minibatch_size, name):
    settings = {"num_steps": num_steps, "minibatch_size": minibatch_size, "sequence_length": 9 if num_steps == 9 else 4}
    with pytest.raises(ValueError, match=f"does not divide {name}; choose a divisor of both"):
        PPO(**settings, memory="gru")
    assert sequence_length(PPO(**settings)) == 1
    assert sequence_length(PPO(num_steps=6, minibatch_size=12, sequence_length=3, memory="gru")) == 3


def test_the_order_follows_from_the_key():
    seen, again, other = (record(epochs=2, minibatch_size=8, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(seen, again)
    assert np.any(seen != other)


def test_the_last_epochs_metrics_are_means_over_its_minibatches():
    seen, metrics = record(epochs=3, minibatch_size=8)
    assert metrics["step"] == np.mean([6, 7, 8])
    np.testing.assert_allclose(metrics["first"], np.mean(seen[6:, 0]), rtol=1e-6)


@pytest.mark.parametrize(("limit", "epochs"), [(0.5, 1), (3.0, 2), (4.5, 3), (99.0, 5)])
def test_epochs_end_after_the_one_whose_mean_metrics_say_so(limit, epochs):
    """The mean step of the epochs is 1, 4, 7, 10, 13."""
    seen, metrics = record(epochs=5, minibatch_size=8, limit=limit)
    assert metrics["epochs"] == epochs
    assert metrics["step"] == 3 * epochs - 2
    assert np.sum(seen[:, 0] >= 0) == 3 * epochs


class Settings:
    num_steps, minibatch_size = 6, 8


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    check_minibatch(Settings, 4)
    with pytest.raises(ValueError, match=r"minibatch_size=8 does not divide the batch of 6 steps x 5 environments = 30 transitions"):
        check_minibatch(Settings, 5)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 2048])
def test_a_shuffle_holds_every_number_once(size):
    orders = jax.vmap(lambda key: shuffled(key, size))(jax.random.split(jax.random.key(0), 8))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.broadcast_to(np.arange(size), (8, size)))


def test_every_order_is_as_likely_as_any_other():
    orders = np.asarray(jax.vmap(lambda key: shuffled(key, 4))(jax.random.split(jax.random.key(0), 24_000)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.sum((counts - 1000) ** 2 / 1000) < 49.7  # chi-squared with 23 degrees of freedom, one in a thousand above
