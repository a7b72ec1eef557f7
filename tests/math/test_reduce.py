"""Masked statistics against NumPy on the rows that count."""

import jax
import numpy as np
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math import reduce

pytestmark = pytest.mark.x64


def sample(shape=(6, 4)):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.6
    return np.where(mask, rng.normal(2.0, 3.0, shape), np.nan), mask  # what is masked must not matter, whatever it is


def test_mean_variance_and_standard_error():
    x, mask = sample()
    counted = x[mask]
    np.testing.assert_allclose(compiled(reduce.masked_mean, x, mask), counted.mean(), **TOLERANCE)
    np.testing.assert_allclose(compiled(reduce.masked_variance, x, mask), counted.var(), **TOLERANCE)
    np.testing.assert_allclose(compiled(reduce.mean_standard_error, x, mask), counted.std(ddof=1) / np.sqrt(len(counted)), **TOLERANCE)


def test_standardised_rows_have_mean_zero_and_deviation_one():
    x, mask = sample()
    result = np.asarray(compiled(reduce.standardise, x, mask))
    np.testing.assert_allclose(result[mask], (x[mask] - x[mask].mean()) / (x[mask].std() + 1e-8), **TOLERANCE)
    np.testing.assert_array_equal(result[~mask], 0.0)


@pytest.mark.parametrize("constant", [0.0, 100.1, -7e4])
def test_a_constant_standardises_to_zero_in_float32(constant):
    x = np.full(2049, constant, np.float32)
    np.testing.assert_allclose(compiled(reduce.standardise, x, np.ones_like(x, bool)), 0.0, atol=0.05)


def test_nothing_counted():
    x, nothing = np.ones((3, 2)), np.zeros((3, 2), bool)
    assert compiled(reduce.masked_mean, x, nothing) == 0.0
    assert compiled(reduce.masked_variance, x, nothing) == 0.0
    np.testing.assert_array_equal(compiled(reduce.standardise, x, nothing), 0.0)
    np.testing.assert_array_equal(compiled(jax.grad(reduce.masked_mean), x, nothing), 0.0)
    assert np.isnan(compiled(reduce.mean_standard_error, x, nothing))
    assert np.isnan(compiled(reduce.mean_standard_error, x, np.arange(6).reshape(3, 2) == 0))


def test_explained_variance():
    target, mask = sample()
    noise = np.random.default_rng(1).normal(size=target.shape)
    expected = 1 - noise[mask].var() / target[mask].var()
    np.testing.assert_allclose(compiled(reduce.explained_variance, target + noise, target, mask), expected, **TOLERANCE)
    np.testing.assert_allclose(compiled(reduce.explained_variance, target + 5.0, target, mask), 1.0, **TOLERANCE)
    np.testing.assert_allclose(compiled(reduce.explained_variance, np.zeros_like(target), target, mask), 0.0, **TOLERANCE)
    assert np.isnan(compiled(reduce.explained_variance, np.arange(3.0), np.ones(3), np.ones(3, bool)))


def test_effective_sample_size():
    mask = np.array([True, True, True, True, False])
    np.testing.assert_allclose(compiled(reduce.effective_sample_size, np.array([0.3, 0.3, 0.3, 0.3, 9.0]), mask), 4.0, **TOLERANCE)
    np.testing.assert_allclose(compiled(reduce.effective_sample_size, np.array([0.0, 2.0, 0.0, 0.0, 9.0]), mask), 1.0, **TOLERANCE)
    np.testing.assert_allclose(compiled(reduce.effective_sample_size, np.array([1.0, 2.0, 3.0, 4.0, 9.0]), mask), 100 / 30, **TOLERANCE)


def test_leave_one_out_mean():
    x, mask = sample((7,))
    counted = x[mask]
    expected = [np.delete(counted, i).mean() for i in range(len(counted))]
    np.testing.assert_allclose(compiled(reduce.leave_one_out_mean, x, mask)[np.flatnonzero(mask)], expected, **TOLERANCE)


def test_leave_one_out_mean_at_all_rows_of_marked_episodes():
    total = np.array([[1.0, 4.0, 10.0], [1.0, 4.0, 10.0]])
    first = np.array([[True, True, True], [False, False, False]])
    np.testing.assert_allclose(compiled(reduce.leave_one_out_mean, total, first), [[7.0, 5.5, 2.5]] * 2, **TOLERANCE)


def test_a_single_sample_has_no_baseline():
    np.testing.assert_array_equal(compiled(reduce.leave_one_out_mean, np.array([3.0, 5.0]), np.array([True, False]))[0], 0.0)


def test_polyak_moves_every_leaf():
    target, online = {"a": np.array([0.0, 1.0]), "b": np.array(4.0)}, {"a": np.array([1.0, 3.0]), "b": np.array(0.0)}
    mixed = reduce.polyak(target, online, rate=0.25)
    np.testing.assert_allclose(mixed["a"], [0.25, 1.5], **TOLERANCE)
    np.testing.assert_allclose(mixed["b"], 3.0, **TOLERANCE)


def test_polyak_copies_and_keeps_exactly_at_its_ends():
    target, online = np.array([0.1, 1e8], np.float32), np.array([0.7, 0.3], np.float32)
    np.testing.assert_array_equal(reduce.polyak(target, online, rate=1.0), online)
    np.testing.assert_array_equal(reduce.polyak(target, online, rate=0.0), target)


def test_polyak_refuses_trees_that_do_not_match():
    with pytest.raises(ValueError, match=r"target \(2,\), online \(2, 1\)"):
        reduce.polyak([np.ones(2)], [np.ones((2, 1))], rate=0.5)
    with pytest.raises(ValueError, match="key"):
        reduce.polyak({"a": np.ones(2)}, {"b": np.ones(2)}, rate=0.5)
