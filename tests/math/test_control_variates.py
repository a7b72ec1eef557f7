"""Control variates that depend on the action: unbiased with the analytic correction, biased without it (G7)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.policy_gradient import action_dependent_advantage, expected_control_variate, linear_control_variate, score_function_loss
from surefoot.math.returns import reward_to_go, time_discount

pytestmark = pytest.mark.x64

MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)
WEIGHT = time_discount(BATCH.time, discount=MDP.discount)


def table(kind, theta):
    """A control variate c [H, S, A]."""
    value, action_value = oracle.values(MDP, theta)
    noise = np.random.default_rng(4).normal(size=action_value.shape)
    return {
        "exact Q": action_value,
        "a poor Q": action_value + 0.3 * noise,
        "anything": 5.0 * noise,
        "of the state alone": jnp.broadcast_to(value[:-1, :, None], action_value.shape),
    }[kind]


KINDS = ["exact Q", "a poor Q", "anything", "of the state alone"]


@partial(jax.jit, static_argnames="is_corrected")
def moments(theta, control_variate, *, is_corrected=True):
    """Mean [D] and variance of the gradient that whole episodes give, as an algorithm would compute it."""
    value = oracle.values(MDP, theta)[0][BATCH.time, BATCH.state]
    to_go = reward_to_go(BATCH.reward, jnp.zeros_like(value), BATCH.terminated, BATCH.truncated, discount=MDP.discount)
    of_all_actions = control_variate[BATCH.time, BATCH.state]
    taken = control_variate[BATCH.time, BATCH.state, BATCH.action]

    def loss(theta):
        expected = expected_control_variate(oracle.log_policy(theta)[BATCH.state], of_all_actions)
        advantage = action_dependent_advantage(to_go - value, taken, expected)
        rows = score_function_loss(oracle.log_prob(theta, BATCH), advantage)
        return WEIGHT * (rows - expected if is_corrected else rows)

    return oracle.moments(oracle.probability(theta, BATCH), oracle.gradient_estimates(loss, theta, BATCH.valid))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gradient_with_the_correction_is_unbiased_for_any_control_variate(kind, seed):
    theta = oracle.random_logits(MDP, seed)
    mean, _ = moments(theta, table(kind, theta))
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_without_the_correction_is_biased_unless_the_action_plays_no_part(kind):
    theta = oracle.random_logits(MDP, 1)
    bias = np.abs(moments(theta, table(kind, theta), is_corrected=False)[0] - oracle.objective_gradient(MDP, theta)).max()
    assert bias < 1e-10 if kind == "of the state alone" else bias > 0.01


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_action_values_leave_less_variance_than_the_state_value(seed):
    theta = oracle.random_logits(MDP, seed)
    exact, poor, none = (float(moments(theta, table(kind, theta))[1]) for kind in ("exact Q", "a poor Q", "of the state alone"))
    assert exact < poor
    assert exact < 0.9 * none


def test_the_correction_is_the_sum_over_actions_and_passes_masked_ones():
    log_probs = np.array([np.log(0.25), np.log(0.75), -np.inf])
    control_variate = np.array([2.0, -1.0, np.nan])
    result = compiled(jax.value_and_grad(expected_control_variate, argnums=(0, 1)), log_probs, control_variate)
    expected, (gradient, to_control_variate) = result
    np.testing.assert_allclose(expected, -0.25, **TOLERANCE)
    np.testing.assert_allclose(gradient, [0.5, -0.75, 0.0], **TOLERANCE)
    np.testing.assert_array_equal(to_control_variate, 0.0)


def test_the_linear_one_is_q_to_first_order_less_its_value_at_the_mean():
    """Its gradient is the slope, in the action alone."""
    rng = np.random.default_rng(0)
    mean, slope, step = rng.normal(size=(3, 5, 2))

    def q(action):
        return jnp.sum(jnp.sin(action) * slope, axis=-1)

    at_mean = jax.grad(lambda action: jnp.sum(q(action)))(jnp.asarray(mean))
    near = linear_control_variate(mean + 1e-4 * step, mean, at_mean)
    np.testing.assert_allclose(near, q(mean + 1e-4 * step) - q(mean), atol=1e-7)
    assert np.max(np.abs(near)) > 1e-4
    gradients = jax.grad(lambda *arrays: jnp.sum(linear_control_variate(*arrays)), argnums=(0, 1, 2))(mean + step, mean, slope)
    np.testing.assert_allclose(gradients, [slope, np.zeros_like(slope), np.zeros_like(slope)], **TOLERANCE)


def test_no_gradient_passes_through_what_is_left_of_the_advantage():
    arrays = np.array([1.0]), np.array([2.0]), np.array([5.0])
    result, gradients = compiled(
        jax.value_and_grad(lambda *arrays: jnp.sum(action_dependent_advantage(*arrays)), argnums=(0, 1, 2)), *arrays
    )
    assert result == 4.0
    np.testing.assert_array_equal(np.stack(gradients), 0.0)
