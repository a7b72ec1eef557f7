"""Exact divergences against sums and integrals, and what the sampled estimators estimate: value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.divergences import adaptive_kl_coefficient, categorical_kl, gaussian_kl, kl_k1, kl_k2, kl_k3, proportional_kl_coefficient

pytestmark = pytest.mark.x64

LOGITS, REF_LOGITS = np.array([0.5, -1.0, 1.2, 0.1]), np.array([-1.5, 1.0, 0.2, 1.5])


@jax.jit
def log_policy(logits):
    return jax.nn.log_softmax(jnp.asarray(logits))


def test_categorical_kl_is_the_sum_over_actions():
    log_p, log_q = np.asarray(log_policy(np.stack([LOGITS, REF_LOGITS]))), np.asarray(log_policy(np.stack([REF_LOGITS, LOGITS])))
    expected = [sum(np.exp(p) * (p - q) for p, q in zip(*rows, strict=True)) for rows in zip(log_p, log_q, strict=True)]
    assert abs(expected[0] - expected[1]) > 0.01  # the two directions differ
    np.testing.assert_allclose(categorical_kl(log_p, log_q), expected, **TOLERANCE)


@pytest.mark.parametrize("masked", [-np.inf, -1e9])
def test_categorical_kl_of_masked_actions_is_that_of_the_rest(masked):
    mask = np.array([True, False, True, True])

    def kl(logits, ref_logits):
        return categorical_kl(log_policy(jnp.where(mask, logits, masked)), log_policy(jnp.where(mask, ref_logits, masked)))

    def rest(logits, ref_logits):
        return categorical_kl(log_policy(logits[mask]), log_policy(ref_logits[mask]))

    def derivatives(f):
        functions = f, jax.grad(f, 0), jax.grad(f, 1), jax.hessian(f, 0), jax.hessian(f, 1)
        return compiled(lambda *logits: [function(*logits) for function in functions], LOGITS, REF_LOGITS)

    for result, expected in zip(derivatives(kl), derivatives(rest), strict=True):
        np.testing.assert_allclose(result, expected, **TOLERANCE)


def test_categorical_kl_is_infinite_only_where_q_is_zero_and_p_is_not():
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log([0.5, 0.5, 0.0]), np.log([0.2, 0.3, 0.5])
    assert categorical_kl(log_q, log_p) == np.inf
    np.testing.assert_allclose(categorical_kl(log_p, log_q), 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.3), **TOLERANCE)


def test_gaussian_kl_is_the_integral():
    mean_p, log_std_p, mean_q, log_std_q = 0.3, -0.4, -0.5, 0.2
    x = np.linspace(mean_p - 12, mean_p + 12, 20001)

    def log_density(mean, log_std):
        return -0.5 * ((x - mean) * np.exp(-log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)

    log_p, log_q = log_density(mean_p, log_std_p), log_density(mean_q, log_std_q)
    expected = np.sum(np.exp(log_p) * (log_p - log_q)) * (x[1] - x[0])
    np.testing.assert_allclose(gaussian_kl(mean_p, log_std_p, mean_q, log_std_q), expected, **TOLERANCE)
    assert gaussian_kl(mean_p, log_std_p, mean_p, log_std_p) == 0.0


def test_small_gaussian_kl_survives_float32():
    shift = jnp.float32(1e-4)
    zero = jnp.zeros((), jnp.float32)
    np.testing.assert_allclose(gaussian_kl(shift, zero, zero, zero), 0.5e-8, rtol=1e-5)
    np.testing.assert_allclose(gaussian_kl(zero, shift, zero, zero), 1e-8, rtol=1e-2)


def expected_under_policy(estimator):
    """The estimator's expectation, and its expected gradient with respect to the logits of the policy that is sampled."""
    prob, ref = jnp.exp(log_policy(LOGITS)), log_policy(REF_LOGITS)

    def mean(logits):
        return jax.lax.stop_gradient(prob) @ estimator(log_policy(logits), ref)

    return jax.jit(jax.value_and_grad(mean))(jnp.asarray(LOGITS))


@jax.jit
def forward(logits):
    return categorical_kl(log_policy(logits), log_policy(REF_LOGITS))


@jax.jit
def backward(logits):
    return categorical_kl(log_policy(REF_LOGITS), log_policy(logits))


def test_k1_is_unbiased_and_has_no_gradient():
    value, gradient = expected_under_policy(kl_k1)
    np.testing.assert_allclose(value, forward(LOGITS), **TOLERANCE)
    np.testing.assert_allclose(gradient, 0.0, **TOLERANCE)


def test_k2_is_biased_and_has_the_right_gradient():
    value, gradient = expected_under_policy(kl_k2)
    assert abs(value - forward(LOGITS)) > 0.01
    np.testing.assert_allclose(gradient, jax.grad(forward)(LOGITS), **TOLERANCE)


def test_k3_is_unbiased_and_has_the_gradient_of_the_other_direction():
    value, gradient = expected_under_policy(kl_k3)
    np.testing.assert_allclose(value, forward(LOGITS), **TOLERANCE)
    np.testing.assert_allclose(gradient, jax.grad(backward)(LOGITS), **TOLERANCE)


def test_estimators_sample_by_sample():
    log_prob, ref_log_prob = np.log([0.4, 0.1]), np.log([0.2, 0.3])
    np.testing.assert_allclose(kl_k1(log_prob, ref_log_prob), np.log([2.0, 1 / 3]), **TOLERANCE)
    np.testing.assert_allclose(kl_k2(log_prob, ref_log_prob), 0.5 * np.log([2.0, 3.0]) ** 2, **TOLERANCE)
    np.testing.assert_allclose(kl_k3(log_prob, ref_log_prob), [0.5 - 1 + np.log(2.0), 3 - 1 - np.log(3.0)], **TOLERANCE)


def test_k3_of_a_wild_sample_stays_finite():
    assert np.isfinite(kl_k3(jnp.float32(-200.0), jnp.float32(0.0)))
    np.testing.assert_allclose(kl_k3(jnp.float32(0.0), jnp.float32(-200.0)), 199.0)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.0149, 1.0), (0.0151, 2.0), (9.0, 2.0), (np.nan, 1.0)],
)
def test_coefficient_doubles_above_one_and_a_half_targets_and_halves_below_two_thirds(kl, expected):
    assert adaptive_kl_coefficient(1.0, kl, target=0.01) == expected


def test_coefficient_follows_factor_and_tolerance():
    assert adaptive_kl_coefficient(1.0, 0.03, target=0.01, factor=1.5, tolerance=2.0) == 1.5
    assert adaptive_kl_coefficient(1.0, 0.019, target=0.01, factor=1.5, tolerance=2.0) == 1.0
    assert adaptive_kl_coefficient(3.0, 0.004, target=0.01, factor=1.5, tolerance=2.0) == 2.0


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 2.0), (6.6, 2.02), (7.2, 2.04), (60.0, 2.04), (5.4, 1.98), (4.8, 1.96), (-3.0, 1.96)])
def test_coefficient_moves_in_proportion_to_the_error_up_to_a_fifth(kl, expected):
    np.testing.assert_allclose(proportional_kl_coefficient(2.0, kl, target=6.0, gain=0.1), expected, **TOLERANCE)
