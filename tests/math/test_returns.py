"""Returns and advantages against loops written from their definitions, and against the oracle (V1 to V4)."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math import returns, values
from surefoot.math.episodes import episode_cumsum, episode_sum

pytestmark = pytest.mark.x64

DISCOUNT = 0.9


def experience(shape=(40, 5), seed=0):
    """Random rows with episodes of all lengths from 1, and a row in which they end in both ways at once."""
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, *shape))
    terminated, truncated = rng.random((2, *shape)) < 0.18
    terminated[7] = truncated[7] = True
    return reward, value, next_value, terminated, truncated


def by_definition(row, shape, terminated, truncated):
    """`row`(rows of the episode from t on, in one stream) for every t of every stream."""
    result = np.empty(shape)
    for t, n in np.ndindex(shape):
        end = t
        while end + 1 < shape[0] and not (terminated[end, n] or truncated[end, n]):
            end += 1
        result[t, n] = row([(s, n) for s in range(t, end + 1)])
    return result


def n_step(rows, n, reward, next_value, terminated):
    """At most n rewards of the rows, and the value after the last of them unless the episode terminated there."""
    rows = rows[:n]
    rewards = sum(DISCOUNT**k * reward[row] for k, row in enumerate(rows))
    return rewards + (0.0 if terminated[rows[-1]] else DISCOUNT ** len(rows) * next_value[rows[-1]])


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_is_the_weighted_sum_of_td_errors(gae_lambda):
    reward, value, next_value, terminated, truncated = experience()
    td_error = reward + DISCOUNT * np.where(terminated, 0.0, next_value) - value

    def row(rows):
        return sum((DISCOUNT * gae_lambda) ** k * td_error[row] for k, row in enumerate(rows))

    advantage = compiled(returns.gae, reward, value, next_value, terminated, truncated, discount=DISCOUNT, gae_lambda=gae_lambda)
    np.testing.assert_allclose(advantage, by_definition(row, reward.shape, terminated, truncated), **TOLERANCE)


@pytest.mark.parametrize("trace_decay", [0.0, 0.7, 1.0])
def test_lambda_return_is_the_weighted_mean_of_n_step_returns(trace_decay):
    reward, _, next_value, terminated, truncated = experience()

    def row(rows):
        last = len(rows)
        shorter = sum(trace_decay ** (n - 1) * n_step(rows, n, reward, next_value, terminated) for n in range(1, last))
        return (1 - trace_decay) * shorter + trace_decay ** (last - 1) * n_step(rows, last, reward, next_value, terminated)

    target = compiled(returns.lambda_return, reward, next_value, terminated, truncated, discount=DISCOUNT, trace_decay=trace_decay)
    np.testing.assert_allclose(target, by_definition(row, reward.shape, terminated, truncated), **TOLERANCE)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40, 1000])
def test_n_step_return_ends_with_episode_and_batch(num_steps):
    reward, _, next_value, terminated, truncated = experience()
    target = compiled(returns.n_step_return, reward, next_value, terminated, truncated, discount=DISCOUNT, num_steps=num_steps)
    expected = by_definition(lambda rows: n_step(rows, num_steps, reward, next_value, terminated), reward.shape, terminated, truncated)
    np.testing.assert_allclose(target, expected, **TOLERANCE)


def test_no_steps_are_refused():
    reward, _, next_value, terminated, truncated = experience()
    with pytest.raises(ValueError, match="num_steps is 0"):
        compiled(returns.n_step_return, reward, next_value, terminated, truncated, discount=DISCOUNT, num_steps=0)


def test_reward_to_go_is_the_sum_of_rewards_and_the_value_beyond():
    reward, _, next_value, terminated, truncated = experience()
    expected = by_definition(lambda rows: n_step(rows, len(rows), reward, next_value, terminated), reward.shape, terminated, truncated)
    result = compiled(returns.reward_to_go, reward, next_value, terminated, truncated, discount=DISCOUNT)
    np.testing.assert_allclose(result, expected, **TOLERANCE)


def test_identities_between_the_estimators():
    reward, value, final_value, terminated, truncated = experience()
    next_value = np.where(terminated | truncated, final_value, np.roll(value, -1, axis=0))
    arguments = reward, next_value, terminated, truncated

    def gae(gae_lambda):
        return compiled(returns.gae, reward, value, next_value, terminated, truncated, discount=DISCOUNT, gae_lambda=gae_lambda)

    td_target = compiled(values.td_target, reward, next_value, terminated, discount=DISCOUNT)
    monte_carlo = compiled(returns.reward_to_go, *arguments, discount=DISCOUNT)
    np.testing.assert_allclose(gae(0.0), td_target - value, **TOLERANCE)
    np.testing.assert_allclose(gae(1.0), monte_carlo - value, **TOLERANCE)
    lambda_return = compiled(returns.lambda_return, *arguments, discount=DISCOUNT, trace_decay=0.6)
    np.testing.assert_allclose(gae(0.6) + value, lambda_return, **TOLERANCE)
    for num_steps, expected in ((1, td_target), (len(reward), monte_carlo)):
        target = compiled(returns.n_step_return, *arguments, discount=DISCOUNT, num_steps=num_steps)
        np.testing.assert_allclose(target, expected, **TOLERANCE)


def test_bootstrap_of_each_kind_of_end():
    """One row a stream: goes on, terminated, truncated, both."""
    terminated, truncated = np.array([[False, True, False, True]]), np.array([[False, False, True, True]])
    reward, value, next_value = np.full((1, 4), 1.0), np.full((1, 4), 3.0), np.full((1, 4), 10.0)
    expected = np.array([[10.0, 1.0, 10.0, 1.0]])
    flags = terminated, truncated
    np.testing.assert_allclose(compiled(returns.reward_to_go, reward, next_value, *flags, discount=DISCOUNT), expected, **TOLERANCE)
    advantage = compiled(returns.gae, reward, value, next_value, *flags, discount=DISCOUNT, gae_lambda=0.5)
    np.testing.assert_allclose(advantage, expected - 3.0, **TOLERANCE)


def test_total_return_is_that_of_the_whole_episode_at_each_of_its_rows():
    reward = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    time = np.array([7, 0, 1, 2, 0, 0])  # the first row ends an episode that began before the batch
    terminated = np.array([True, False, False, True, False, False])
    truncated = np.array([False, False, False, False, True, False])
    result = compiled(returns.total_return, reward, time, terminated, truncated, discount=0.5)
    np.testing.assert_allclose(result, [1 / 128, 4.5, 4.5, 4.5, 5.0, 6.0], **TOLERANCE)


def test_sums_over_episodes():
    x = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0], [8.0, 8.0]])
    terminated = np.array([[False, True], [True, False], [False, False], [False, True]])
    truncated = np.array([[False, False], [False, True], [False, False], [False, True]])
    np.testing.assert_array_equal(compiled(episode_cumsum, x, terminated, truncated), [[1, 1], [3, 2], [4, 4], [12, 12]])
    np.testing.assert_array_equal(compiled(episode_sum, x, terminated, truncated), [[3, 1], [3, 2], [12, 12], [12, 12]])


def test_time_discount():
    np.testing.assert_allclose(compiled(returns.time_discount, np.array([0, 1, 3]), discount=0.5), [1.0, 0.5, 0.125], **TOLERANCE)
    np.testing.assert_allclose(compiled(returns.time_discount, np.array([0, 1]), discount=0.0), [1.0, 0.0], **TOLERANCE)


def test_no_gradient_passes_through_any_return():
    reward, value, next_value, terminated, truncated = experience()
    flags = terminated, truncated

    def everything(reward, value, next_value):
        return sum(
            jnp.sum(jnp.square(x))
            for x in (
                returns.gae(reward, value, next_value, *flags, discount=DISCOUNT, gae_lambda=0.5),
                returns.lambda_return(reward, next_value, *flags, discount=DISCOUNT, trace_decay=0.5),
                returns.n_step_return(reward, next_value, *flags, discount=DISCOUNT, num_steps=3),
                returns.reward_to_go(reward, next_value, *flags, discount=DISCOUNT),
                returns.total_return(reward, jnp.zeros(reward.shape, int), *flags, discount=DISCOUNT),
            )
        )

    for gradient in compiled(jax.grad(everything, argnums=(0, 1, 2)), reward, value, next_value):
        np.testing.assert_array_equal(gradient, 0.0)


def test_one_stream_needs_no_second_axis():
    batch = experience((40, 1))
    wide = compiled(returns.gae, *batch, discount=DISCOUNT, gae_lambda=0.7)
    narrow = compiled(returns.gae, *(x[:, 0] for x in batch), discount=DISCOUNT, gae_lambda=0.7)
    np.testing.assert_array_equal(narrow, np.asarray(wide)[:, 0])


def test_advantage_of_a_transition_does_not_depend_on_its_place_in_the_batch():
    """Bit for bit: an empty row after each episode's end, as some vector environments have it, changes nothing else."""
    batch = experience((40,))
    ends = np.flatnonzero(batch[3] | batch[4])
    spread = [np.insert(x, ends + 1, 0) for x in batch]
    rows = np.insert(np.ones(40, bool), ends + 1, False)
    with_gaps = compiled(returns.gae, *spread, discount=DISCOUNT, gae_lambda=0.7)
    with_gaps = np.asarray(with_gaps)[rows]
    np.testing.assert_array_equal(with_gaps, compiled(returns.gae, *batch, discount=DISCOUNT, gae_lambda=0.7))


MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)


@pytest.mark.parametrize("limit", ["horizon", "truncated after two steps", "batch of two steps"])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_expected_gae_with_exact_values_is_the_advantage(limit, gae_lambda):
    theta = oracle.random_logits(MDP, 1)
    prob, batch = oracle.probability(theta, BATCH), BATCH
    if limit == "truncated after two steps":
        batch = batch._replace(truncated=(batch.time == 1) & ~batch.terminated & batch.valid)
    if limit == "batch of two steps":
        batch = batch._replace(**{name: column[:2] for name, column in batch._asdict().items() if column.ndim == 2})
    value, next_value = oracle.row_values(oracle.values(MDP, theta)[0], batch)
    advantage = compiled(
        returns.gae, batch.reward, value, next_value, batch.terminated, batch.truncated, discount=MDP.discount, gae_lambda=gae_lambda
    )
    prob, advantage, exact = np.asarray(prob), np.asarray(advantage), np.asarray(oracle.row_advantages(MDP, theta, batch))
    for time, state, action in np.ndindex(2, 2, 2):
        here = batch.valid[time] & (batch.state[time] == state) & (batch.action[time] == action)
        np.testing.assert_allclose(prob[here] @ advantage[time, here] / prob[here].sum(), exact[time, here][0], **TOLERANCE)


def test_expected_reward_to_go_is_the_action_value():
    theta = oracle.random_logits(MDP, 1)
    prob, action_value = np.asarray(oracle.probability(theta, BATCH)), oracle.values(MDP, theta)[1]
    result = compiled(
        returns.reward_to_go, BATCH.reward, jnp.zeros(BATCH.reward.shape), BATCH.terminated, BATCH.truncated, discount=MDP.discount
    )
    result = np.asarray(result)
    for time, state, action in np.ndindex(MDP.horizon, 2, 2):
        here = BATCH.valid[time] & (BATCH.state[time] == state) & (BATCH.action[time] == action)
        np.testing.assert_allclose(prob[here] @ result[time, here] / prob[here].sum(), action_value[time, state, action], **TOLERANCE)
