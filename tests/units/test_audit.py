"""The step audit against loops over rows and episodes, and its prediction against the oracle's exact surrogate."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import surefoot.audit
from surefoot.audit import mean_per_episode
from surefoot.distributions import Categorical, DiagonalGaussian
from surefoot.types import Rollout

step_audit = jax.jit(surefoot.audit.step_audit, static_argnames="discount")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
DISCOUNT = 0.9
NUM_STEPS, NUM_STREAMS = 7, 3


def rollout_of(action, time, valid):
    unused = dict.fromkeys(("obs", "reward", "terminated", "truncated", "final_obs", "last_obs", "progress"))
    return Rollout(action=action, time=time, valid=valid, **unused)


# Episodes of this batch, by stream: 2 3 4 | 0 1 2 3;  0 1 . 0 1 . 0 (a dot is an invalid row);  5 6 7 8 9 10 11.
TIME = np.array([[2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 0, 1, 0, 0], [5, 6, 7, 8, 9, 10, 11]]).T
VALID = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]], bool).T
PIECES = [[(0, 3), (3, 7)], [(0, 3), (3, 6), (6, 7)], [(0, 7)]]
NUM_EPISODES = 4


def random_step(kind, seed=0):
    """(old, new, action) of a step between two policies."""
    rng = np.random.default_rng(seed)
    shape = NUM_STEPS, NUM_STREAMS
    if kind == "categorical":
        old, new = (Categorical.from_logits(jnp.asarray(rng.normal(size=(*shape, 4)))) for _ in range(2))
        return old, new, jnp.asarray(rng.integers(4, size=shape))
    old, new = (
        DiagonalGaussian(jnp.asarray(rng.normal(size=(*shape, 2))), jnp.asarray(rng.normal(size=(*shape, 2)) / 4)) for _ in range(2)
    )
    return old, new, jnp.asarray(rng.normal(size=(*shape, 2)))


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_audit_against_loops(x64, kind):
    old, new, action = random_step(kind)
    advantage = np.random.default_rng(1).normal(size=(NUM_STEPS, NUM_STREAMS))
    audit = step_audit(old, new, rollout_of(action, TIME, VALID), jnp.asarray(advantage), discount=DISCOUNT)
    ratio = np.exp(np.asarray(new.log_prob(action)) - np.asarray(old.log_prob(action)))
    kl, entropy = np.asarray(old.kl_to(new)), np.asarray(new.entropy())
    rows = [(t, n) for t in range(NUM_STEPS) for n in range(NUM_STREAMS) if VALID[t, n]]
    weights = np.array([ratio[row] for row in rows])
    promise = {row: DISCOUNT ** TIME[row] * (ratio[row] - 1) * advantage[row] for row in rows}
    np.testing.assert_allclose(audit["kl"], np.mean([kl[row] for row in rows]), **EXACT)
    np.testing.assert_allclose(audit["entropy"], np.mean([entropy[row] for row in rows]), **EXACT)
    np.testing.assert_allclose(audit["ratio_min"], weights.min(), **EXACT)
    np.testing.assert_allclose(audit["ratio_max"], weights.max(), **EXACT)
    np.testing.assert_allclose(audit["effective_sample_size"], weights.sum() ** 2 / (weights**2).sum() / len(rows), **EXACT)
    mean = sum(promise.values()) / NUM_EPISODES
    np.testing.assert_allclose(audit["predicted_improvement"], mean, **EXACT)
    np.testing.assert_allclose(audit["predicted_improvement_error"], error_of(promise, mean), **EXACT)


def error_of(promise, mean):
    """Standard error of a ratio of sums over the pieces into which the episodes' beginnings cut the streams."""
    squares = 0.0
    for n, pieces in enumerate(PIECES):
        for begin, end in pieces:
            begins = int(TIME[begin, n] == 0 and VALID[begin, n])
            squares += (sum(promise.get((t, n), 0.0) for t in range(begin, end)) - mean * begins) ** 2
    return np.sqrt(squares * NUM_EPISODES / (NUM_EPISODES - 1)) / NUM_EPISODES


def test_invalid_rows_do_not_count(x64):
    old, new, action = random_step("categorical")
    wild = new.log_probs.at[~VALID].set(jnp.asarray([0.0, -50.0, -50.0, -50.0]))
    advantage = jnp.ones((NUM_STEPS, NUM_STREAMS))
    audits = [
        step_audit(old, Categorical(log_probs), rollout_of(action, TIME, VALID), values, discount=DISCOUNT)
        for log_probs, values in ((new.log_probs, advantage), (wild, jnp.where(VALID, advantage, jnp.nan)))
    ]
    for name in audits[0]:
        np.testing.assert_array_equal(audits[0][name], audits[1][name], err_msg=name)


