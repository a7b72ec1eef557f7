"""Divergences between policies, exact and estimated from samples; differentiable in both arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .shapes import Scalar, check_same_shape

# Ratios beyond e^20 say only that two policies have nothing in common. Held there, they, their squares and sums of these
# stay finite in float32, and one wild sample does not turn a whole batch into infinity.
MAX_LOG_RATIO = 20.0


def categorical_kl(log_prob_p: jax.Array, log_prob_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis, [..., A] -> [...]: sum_a p_a (log p_a - log q_a), infinite where q = 0 < p.

    An action with p = 0, as a masked one, adds nothing to the value and nothing to the gradient, be log p = -inf or not.
    """
    check_same_shape(log_prob_p=log_prob_p, log_prob_q=log_prob_q)
    p = jnp.exp(log_prob_p)
    return jnp.sum(p * jnp.where(p > 0, log_prob_p - log_prob_q, 0), axis=-1)


def gaussian_kl(mean_p: jax.Array, log_std_p: jax.Array, mean_q: jax.Array, log_std_q: jax.Array) -> jax.Array:
    """KL(p || q) of each pair of normal distributions: log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2."""
    check_same_shape(mean_p=mean_p, log_std_p=log_std_p, mean_q=mean_q, log_std_q=log_std_q)
    log_ratio = log_std_p - log_std_q
    # The same sum, ordered so that near p = q no large terms cancel.
    return 0.5 * (jnp.expm1(2 * log_ratio) - 2 * log_ratio + jnp.square((mean_p - mean_q) * jnp.exp(-log_std_q)))


def kl_k1(log_prob: jax.Array, ref_log_prob: jax.Array) -> jax.Array:
    """Estimate of KL(pi || ref) from a sample of pi: log(pi / ref). Unbiased; its expected gradient is 0.

    Schulman 2020, "Approximating KL Divergence", has all three.
    """
    check_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    return log_prob - ref_log_prob


def kl_k2(log_prob: jax.Array, ref_log_prob: jax.Array) -> jax.Array:
    """Estimate of KL(pi || ref) from a sample of pi: log(pi / ref)^2 / 2. Biased; its expected gradient is that of KL(pi || ref)."""
    check_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    return 0.5 * jnp.square(log_prob - ref_log_prob)


def kl_k3(log_prob: jax.Array, ref_log_prob: jax.Array) -> jax.Array:
    """Estimate of KL(pi || ref) from a sample of pi: ref / pi - 1 - log(ref / pi). Unbiased, never negative.

    Its expected gradient is that of KL(ref || pi): the other direction.
    """
    check_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    log_ratio = jnp.minimum(ref_log_prob - log_prob, MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


def adaptive_kl_coefficient(
    coefficient: jax.Array, kl: jax.Array, *, target: Scalar, factor: Scalar = 2.0, tolerance: Scalar = 1.5
) -> jax.Array:
    """The penalty coefficient after a step that went `kl` far.

    Times `factor` above target x tolerance, divided by it below target / tolerance. Schulman et al. 2017, arXiv:1707.06347, section 4.
    """
    check_same_shape(coefficient=coefficient, kl=kl)
    too_far, too_near = kl > target * tolerance, kl < target / tolerance
    return jnp.where(too_far, coefficient * factor, jnp.where(too_near, coefficient / factor, coefficient))


def proportional_kl_coefficient(coefficient: jax.Array, kl: jax.Array, *, target: Scalar, gain: Scalar) -> jax.Array:
    """The penalty coefficient after a step that went `kl` far: times 1 + gain clip(kl / target - 1, -0.2, 0.2).

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2. Their KL is that of whole sequences, in nats, and their gain 0.1; as released,
    the number of sequences in the step over a horizon of 10,000.
    """
    check_same_shape(coefficient=coefficient, kl=kl)
    return coefficient * (1 + gain * jnp.clip(kl / target - 1, -0.2, 0.2))
