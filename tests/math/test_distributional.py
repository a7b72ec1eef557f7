"""Projection and losses of return distributions against plain loops, and what defines them (Q6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.distributional import categorical_cross_entropy, categorical_projection, quantile_huber_loss

pytestmark = pytest.mark.x64

SUPPORT = np.linspace(-1.0, 2.0, 7)  # spacing 1/2


def random_probability(shape, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), size=shape[:-1])


def projected_by_a_loop(probability, atom):
    """Atom after atom onto its two neighbours, as in algorithm 1 of the paper."""
    result = np.zeros_like(probability)
    for *row, j in np.ndindex(probability.shape):
        place = (min(max(atom[(*row, j)], SUPPORT[0]), SUPPORT[-1]) - SUPPORT[0]) / 0.5
        lower = min(int(place), len(SUPPORT) - 2)
        result[(*row, lower)] += probability[(*row, j)] * (lower + 1 - place)
        result[(*row, lower + 1)] += probability[(*row, j)] * (place - lower)
    return result


def test_projection_is_that_of_a_loop_over_atoms():
    probability, atom = random_probability((4, 5, 7)), np.random.default_rng(1).normal(scale=2, size=(4, 5, 7))
    assert (atom < SUPPORT[0]).any()
    assert (atom > SUPPORT[-1]).any()
    result = compiled(categorical_projection, probability, atom, SUPPORT)
    np.testing.assert_allclose(result, projected_by_a_loop(probability, atom), **TOLERANCE)
    np.testing.assert_allclose(np.sum(result, axis=-1), 1.0, **TOLERANCE)


def test_projection_keeps_the_mean_of_what_the_support_spans():
    probability, support = random_probability((50, 7)), SUPPORT
    atom = np.random.default_rng(1).uniform(-0.2, 0.4, (50, 1)) + 0.8 * support
    result = compiled(categorical_projection, probability, atom, support)
    np.testing.assert_allclose(result @ support, np.sum(probability * atom, axis=-1), **TOLERANCE)


def test_an_atom_on_a_point_of_the_support_stays_there():
    probability = random_probability((3, 7))
    np.testing.assert_allclose(compiled(categorical_projection, probability, np.tile(SUPPORT, (3, 1)), SUPPORT), probability, **TOLERANCE)
    shifted = compiled(categorical_projection, probability, np.tile(SUPPORT + 1.0, (3, 1)), SUPPORT)
    expected = np.pad(probability[:, :4], ((0, 0), (2, 0)))
    np.testing.assert_allclose(shifted, np.c_[expected, probability[:, 4:].sum(-1)], **TOLERANCE)


def test_all_beyond_an_end_goes_to_that_end():
    probability = random_probability((2, 7))
    atom = np.array([[-np.inf, *[-5.0] * 6], [*[7.0] * 6, np.inf]])
    expected = np.zeros((2, 7))
    expected[0, 0] = expected[1, -1] = 1.0
    np.testing.assert_allclose(compiled(categorical_projection, probability, atom, SUPPORT), expected, **TOLERANCE)


def test_terminated_rows_put_everything_at_the_reward():
    probability, reward = random_probability((1, 7)), 0.7
    expected = [[0, 0, 0, 0.6, 0.4, 0, 0]]
    np.testing.assert_allclose(compiled(categorical_projection, probability, np.full((1, 7), reward), SUPPORT), expected, **TOLERANCE)


def test_projection_of_a_usual_support_conserves_mass_in_single_precision():
    support = np.linspace(-10, 10, 51, dtype=np.float32)
    probability = random_probability((200, 51)).astype(np.float32)
    atom = np.random.default_rng(1).uniform(-3, 3, (200, 1)).astype(np.float32) + np.float32(0.99) * support
    result = np.asarray(compiled(categorical_projection, probability, atom, support))
    np.testing.assert_allclose(result.sum(-1), probability.sum(-1), rtol=1e-6)


def test_cross_entropy_is_least_where_the_distributions_agree():
    target, other = random_probability((4, 7)), random_probability((4, 7), 1)
    entropy = -np.sum(target * np.log(target), axis=-1)
    np.testing.assert_allclose(compiled(categorical_cross_entropy, np.log(target), target), entropy, **TOLERANCE)
    difference = compiled(categorical_cross_entropy, np.log(other), target) - entropy
    np.testing.assert_allclose(difference, np.sum(target * np.log(target / other), axis=-1), **TOLERANCE)
    gradient = compiled(jax.grad(lambda logits: jnp.sum(categorical_cross_entropy(jax.nn.log_softmax(logits), target))), np.log(other))
    np.testing.assert_allclose(gradient, other - target, **TOLERANCE)


def test_cross_entropy_ignores_what_neither_distribution_allows():
    log_probability, target = np.log([0.5, 0.5, 1.0]) + np.array([0, 0, -np.inf]), np.array([0.25, 0.75, 0.0])
    loss, gradient = compiled(jax.value_and_grad(categorical_cross_entropy), log_probability, target)
    np.testing.assert_allclose(loss, np.log(2), **TOLERANCE)
    np.testing.assert_allclose(gradient, [-0.25, -0.75, 0.0], **TOLERANCE)


def quantile_loss_by_loops(quantile, target, delta):
    loss = 0.0
    for i, q in enumerate(quantile):
        for t in target:
            error = t - q
            size = error**2 / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)
            loss += abs((i + 0.5) / len(quantile) - (error < 0)) * size / delta / len(target)
    return loss


@pytest.mark.parametrize("delta", [0.3, 1.0, 2.0])
def test_quantile_loss_is_a_double_loop(delta):
    rng = np.random.default_rng(0)
    quantile, target = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 8))
    expected = [[quantile_loss_by_loops(quantile[i, j], target[i, j], delta) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(compiled(quantile_huber_loss, quantile, target, delta=delta), expected, **TOLERANCE)


def test_true_quantiles_are_stationary_as_delta_vanishes():
    """Six equally likely outcomes, K = 3: any point between the neighbours of tau_i is a quantile, here taken strictly between."""
    outcome = np.array([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0])  # cumulative probability i / 6 between outcomes; tau = 1/6, 1/2, 5/6
    slope = jax.grad(lambda quantile: quantile_huber_loss(quantile, outcome, delta=1e-9))
    np.testing.assert_allclose(compiled(slope, np.array([-2.0, 0.2, 4.0])), 0.0, **TOLERANCE)
    # Above a quantile the loss rises, below it it falls, by the probability that was crossed.
    np.testing.assert_allclose(compiled(slope, np.array([-0.5, 1.0, 8.0])), 1 / 6, **TOLERANCE)
    np.testing.assert_allclose(compiled(slope, np.array([-4.0, -0.5, 1.0])), -1 / 6, **TOLERANCE)


def test_descent_on_the_quantile_loss_finds_the_quantiles():
    outcome = np.array([5.0, -3.0, 0.0, 1.0])  # as many quantiles as outcomes: each is one of them

    def step(_, quantile):
        return quantile - 0.01 * jax.grad(quantile_huber_loss)(quantile, outcome, delta=1e-6)

    found = compiled(lambda start: jax.lax.fori_loop(0, 5000, step, start), np.zeros(4))
    np.testing.assert_allclose(found, np.sort(outcome), atol=0.01)


def test_no_gradient_reaches_targets():
    probability = random_probability((3, 7))

    def everything(atom, probability, target):
        projected = categorical_projection(probability, atom, jnp.asarray(SUPPORT))
        losses = categorical_cross_entropy(jnp.log(jnp.full((3, 7), 1 / 7)), probability) + quantile_huber_loss(jnp.zeros((3, 5)), target)
        return jnp.sum(jnp.square(projected)) + jnp.sum(losses)

    for gradient in compiled(jax.grad(everything, argnums=(0, 1, 2)), 0.9 * np.tile(SUPPORT, (3, 1)), probability, np.ones((3, 8))):
        np.testing.assert_array_equal(gradient, 0.0)


def test_supports_and_batches_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"support \(6,\), atoms_of_one_row \(7,\)"):
        categorical_projection(jnp.ones((3, 7)), jnp.ones((3, 7)), jnp.ones(6))
    with pytest.raises(ValueError, match=r"support \(3, 7\), atoms_of_one_row \(7,\)"):
        categorical_projection(jnp.ones((3, 7)), jnp.ones((3, 7)), jnp.ones((3, 7)))
    with pytest.raises(ValueError, match=r"probability \(7,\), atom \(3, 7\)"):
        categorical_projection(jnp.ones(7), jnp.ones((3, 7)), jnp.ones(7))
    with pytest.raises(ValueError, match=r"first_quantile \(3,\), first_target \(3, 1\)"):
        quantile_huber_loss(jnp.ones((3, 5)), jnp.ones((3, 1, 5)))