def test_no_step_is_no_distance_and_no_improvement(x64):
    old, _, action = random_step("gaussian")
    audit = step_audit(old, old, rollout_of(action, TIME, VALID), jnp.ones((NUM_STEPS, NUM_STREAMS)), discount=DISCOUNT)
    expected = {
        "kl": 0,
        "ratio_min": 1,
        "ratio_max": 1,
        "effective_sample_size": 1,
        "predicted_improvement": 0,
        "predicted_improvement_error": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(audit[name], value, **EXACT, err_msg=name)


def test_where_no_episode_begins_the_prediction_is_nan_and_the_rest_is_not(x64):
    old, new, action = random_step("categorical")
    audit = step_audit(old, new, rollout_of(action, TIME + 1, VALID), jnp.ones((NUM_STEPS, NUM_STREAMS)), discount=DISCOUNT)
    for name, value in audit.items():
        assert np.isnan(value) == name.startswith("predicted_improvement"), name


def test_mean_per_episode_of_whole_episodes_is_their_mean_and_standard_error(x64):
    """One episode in each stream: the ratio is then a plain mean."""
    x = np.random.default_rng(0).normal(size=(4, 6))
    begins = np.zeros((4, 6), bool)
    begins[0] = True
    mean, error = mean_per_episode(jnp.asarray(x), begins=jnp.asarray(begins))
    np.testing.assert_allclose(mean, x.sum(0).mean(), **EXACT)
    np.testing.assert_allclose(error, x.sum(0).std(ddof=1) / np.sqrt(6), **EXACT)


def test_episodes_of_one_step_are_kept_apart_from_the_next_stream(x64):
    x = np.random.default_rng(0).normal(size=(4, 2))
    begins = np.array([[True, False]] * 4)
    mean, error = mean_per_episode(jnp.asarray(x), begins=jnp.asarray(begins))
    np.testing.assert_allclose(mean, x.sum() / 4, **EXACT)
    squares = np.sum((x[:, 0] - x.sum() / 4) ** 2) + x[:, 1].sum() ** 2
    np.testing.assert_allclose(error, np.sqrt(squares / 3 * 4) / 4, **EXACT)


def test_the_error_of_one_episode_is_unknown():
    begins = jnp.zeros((3, 2), bool).at[1, 0].set(True)
    mean, error = mean_per_episode(jnp.ones((3, 2)), begins=begins)
    assert mean == 6
    assert np.isnan(error)


def test_expected_prediction_is_the_exact_surrogate_improvement(x64):
    """Kakade & Langford 2002, eq. 4.1, summed over times, states and actions."""
    mdp = oracle.random_mdp(0)
    batch = oracle.trajectories(mdp)
    old, new = oracle.random_logits(mdp, 1), oracle.random_logits(mdp, 2)

    def audit_of(state, action, time, valid, advantage):
        policies = (Categorical(oracle.log_policy(theta)[state][:, None]) for theta in (old, new))
        rollout = rollout_of(action[:, None], time[:, None], valid[:, None])
        return step_audit(*policies, rollout, advantage[:, None], discount=mdp.discount)

    columns = (batch.state, batch.action, batch.time, batch.valid, oracle.row_advantages(mdp, old, batch))
    audits = jax.jit(jax.vmap(audit_of, in_axes=1))(*map(jnp.asarray, columns))
    prob = oracle.probability(old, batch)

    value, action_value = oracle.values(mdp, old)
    gain = jnp.exp(oracle.log_policy(new)) * (action_value - value[:-1, :, None])
    weight = mdp.discount ** np.arange(mdp.horizon)
    surrogate = jnp.sum(weight[:, None] * oracle.state_distribution(mdp, old) * jnp.sum(gain, axis=-1))
    np.testing.assert_allclose(prob @ audits["predicted_improvement"], surrogate, **oracle.TOLERANCE)
    assert abs(surrogate) > 0.01
    length = jnp.sum(batch.valid, axis=0)
    np.testing.assert_allclose(prob @ (audits["kl"] * length) / (prob @ length), oracle.expected_kl(mdp, old, new), **oracle.TOLERANCE)
