"""V-trace and Retrace against loops written from their definitions, and their fixed points on the oracle (V5)."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.policy_gradient import importance_ratio
from surefoot.math.returns import gae, lambda_return, n_step_return, retrace, reward_to_go, vtrace

pytestmark = pytest.mark.x64

DISCOUNT = 0.9
ANY = 1e9  # a bound that nothing reaches


def experience(shape=(30, 4), seed=0):
    """Random rows with episodes of all lengths from 1, a row in which they end in both ways, and ratios on both sides of 1."""
    rng = np.random.default_rng(seed)
    reward, value, final_value = rng.normal(size=(3, *shape))
    terminated, truncated = rng.random((2, *shape)) < 0.15
    terminated[7] = truncated[7] = True
    next_value = np.where(terminated | truncated, final_value, np.roll(value, -1, axis=0))
    next_value[-1] = final_value[-1]
    return reward, value, next_value, np.exp(rng.normal(size=shape)), terminated, truncated


def rows_from(t, n, terminated, truncated):
    """The rows of the episode from t on, in stream n."""
    end = t
    while end + 1 < len(terminated) and not (terminated[end, n] or truncated[end, n]):
        end += 1
    return [(s, n) for s in range(t, end + 1)]


@pytest.mark.parametrize(("gae_lambda", "clip_rho", "clip_c"), [(1.0, 1.0, 1.0), (0.7, 1.0, 1.0), (1.0, 2.0, 0.8), (0.9, ANY, ANY)])
def test_vtrace_is_its_definition(gae_lambda, clip_rho, clip_c):
    reward, value, next_value, ratio, terminated, truncated = batch = experience()
    options = {"gae_lambda": gae_lambda, "clip_rho": clip_rho, "clip_c": clip_c}
    target, advantage = compiled(vtrace, *batch, discount=DISCOUNT, **options)
    td_error = reward + DISCOUNT * np.where(terminated, 0.0, next_value) - value
    rho, c = np.minimum(ratio, clip_rho), gae_lambda * np.minimum(ratio, clip_c)

    def by_definition(rows):  # eq. 1: v_s - V(x_s)
        return sum(DISCOUNT**k * np.prod([c[row] for row in rows[:k]]) * rho[row] * td_error[row] for k, row in enumerate(rows))

    for t, n in np.ndindex(reward.shape):
        rows = rows_from(t, n, terminated, truncated)
        np.testing.assert_allclose(target[t, n], value[t, n] + by_definition(rows), **TOLERANCE)
        # Section 4.2: rho_s (r_s + discount v_{s+1} - V(x_s)), the V of the successor where it lies outside of the batch.
        later = 0.0 if terminated[t, n] else next_value[t, n] + (gae_lambda * by_definition(rows[1:]) if rows[1:] else 0.0)
        np.testing.assert_allclose(advantage[t, n], rho[t, n] * (reward[t, n] + DISCOUNT * later - value[t, n]), **TOLERANCE)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_on_policy_vtrace_is_the_lambda_return_and_gae(gae_lambda):
    reward, value, next_value, _, *flags = experience()
    for bound in (1.0, 1.5, ANY):
        target, advantage = compiled(
            vtrace,
            *(reward, value, next_value, np.ones_like(reward), *flags),
            **{"discount": DISCOUNT, "gae_lambda": gae_lambda, "clip_rho": bound, "clip_c": bound},
        )
        expected = compiled(lambda_return, reward, next_value, *flags, discount=DISCOUNT, trace_decay=gae_lambda)
        np.testing.assert_allclose(target, expected, **TOLERANCE)
        expected = compiled(gae, reward, value, next_value, *flags, discount=DISCOUNT, gae_lambda=gae_lambda)
        np.testing.assert_allclose(advantage, expected, **TOLERANCE)


def test_on_policy_vtrace_without_decay_is_the_longest_n_step_return():
    reward, value, next_value, _, *flags = experience()
    target, _ = compiled(vtrace, reward, value, next_value, np.ones_like(reward), *flags, discount=DISCOUNT)
    n_step = compiled(n_step_return, reward, next_value, *flags, discount=DISCOUNT, num_steps=len(reward))
    np.testing.assert_allclose(target, n_step, **TOLERANCE)
    np.testing.assert_allclose(target, compiled(reward_to_go, reward, next_value, *flags, discount=DISCOUNT), **TOLERANCE)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_retrace_is_its_definition(gae_lambda):
    reward, q_taken, next_value, ratio, terminated, truncated = batch = experience()
    target = compiled(retrace, *batch, discount=DISCOUNT, gae_lambda=gae_lambda)
    td_error = reward + DISCOUNT * np.where(terminated, 0.0, next_value) - q_taken
    c = gae_lambda * np.minimum(ratio, 1.0)
    for t, n in np.ndindex(reward.shape):
        rows = rows_from(t, n, terminated, truncated)
        # Eq. 4: c_{t+1} ... c_{t+k} weigh the k-th TD error, of the actions after the first.
        change = sum(DISCOUNT**k * np.prod([c[later] for later in rows[1 : k + 1]]) * td_error[row] for k, row in enumerate(rows))
        np.testing.assert_allclose(target[t, n], q_taken[t, n] + change, **TOLERANCE)


def test_no_gradient_passes_and_no_value_after_a_termination_counts():
    reward, value, next_value, ratio, *flags = experience()
    next_value = np.where(flags[0], np.nan, next_value)

    def everything(*arrays):
        results = *vtrace(*arrays, *flags, discount=DISCOUNT), retrace(*arrays, *flags, discount=DISCOUNT)
        return sum(jnp.sum(jnp.square(result)) for result in results)

    total, gradients = compiled(jax.value_and_grad(everything, argnums=(0, 1, 2, 3)), reward, value, next_value, ratio)
    assert np.isfinite(total)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)


def policies():
    """The policy to learn about, and the one that acts: far enough apart that ratios lie on both sides of 1."""
    theta, behaviour = oracle.random_logits(MDP, 1), 1.5 * oracle.random_logits(MDP, 2)
    ratio = importance_ratio(oracle.log_prob(theta, BATCH), oracle.log_prob(behaviour, BATCH))
    assert ratio[BATCH.valid].min() < 0.7
    assert ratio[BATCH.valid].max() > 1.4
    return theta, behaviour, ratio


def batches():
    """The enumerated episodes whole, truncated after two steps, and cut there by the end of the batch."""
    yield BATCH
    yield BATCH._replace(truncated=(BATCH.time == 1) & ~BATCH.terminated & BATCH.valid)
    yield BATCH._replace(**{name: column[:2] for name, column in BATCH._asdict().items() if column.ndim == 2})


def conditional_means(prob, estimate, batch, *, given_action):
    """{(time, state) or (time, state, action): mean of the rows there} under the probabilities of the trajectories."""
    prob, estimate, means = np.asarray(prob), np.asarray(estimate), {}
    for time in range(len(estimate)):
        for where in np.ndindex((2, 2) if given_action else (2,)):
            here = batch.valid[time] & (batch.state[time] == where[0])
            here &= (batch.action[time] == where[1]) if given_action else True
            means[(time, *where)] = prob[here] @ estimate[time, here] / prob[here].sum()
    return means


@pytest.mark.parametrize(("gae_lambda", "clip_c"), [(1.0, ANY), (1.0, 1.0), (0.6, ANY), (0.0, 1.0)])
def test_values_of_the_policy_are_the_fixed_point_of_vtrace_whoever_acts(gae_lambda, clip_c):
    theta, behaviour, ratio = policies()
    value, action_value = oracle.values(MDP, theta)
    for batch in batches():
        rows = oracle.row_values(value, batch)
        target, advantage = compiled(
            vtrace,
            *(batch.reward, *rows, ratio[: len(batch.reward)], batch.terminated, batch.truncated),
            **{"discount": MDP.discount, "gae_lambda": gae_lambda, "clip_rho": ANY, "clip_c": clip_c},
        )
        prob = oracle.probability(behaviour, BATCH)
        for where, mean in conditional_means(prob, target, batch, given_action=False).items():
            np.testing.assert_allclose(mean, value[where], **TOLERANCE)
        policy_ratio = jnp.exp(oracle.log_policy(theta) - oracle.log_policy(behaviour))
        for (time, state, action), mean in conditional_means(prob, advantage, batch, given_action=True).items():
            exact = policy_ratio[state, action] * (action_value[time, state, action] - value[time, state])
            np.testing.assert_allclose(mean, exact, **TOLERANCE)


def test_clipped_ratios_lead_vtrace_to_the_values_of_a_policy_between_the_two():
    """Espeholt et al. 2018, eq. 3: pi_rho ~ min(clip_rho mu, pi)."""
    theta, behaviour, ratio = policies()
    between = jnp.log(jnp.minimum(jnp.exp(oracle.log_policy(behaviour)), jnp.exp(oracle.log_policy(theta))))
    value = oracle.values(MDP, between)[0]
    rows = oracle.row_values(value, BATCH)
    target, _ = compiled(vtrace, BATCH.reward, *rows, ratio, BATCH.terminated, BATCH.truncated, discount=MDP.discount)
    for where, mean in conditional_means(oracle.probability(behaviour, BATCH), target, BATCH, given_action=False).items():
        np.testing.assert_allclose(mean, value[where], **TOLERANCE)
    assert np.abs(value[0] - oracle.values(MDP, theta)[0][0]).max() > 0.01  # else the two fixed points could not be told apart


def retrace_targets(action_value, theta, behaviour, ratio, batch, gae_lambda):
    """Mean target at each time, state and action, from a table Q [H, S, A]."""
    value = jnp.sum(jnp.exp(oracle.log_policy(theta)) * action_value, axis=-1)
    value = jnp.concatenate([value, jnp.zeros_like(value[:1])])
    q_taken, next_value = action_value[batch.time, batch.state, batch.action], oracle.row_values(value, batch)[1]
    target = compiled(
        retrace,
        *(batch.reward, q_taken, next_value, ratio[: len(batch.reward)], batch.terminated, batch.truncated),
        **{"discount": MDP.discount, "gae_lambda": gae_lambda},
    )
    return conditional_means(oracle.probability(behaviour, BATCH), target, batch, given_action=True)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_action_values_of_the_policy_are_the_fixed_point_of_retrace_whoever_acts(gae_lambda):
    theta, behaviour, ratio = policies()
    action_value = oracle.values(MDP, theta)[1]
    for batch in batches():
        for where, mean in retrace_targets(action_value, theta, behaviour, ratio, batch, gae_lambda).items():
            np.testing.assert_allclose(mean, action_value[where], **TOLERANCE)


def test_retrace_comes_from_any_table_to_the_action_values_of_the_policy():
    """Each application is right one step further from the end: three of them for a horizon of three."""
    theta, behaviour, ratio = policies()
    exact = np.asarray(oracle.values(MDP, theta)[1])
    table = np.array(np.random.default_rng(3).normal(size=exact.shape))
    for _ in range(MDP.horizon):
        for where, mean in retrace_targets(jnp.asarray(table), theta, behaviour, ratio, BATCH, 1.0).items():
            table[where] = mean
    np.testing.assert_allclose(table[:, ~MDP.terminal], exact[:, ~MDP.terminal], **TOLERANCE)
