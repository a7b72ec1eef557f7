"""Distributions against their definitions: sums over all actions, integrals by quadrature, and scipy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from surefoot.distributions import Categorical, DiagonalGaussian, MultiCategorical

EXACT = {"rtol": 1e-12, "atol": 1e-12}
NUM_DRAWS = 40_000


def probabilities(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


def random_logits(seed, shape=(2, 3, 4)):
    return np.random.default_rng(seed).normal(scale=2, size=shape)


# Categorical


def test_categorical_against_sums_over_its_actions(x64):
    p, q = (probabilities(random_logits(seed)) for seed in (0, 1))
    one, other = (Categorical.from_logits(jnp.asarray(random_logits(seed))) for seed in (0, 1))
    for action in range(4):
        np.testing.assert_allclose(one.log_prob(jnp.full((2, 3), action)), np.log(p[..., action]), **EXACT)
    np.testing.assert_allclose(one.entropy(), -(p * np.log(p)).sum(-1), **EXACT)
    np.testing.assert_allclose(one.kl_to(other), (p * np.log(p / q)).sum(-1), **EXACT)
    np.testing.assert_allclose(other.kl_to(one), (q * np.log(q / p)).sum(-1), **EXACT)
    np.testing.assert_array_equal(one.mode(), p.argmax(-1))
    assert np.abs(one.kl_to(other) - other.kl_to(one)).min() > 1e-3  # else the direction could not be told


def test_categorical_samples_have_its_probabilities():
    p = probabilities(random_logits(0, (4,)))
    samples = Categorical.from_logits(jnp.tile(random_logits(0, (4,)), (NUM_DRAWS, 1))).sample(jax.random.key(0))
    assert samples.shape == (NUM_DRAWS,)
    frequency = np.bincount(samples, minlength=4) / NUM_DRAWS
    assert (np.abs(frequency - p) < 4 * np.sqrt(p * (1 - p) / NUM_DRAWS)).all()


def test_masked_categorical_is_the_one_of_the_legal_actions(x64):
    legal = np.array([1, 3])
    mask = np.isin(np.arange(4), legal)
    logits, other_logits = jnp.asarray(random_logits(0)), jnp.asarray(random_logits(1))

    def masked(logits):
        return Categorical.from_logits(logits, jnp.broadcast_to(mask, logits.shape))

    def only(logits):
        return Categorical.from_logits(logits[..., legal])

    np.testing.assert_allclose(masked(logits).entropy(), only(logits).entropy(), **EXACT)
    np.testing.assert_allclose(masked(logits).kl_to(masked(other_logits)), only(logits).kl_to(only(other_logits)), **EXACT)
    np.testing.assert_array_equal(masked(logits).mode(), legal[only(logits).mode()])
    np.testing.assert_array_equal(np.exp(masked(logits).log_probs)[..., ~mask], 0.0)
    for index, action in enumerate(legal):
        actions = jnp.full((2, 3), action)
        np.testing.assert_allclose(masked(logits).log_prob(actions), only(logits).log_prob(jnp.full((2, 3), index)), **EXACT)

    def everything(make, action, logits):
        distribution = make(logits)
        log_prob = distribution.log_prob(jnp.full((2, 3), action))
        return jnp.sum(log_prob + 2 * distribution.entropy() + 3 * distribution.kl_to(make(other_logits)))

    gradient = jax.jit(jax.grad(lambda logits: everything(masked, legal[1], logits)))(logits)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(lambda logits: everything(only, 1, logits)))(logits), **EXACT)
    assert not gradient[..., ~mask].any()


def test_a_single_legal_action_is_certain_and_has_finite_gradients():
    mask = jnp.arange(4) == 2
    logits = jnp.asarray(random_logits(0))

    def everything(logits):
        distribution = Categorical.from_logits(logits, jnp.broadcast_to(mask, logits.shape))
        kl = distribution.kl_to(Categorical.from_logits(logits**2, jnp.broadcast_to(mask, logits.shape)))
        return jnp.stack([distribution.log_prob(jnp.full((2, 3), 2)), distribution.entropy(), kl])

    np.testing.assert_array_equal(everything(logits), 0.0)
    np.testing.assert_array_equal(jax.jit(jax.jacrev(everything))(logits), 0.0)
    samples = Categorical.from_logits(jnp.zeros((NUM_DRAWS, 4)), jnp.broadcast_to(mask, (NUM_DRAWS, 4))).sample(jax.random.key(0))
    assert (samples == 2).all()


def test_masked_actions_are_never_sampled_however_likely_they_were():
    logits = jnp.asarray([100.0, 0.0, 0.0, 50.0])
    mask = jnp.asarray([False, True, True, False])
    samples = Categorical.from_logits(jnp.tile(logits, (NUM_DRAWS, 1)), jnp.tile(mask, (NUM_DRAWS, 1))).sample(jax.random.key(1))
    assert set(np.unique(samples).tolist()) == {1, 2}


# MultiCategorical

CHOICES = (3, 2, 4)
JOINT = list(itertools.product(*map(range, CHOICES)))


def multi(seed, mask=None):
    logits = jnp.asarray(random_logits(seed, (2, 3, sum(CHOICES))))
    return MultiCategorical.from_logits(logits, CHOICES, None if mask is None else jnp.broadcast_to(mask, logits.shape))


def joint_probabilities(seed, mask=None):
    """[2, 3, 24] of every vector of choices."""
    weights = np.exp(random_logits(seed, (2, 3, sum(CHOICES)))) * (1 if mask is None else mask)
    parts = [part / part.sum(-1, keepdims=True) for part in np.split(weights, np.cumsum(CHOICES)[:-1], axis=-1)]
    return np.stack([np.prod([part[..., i] for part, i in zip(parts, action, strict=True)], axis=0) for action in JOINT], axis=-1)


@pytest.mark.parametrize("mask", [None, np.array([1, 0, 1, 0, 1, 1, 1, 0, 1], bool)], ids=["all", "masked"])
def test_independent_choices_against_sums_over_all_vectors_of_them(x64, mask):
    p, q = (joint_probabilities(seed, mask) for seed in (0, 1))
    one, other = multi(0, mask), multi(1, mask)
    log_p, log_q = (np.log(np.where(x > 0, x, 1.0)) for x in (p, q))
    for index, action in enumerate(JOINT):
        if p[0, 0, index] > 0:
            np.testing.assert_allclose(one.log_prob(jnp.broadcast_to(jnp.asarray(action), (2, 3, 3))), log_p[..., index], **EXACT)
    np.testing.assert_allclose(one.entropy(), -(p * log_p).sum(-1), **EXACT)
    np.testing.assert_allclose(one.kl_to(other), (p * (log_p - log_q)).sum(-1), **EXACT)
    np.testing.assert_array_equal(one.mode(), np.array(JOINT)[p.argmax(-1)])
    # The Fisher information times a direction of the logits, as the second derivative of the divergence.
    direction = jnp.asarray(random_logits(2, (sum(CHOICES),)))
    at = jnp.asarray(random_logits(0, (sum(CHOICES),)))

    def distribution(step):
        return MultiCategorical.from_logits(at + step * direction, CHOICES, mask)

    here, tangent = jax.jvp(distribution, (0.0,), (1.0,))
    curvature = jnp.vdot(tangent.each.log_probs, here.fisher_metric(tangent).each.log_probs)
    np.testing.assert_allclose(curvature, jax.grad(jax.grad(lambda step: here.kl_to(distribution(step))))(0.0), **EXACT)


def test_independent_choices_are_drawn_with_their_probabilities_and_within_their_own_sizes():
    logits = jnp.tile(random_logits(3, (sum(CHOICES),)), (NUM_DRAWS, 1))
    mask = jnp.tile(jnp.arange(sum(CHOICES)) != 1, (NUM_DRAWS, 1))
    samples = MultiCategorical.from_logits(logits, CHOICES, mask).sample(jax.random.key(0))
    assert samples.shape == (NUM_DRAWS, 3)
    weights = np.exp(np.asarray(logits[0])) * np.asarray(mask[0])
    for choice, part in enumerate(np.split(weights, np.cumsum(CHOICES)[:-1])):
        p = part / part.sum()
        frequency = np.bincount(samples[:, choice], minlength=len(p)) / NUM_DRAWS
        assert frequency.shape == p.shape
        assert (np.abs(frequency - p) <= 4 * np.sqrt(p * (1 - p) / NUM_DRAWS)).all()


def test_independent_choices_refuse_actions_that_would_broadcast():
    with pytest.raises(ValueError, match=r"action \(3,\), choices \(5, 3\)"):
        MultiCategorical.from_logits(jnp.zeros((5, 9)), CHOICES).log_prob(jnp.zeros(3, int))


# DiagonalGaussian


def random_gaussian(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return DiagonalGaussian(jnp.asarray(rng.normal(size=(2, 3, 2)), dtype), jnp.asarray(rng.normal(scale=0.5, size=(2, 3, 2)), dtype))


def scipy_normal(gaussian):
    return scipy.stats.norm(np.asarray(gaussian.mean), np.exp(np.asarray(gaussian.log_std)))


def expectation_under(gaussian, function):
    """By Gauss-Hermite quadrature, exact for polynomials such as these; per dimension."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    normal = scipy_normal(gaussian)
    return sum(weight * function(normal.mean() + normal.std() * node) for node, weight in zip(nodes, weights / weights.sum(), strict=True))


