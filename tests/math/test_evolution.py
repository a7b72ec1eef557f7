"""The cross-entropy method's parts: who is kept, what is refitted to them, and how the extra noise ends (P11)."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.evolution import decaying_noise, refit_gaussian, select_elites

pytestmark = pytest.mark.x64

CANDIDATES = np.random.default_rng(0).normal(size=(6, 3))


def test_elites_are_those_of_greatest_fitness_best_first_and_of_equals_the_first():
    fitness = np.array([1.0, 7.0, -3.0, 7.0, 2.0, 2.0])
    for number, expected in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (6, [1, 3, 4, 5, 0, 2])):
        np.testing.assert_array_equal(select_elites(CANDIDATES, jnp.asarray(fitness), num_elites=number), CANDIDATES[expected])


def test_a_fitness_for_other_candidates_is_refused():
    with pytest.raises(ValueError, match=r"fitness \(5,\), first_parameter \(6,\)"):
        select_elites(CANDIDATES, np.zeros(5), num_elites=2)
    with pytest.raises(ValueError, match=r"fitness \(6, 1\), first_parameter \(6,\)"):
        select_elites(CANDIDATES, np.zeros((6, 1)), num_elites=2)


def test_the_distribution_is_refitted_to_the_elites_each_parameter_with_the_extra_variance():
    mean, std = compiled(refit_gaussian, jnp.asarray(CANDIDATES), extra_variance=0.3)
    expected = [sum(column) / 6 for column in CANDIDATES.T]
    np.testing.assert_allclose(mean, expected, **TOLERANCE)
    variance = [sum((x - m) ** 2 for x in column) / 6 for column, m in zip(CANDIDATES.T, expected, strict=True)]
    np.testing.assert_allclose(std**2, np.array(variance) + 0.3, **TOLERANCE)
    np.testing.assert_array_equal(refit_gaussian(jnp.ones((1, 2)), extra_variance=0.0)[1], 0.0)


@pytest.mark.parametrize(("generation", "expected"), [(0, 5.0), (10, 4.0), (49, 0.1), (50, 0.0), (51, 0.0), (1000, 0.0)])
def test_the_extra_noise_is_that_of_the_paper(generation, expected):
    """max(5 - t / 10, 0)"""
    np.testing.assert_allclose(decaying_noise(jnp.asarray(generation), start=5.0, generations=50), expected, **TOLERANCE)
