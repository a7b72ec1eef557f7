"""Distributions against their definitions: sums over all actions, integrals by quadrature, and scipy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from surefoot.distributions import Categorical, DiagonalGaussian, MultiCategorical, TanhGaussian

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


# TanhGaussian


def random_squashed(seed, dtype=np.float64):
    return TanhGaussian(*random_gaussian(seed, dtype))


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.3, -1.0), (-0.5, 0.7)])
def test_squashed_density_integrates_to_one(x64, mean, log_std):
    distribution = TanhGaussian(jnp.asarray([mean]), jnp.asarray([log_std]))
    nodes, weights = np.polynomial.legendre.leggauss(400)
    # a = sin(x pi / 2) puts nodes where the density is steep, at the ends.
    density = jnp.exp(jax.vmap(distribution.log_prob)(jnp.sin(nodes * np.pi / 2)[:, None]))
    total = np.sum(weights * np.pi / 2 * np.cos(nodes * np.pi / 2) * density)
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


def test_squashed_log_prob_is_the_change_of_variables(x64):
    distribution = random_squashed(0)
    u = np.random.default_rng(2).normal(scale=2, size=(2, 3, 2))
    normal = scipy_normal(DiagonalGaussian(*distribution))
    expected = (normal.logpdf(u) - np.log(1 - np.tanh(u) ** 2)).sum(-1)
    np.testing.assert_allclose(distribution.log_prob(jnp.tanh(u)), expected, rtol=1e-9)
    np.testing.assert_allclose(distribution.mode(), np.tanh(distribution.mean), **EXACT)


def test_squashed_samples_come_with_their_log_prob(x64):
    distribution, key = random_squashed(0), jax.random.key(3)
    action, log_prob = distribution.sample_and_log_prob(key)
    np.testing.assert_array_equal(action, distribution.sample(key))
    np.testing.assert_allclose(log_prob, distribution.log_prob(action), rtol=1e-9)


def test_squashed_samples_have_its_distribution():
    distribution = TanhGaussian(jnp.tile(jnp.asarray([0.4]), (NUM_DRAWS, 1)), jnp.log(jnp.asarray([0.8])))
    samples = np.asarray(distribution.sample(jax.random.key(0)))[:, 0]
    assert scipy.stats.kstest(np.arctanh(samples), scipy.stats.norm(0.4, 0.8).cdf).pvalue > 0.01


def test_gradients_of_squashed_samples_are_finite_differences(x64):
    distribution, key, step = random_squashed(0), jax.random.key(3), 1e-6
    weight = np.random.default_rng(4).normal(size=(2, 3, 2))

    def everything(distribution):  # a function of the action, and the log-probability that entropy bonuses follow
        action, log_prob = distribution.sample_and_log_prob(key)
        return jnp.sum(weight * action**2) + jnp.sum(weight[..., 0] * log_prob)

    gradient = jax.jit(jax.grad(everything))(distribution)
    for field in ("mean", "log_std"):
        numeric = np.empty((2, 3, 2))
        for index in np.ndindex(numeric.shape):
            there, back = (
                everything(distribution._replace(**{field: getattr(distribution, field).at[index].add(move)})) for move in (step, -step)
            )
            numeric[index] = (there - back) / (2 * step)
        np.testing.assert_allclose(getattr(gradient, field), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mean", [-20.0, 20.0])
def test_squashed_log_prob_is_exact_where_actions_are_rounded_to_the_ends(mean, optimised):
    """Single precision, in which tanh(20) is 1, against the same distribution's formula in double precision."""
    distribution, key = TanhGaussian(jnp.full((1,), mean), jnp.log(jnp.full((1,), 0.1))), jax.random.key(0)
    action, log_prob = jax.jit(distribution.sample_and_log_prob, compiler_options=optimised)(key)
    noise = np.float64(jax.random.normal(key, (1,))[0])
    u = mean + 0.1 * noise
    log_slope = np.log(4) - 2 * abs(u) - 2 * np.log1p(np.exp(-2 * abs(u)))  # of 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2
    np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(noise) - np.log(0.1) - log_slope, rtol=1e-6)
    np.testing.assert_array_equal(action, np.sign([mean]))
    gradient = jax.jit(jax.grad(lambda distribution: distribution.sample_and_log_prob(key)[1]))(distribution)
    np.testing.assert_allclose(gradient.mean, [2 * np.sign(mean)], rtol=1e-6)  # 2 tanh(u)
    np.testing.assert_allclose(gradient.log_std, [-1 + 2 * np.sign(mean) * 0.1 * noise], rtol=1e-6)


def test_squashed_actions_at_the_ends_have_finite_log_probs_and_gradients():
    distribution = TanhGaussian(jnp.zeros(2), jnp.zeros(2))

    def log_prob(distribution, action):
        return distribution.log_prob(action)

    value, gradient = jax.value_and_grad(log_prob, argnums=(0, 1))(distribution, jnp.asarray([1.0, -1.0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))
    inside = np.nextafter(np.float32(1), np.float32(0))  # no number is nearer: it is not clipped
    np.testing.assert_array_equal(value, distribution.log_prob(jnp.asarray([inside, -inside])))
    assert distribution.log_prob(jnp.asarray([inside, 0.0])) != distribution.log_prob(jnp.asarray([1 - 2e-7, 0.0], jnp.float32))


def test_squashed_gaussian_takes_one_spread_for_all_rows(x64):
    full, log_std, key = random_squashed(0), jnp.asarray([0.3, -0.7]), jax.random.key(0)
    shared, same = TanhGaussian(full.mean, log_std), TanhGaussian(full.mean, jnp.broadcast_to(log_std, full.mean.shape))
    for one, other in zip(shared.sample_and_log_prob(key), same.sample_and_log_prob(key), strict=True):
        np.testing.assert_array_equal(one, other)


def test_squashed_gaussian_refuses_actions_that_would_broadcast():
    with pytest.raises(ValueError, match=r"action \(3,\), mean \(3, 1\)"):
        TanhGaussian(jnp.zeros((3, 1)), jnp.zeros(1)).log_prob(jnp.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_squashed_gaussian_keeps_the_dtype(x64, dtype):
    distribution = random_squashed(0, dtype)
    action, log_prob = distribution.sample_and_log_prob(jax.random.key(0))
    for array in (action, log_prob, distribution.sample(jax.random.key(0)), distribution.mode(), distribution.log_prob(action)):
        assert array.dtype == dtype
    assert (action.shape, log_prob.shape) == ((2, 3, 2), (2, 3))


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