def test_gaussian_against_scipy_and_quadrature(x64):
    one, other = random_gaussian(0), random_gaussian(1)
    p, q = scipy_normal(one), scipy_normal(other)
    action = np.random.default_rng(2).normal(size=(2, 3, 2))
    np.testing.assert_allclose(one.log_prob(jnp.asarray(action)), p.logpdf(action).sum(-1), **EXACT)
    np.testing.assert_allclose(one.entropy(), p.entropy().sum(-1), **EXACT)
    np.testing.assert_allclose(one.kl_to(other), expectation_under(one, lambda x: p.logpdf(x) - q.logpdf(x)).sum(-1), **EXACT)
    np.testing.assert_allclose(other.kl_to(one), expectation_under(other, lambda x: q.logpdf(x) - p.logpdf(x)).sum(-1), **EXACT)
    assert np.abs(one.kl_to(other) - other.kl_to(one)).min() > 1e-3
    np.testing.assert_array_equal(one.mode(), one.mean)


def test_gaussian_samples_have_its_mean_and_spread():
    mean, log_std = jnp.asarray([1.0, -3.0]), jnp.log(jnp.asarray([2.0, 0.1]))
    samples = np.asarray(DiagonalGaussian(jnp.tile(mean, (NUM_DRAWS, 1)), log_std).sample(jax.random.key(0)))
    for dimension in range(2):
        normal = scipy.stats.norm(mean[dimension], np.exp(log_std[dimension]))
        assert scipy.stats.kstest(samples[:, dimension], normal.cdf).pvalue > 0.01
    assert abs(np.corrcoef(samples.T)[0, 1]) < 4 / np.sqrt(NUM_DRAWS)


