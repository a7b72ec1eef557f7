"""Importance sampling from further and further away: E_p[f] from samples of q, p = N(0, 1), q = N(shift, 1), f(a) = 1 + a."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from ...math.policy_gradient import importance_ratio
from ...math.reduce import effective_sample_size
from ..curves import COLOURS, INK, Vector
from .drawing import few_powers, label, note

SENTENCE = "Importance weights are right on average at any distance, but the further q is from p, the fewer samples carry all the weight."
NUM_SAMPLES, NUM_BATCHES = 1000, 6
MEAN = 1.0  # E_p[f]


class Numbers(NamedTuple):
    """Estimates of batches that are the same draws moved by the shift, and what theory says of them."""

    shift: Vector  # [S]
    estimate: Vector  # [S, B]
    standard_error: Vector  # [S] exact
    sample_size: Vector  # [S, B] effective sample size per sample
    expected_sample_size: Vector  # [S] for infinitely many samples


def variance(shift: Vector) -> Vector:
    """Var_q[f p/q] = E_p[f^2 p/q] - (E_p f)^2, where p^2 / q is exp(shift^2) times the density of N(-shift, 1)."""
    return np.exp(shift**2) * (1 + (1 - shift) ** 2) - MEAN**2


def compute() -> Numbers:
    """The batches and the exact error."""
    shift = np.linspace(0.0, 6.0, 37)
    draws = np.random.default_rng(0).normal(size=(1, NUM_BATCHES, NUM_SAMPLES)).repeat(len(shift), axis=0)
    action = shift[:, None, None] + draws
    weight = importance_ratio(jnp.asarray(norm.logpdf(action)), jnp.asarray(norm.logpdf(draws)))
    mask = jnp.ones(NUM_SAMPLES, bool)
    sample_size = jax.vmap(jax.vmap(lambda weight: effective_sample_size(weight, mask)))(weight)
    return Numbers(
        shift,
        np.mean(np.asarray(weight) * (1 + action), axis=-1),
        np.sqrt(variance(shift) / NUM_SAMPLES),
        np.asarray(sample_size) / NUM_SAMPLES,
        np.exp(-(shift**2)),
    )


def draw(figure: Figure, numbers: Numbers) -> None:
    """Estimates in their band above, effective sample size below."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    band = np.minimum(2 * numbers.standard_error, 2)
    above.fill_between(numbers.shift, MEAN - band, MEAN + band, color=COLOURS[0], alpha=0.15, linewidth=0)
    above.plot(numbers.shift, numbers.estimate, color=COLOURS[0], linewidth=0.8, alpha=0.8)
    above.axhline(MEAN, color=INK, linewidth=1.2, linestyle="dashed")
    above.set(ylim=(-0.5, 2.5), yticks=range(3))
    figure.align_ylabels()
    note(above, (0.02, 0.88), f"{NUM_BATCHES} batches of {NUM_SAMPLES} samples", COLOURS[0])
    note(above, (0.02, 0.14), "band: ± 2 standard errors", COLOURS[0])
    note(above, (0.985, 0.08), "nearly all of them say 0", COLOURS[0], ha="right")
    note(above, (0.77, 0.54), "true value")
    note(below, (0.985, 0.62), "estimated from each batch", COLOURS[1], ha="right")
    note(below, (0.49, 0.12), "exact")
    below.semilogy(numbers.shift, numbers.sample_size, color=COLOURS[1], linewidth=0.8, alpha=0.8)
    below.semilogy(numbers.shift, numbers.expected_sample_size, color=INK, linewidth=1.2, linestyle="dashed")
    below.set_ylim(3e-4, 1.5)
    few_powers(below.yaxis, 1e-3, 1e-2, 1e-1, 1)
    label(above, "", r"estimate of $E_p[f]$")
    label(below, "distance of q from p, in standard deviations", "effective\nsample size")
