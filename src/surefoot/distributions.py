"""Action distributions. Leading axes are free; `log_prob`, `entropy` and `kl_to` return one number per action."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .math.divergences import categorical_kl, gaussian_kl
from .math.shapes import check_same_shape

LOG_TWO_PI = 1.8378770664093453
LOG_TWO = 0.6931471805599453
# Far below any logit, and finite: minus infinity would turn 0 * log 0 and its gradient into NaN.
MASKED_LOGIT = -1e9


class Categorical(NamedTuple):
    """A choice among n actions."""

    log_probs: jax.Array  # [..., n], normalised

    @classmethod
    def from_logits(cls, logits: jax.Array, action_mask: jax.Array | None = None) -> Categorical:
        """Normalise logits [..., n]; an action whose mask is false has probability 0."""
        if action_mask is not None:
            logits = jnp.where(action_mask, logits, MASKED_LOGIT)
        return cls(jax.nn.log_softmax(logits))

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, self.log_probs)

    def mode(self) -> jax.Array:
        return jnp.argmax(self.log_probs, axis=-1)

    def log_prob(self, action: jax.Array) -> jax.Array:
        return jnp.take_along_axis(self.log_probs, action[..., None], axis=-1)[..., 0]

    def entropy(self) -> jax.Array:
        return -jnp.sum(jnp.exp(self.log_probs) * self.log_probs, axis=-1)

    def kl_to(self, other: Categorical) -> jax.Array:
        """KL(self || other)."""
        return categorical_kl(self.log_probs, other.log_probs)

    def free(self) -> Categorical:
        """The same as a function of its parameters taken for logits: along each of them, the probabilities go on to sum to 1."""
        return Categorical.from_logits(self.log_probs)

    def fisher_metric(self, tangent: Categorical) -> Categorical:
        """The Fisher information times a tangent: the score of action a is the tangent's log-probability of a."""
        return Categorical(jnp.exp(self.log_probs) * tangent.log_probs)


class MultiCategorical(NamedTuple):
    """K independent choices, the i-th among n_i actions; the action is a vector of K numbers."""

    each: Categorical  # log_probs [..., K, max n]: what fills up the shorter choices has probability 0

    @classmethod
    def from_logits(cls, logits: jax.Array, choices: Sequence[int], action_mask: jax.Array | None = None) -> MultiCategorical:
        """Normalise logits [..., sum n], choice after choice; an action whose mask [..., sum n] is false has probability 0."""
        if action_mask is not None:
            logits = jnp.where(action_mask, logits, MASKED_LOGIT)
        rows, begin = [], 0
        for n in choices:
            filling = jnp.full((*logits.shape[:-1], max(choices) - n), MASKED_LOGIT, logits.dtype)
            rows.append(jnp.concatenate([logits[..., begin : begin + n], filling], axis=-1))
            begin += n
        return cls(Categorical.from_logits(jnp.stack(rows, axis=-2)))

    def sample(self, key: jax.Array) -> jax.Array:
        return self.each.sample(key)

    def mode(self) -> jax.Array:
        return self.each.mode()

    def log_prob(self, action: jax.Array) -> jax.Array:
        check_same_shape(action=action, choices=self.each.log_probs[..., 0])
        return jnp.sum(self.each.log_prob(action), axis=-1)

    def entropy(self) -> jax.Array:
        return jnp.sum(self.each.entropy(), axis=-1)

    def kl_to(self, other: MultiCategorical) -> jax.Array:
        """KL(self || other)."""
        return jnp.sum(self.each.kl_to(other.each), axis=-1)

    def free(self) -> MultiCategorical:
        """The same as a function of its parameters taken for logits."""
        return MultiCategorical(self.each.free())

    def fisher_metric(self, tangent: MultiCategorical) -> MultiCategorical:
        """The Fisher information times a tangent, choice by choice."""
        return MultiCategorical(self.each.fisher_metric(tangent.each))


class DiagonalGaussian(NamedTuple):
    """A vector of independent normals."""

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # [..., A], or [A]

    def sample(self, key: jax.Array) -> jax.Array:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> jax.Array:
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        check_same_shape(action=action, mean=self.mean)
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * (z**2 + LOG_TWO_PI) - self.log_std, axis=-1)

    def entropy(self) -> jax.Array:
        return jnp.sum(jnp.broadcast_to(0.5 * (1.0 + LOG_TWO_PI) + self.log_std, self.mean.shape), axis=-1)

    def kl_to(self, other: DiagonalGaussian) -> jax.Array:
        """KL(self || other)."""
        log_std, other_log_std = (jnp.broadcast_to(d.log_std, self.mean.shape) for d in (self, other))
        return jnp.sum(gaussian_kl(self.mean, log_std, other.mean, other_log_std), axis=-1)

    def free(self) -> DiagonalGaussian:
        """The same: its parameters are free as they are."""
        return self

    def fisher_metric(self, tangent: DiagonalGaussian) -> DiagonalGaussian:
        """The Fisher information times a tangent: 1 / variance of each mean, 2 of each log standard deviation."""
        return DiagonalGaussian(jnp.exp(-2 * self.log_std) * tangent.mean, 2 * tangent.log_std)


class TanhGaussian(NamedTuple):
    """A vector of independent normals u, squashed into (-1, 1): a = tanh(u). Haarnoja et al. 2018, arXiv:1801.01290, appendix C."""

    mean: jax.Array  # [..., A], of u
    log_std: jax.Array  # [..., A], or [A], of u

    def sample(self, key: jax.Array) -> jax.Array:
        return jnp.tanh(DiagonalGaussian(*self).sample(key))

    def sample_and_log_prob(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What `sample` gives, and its log-probability: exact where the action itself has been rounded to an end of its range."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        u = self.mean + jnp.exp(self.log_std) * noise
        return jnp.tanh(u), jnp.sum(-0.5 * (noise**2 + LOG_TWO_PI) - self.log_std - log_tanh_slope(u), axis=-1)

    def mode(self) -> jax.Array:
        """tanh(mean): the median, which acts without noise. The density itself may be greatest at the ends."""
        return jnp.tanh(self.mean)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Of actions [..., A] inside (-1, 1); one at or beyond an end counts as the last number before it."""
        check_same_shape(action=action, mean=self.mean)
        limit = 1 - jnp.finfo(action.dtype).epsneg
        u = jnp.arctanh(jnp.clip(action, -limit, limit))
        return DiagonalGaussian(*self).log_prob(u) - jnp.sum(log_tanh_slope(u), axis=-1)


def log_tanh_slope(u: jax.Array) -> jax.Array:
    """log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which stays exact where tanh(u) rounds to 1."""
    return 2 * (LOG_TWO - u - jax.nn.softplus(-2 * u))


Distribution = Categorical | MultiCategorical | DiagonalGaussian
