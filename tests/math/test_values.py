"""Value targets and losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.values import (
    clipped_value_loss,
    double_q_value,
    huber,
    max_value,
    n_step_target,
    squared_value_loss,
    td_target,
    twin_minimum,
)

pytestmark = pytest.mark.x64


def test_td_target_has_no_future_after_termination():
    target = compiled(td_target, np.array([1.0, 1.0]), np.array([10.0, 10.0]), np.array([False, True]), discount=0.9)
    np.testing.assert_allclose(target, [10.0, 1.0], **TOLERANCE)


def test_td_target_of_a_terminated_row_ignores_whatever_its_value_is():
    assert compiled(td_target, np.array([1.0]), np.array([np.nan]), np.array([True]), discount=0.9) == 1.0


def test_n_step_target_reaches_as_far_as_the_discount_says():
    reward, next_value, discount = np.array([1.0, 1.0, 2.0]), np.array([10.0, 10.0, np.nan]), np.array([0.9, 0.9**3, 0.0])
    np.testing.assert_allclose(compiled(n_step_target, reward, next_value, discount), [10.0, 8.29, 2.0], **TOLERANCE)


Q = np.array([[[3.0, 1.0, 2.0], [-5.0, -4.0, -6.0]], [[1.0, 1.0, 0.0], [7.0, 9.0, 8.0]]])
OTHER_Q = np.array([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], [[0.7, 0.8, 0.9], [1.0, 1.1, 1.2]]])
LEGAL = np.array([[[False, True, True], [True, False, True]], [[True, True, True], [False, False, True]]])


def test_the_greatest_value_is_that_of_a_legal_action():
    np.testing.assert_array_equal(compiled(max_value, Q), [[3.0, -4.0], [1.0, 9.0]])
    np.testing.assert_array_equal(compiled(max_value, Q, LEGAL), [[2.0, -5.0], [1.0, 8.0]])


def test_in_double_q_the_one_chooses_and_the_other_judges():
    np.testing.assert_array_equal(compiled(double_q_value, Q, OTHER_Q), [[0.1, 0.5], [0.7, 1.1]])
    np.testing.assert_array_equal(compiled(double_q_value, Q, OTHER_Q, LEGAL), [[0.3, 0.4], [0.7, 1.2]])
    np.testing.assert_array_equal(compiled(double_q_value, Q, Q, LEGAL), compiled(max_value, Q, LEGAL))


def test_the_greatest_of_noisy_values_is_too_great_and_double_q_is_not():
    """Exact: two critics, each with independent errors of +1 or -1 on two equally good actions, enumerated."""
    error = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T
    assert compiled(max_value, error[:, :2]).mean() == 0.5
    assert compiled(double_q_value, error[:, :2], error[:, 2:]).mean() == 0.0


def test_of_twins_the_smaller_counts_entry_by_entry():
    np.testing.assert_array_equal(compiled(twin_minimum, Q[:, 0]), [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(compiled(twin_minimum, Q), np.where(Q[0] < Q[1], Q[0], Q[1]))


@pytest.mark.parametrize("function", [max_value, lambda q, mask: double_q_value(q, q, mask)], ids=["max", "double"])
def test_a_mask_of_another_shape_is_refused(function):
    with pytest.raises(ValueError, match=r"q \(2, 2, 3\), action_mask \(3,\)"):
        function(Q, LEGAL[0, 0])


def test_gradient_of_the_squared_loss_is_the_error():
    value, target = np.array([1.0, 5.0]), np.array([3.0, 2.0])
    np.testing.assert_allclose(compiled(squared_value_loss, value, target), [2.0, 4.5], **TOLERANCE)
    np.testing.assert_allclose(
        compiled(jax.grad(lambda value: jnp.sum(squared_value_loss(value, target))), value), [-2.0, 3.0], **TOLERANCE
    )


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (1.1, 3.0, 0.5 * 1.9**2, -1.9),  # within the clip
        (2.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved towards the target, past the clip: flat
        (0.0, 3.0, 0.5 * 3.0**2, -3.0),  # moved away from it: the larger loss pulls back
        (9.0, 1.3, 0.5 * 7.7**2, 7.7),  # overshot
    ],
)
def test_clipped_value_loss_takes_the_larger(value, target, loss, slope):
    result = compiled(jax.value_and_grad(partial(clipped_value_loss, clip=0.2)), value, 1.0, target)
    np.testing.assert_allclose(result, [loss, slope], **TOLERANCE)


def test_huber_is_quadratic_and_then_linear():
    error = np.array([-3.0, -0.5, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(compiled(huber, error, delta=2.0), [4.0, 0.125, 0.0, 0.125, 4.0], **TOLERANCE)
    np.testing.assert_allclose(
        compiled(jax.grad(lambda error: jnp.sum(huber(error, delta=2.0))), error), [-2.0, -0.5, 0.0, 0.5, 2.0], **TOLERANCE
    )


def test_no_gradient_reaches_targets_or_old_values():
    def everything(next_value, old_value, value_target):
        target = td_target(jnp.ones(2), next_value, jnp.zeros(2, bool), discount=0.9)
        target += n_step_target(jnp.ones(2), next_value, jnp.full(2, 0.9))
        x = jnp.array([0.5, 3.0])
        return jnp.sum(target + squared_value_loss(x, value_target) + clipped_value_loss(x, old_value, value_target, clip=0.1))

    for gradient in compiled(jax.grad(everything, argnums=(0, 1, 2)), np.ones(2), np.ones(2), np.zeros(2)):
        np.testing.assert_array_equal(gradient, 0.0)