def test_gaussian_takes_one_spread_for_all_rows(x64):
    full, log_std = random_gaussian(0), jnp.asarray([0.3, -0.7])
    shared = DiagonalGaussian(full.mean, log_std)
    same = DiagonalGaussian(full.mean, jnp.broadcast_to(log_std, full.mean.shape))
    for measure in (lambda d: d.entropy(), lambda d: d.log_prob(full.mean + 1), lambda d: d.kl_to(full), lambda d: full.kl_to(d)):
        np.testing.assert_array_equal(measure(shared), measure(same))
    np.testing.assert_array_equal(shared.sample(jax.random.key(0)), same.sample(jax.random.key(0)))


def test_gaussian_refuses_actions_that_would_broadcast():
    with pytest.raises(ValueError, match=r"action \(3,\), mean \(3, 1\)"):
        DiagonalGaussian(jnp.zeros((3, 1)), jnp.zeros(1)).log_prob(jnp.zeros(3))


# All of them


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", ["categorical", "masked", "multi", "gaussian"])
def test_the_dtype_is_kept_and_there_is_one_number_for_each_action(x64, kind, dtype):
    if kind == "gaussian":
        distribution = random_gaussian(0, dtype)
        actions = distribution.sample(jax.random.key(0))
        assert actions.dtype == dtype
    elif kind == "multi":
        distribution = MultiCategorical.from_logits(jnp.asarray(random_logits(0, (2, 3, 9)), dtype), CHOICES)
        actions = distribution.sample(jax.random.key(0))
    else:
        mask = jnp.ones((2, 3, 4), bool) if kind == "masked" else None
        distribution = Categorical.from_logits(jnp.asarray(random_logits(0), dtype), mask)
        actions = distribution.sample(jax.random.key(0))
    for number in (distribution.log_prob(actions), distribution.entropy(), distribution.kl_to(distribution)):
        assert (number.dtype, number.shape) == (dtype, (2, 3))
    assert actions.shape == distribution.mode().shape


@pytest.mark.parametrize("make", [lambda seed: Categorical.from_logits(jnp.asarray(random_logits(seed))), random_gaussian])
def test_kl_is_zero_to_itself_in_value_and_gradient(x64, make):
    distribution = make(0)
    assert not distribution.kl_to(distribution).any()
    gradient = jax.grad(lambda moved: jnp.sum(distribution.kl_to(moved)))(distribution)
    if isinstance(distribution, Categorical):  # of unnormalised log-probabilities it is -p, which normalising removes
        gradient = jax.grad(lambda logits: jnp.sum(distribution.kl_to(Categorical.from_logits(logits))))(distribution.log_probs)
    assert all(np.abs(leaf).max() < 1e-15 for leaf in jax.tree.leaves(gradient))
