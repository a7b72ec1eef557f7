"""DQN and Rainbow: every target in plain Python, whole runs against a learner in NumPy, exploration, noise, and where it all ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import ENDS, FOLLOWING, PAID, Adam, best_values, every_pair
from gymnasium.spaces import Discrete
from jax.flatten_util import ravel_pytree

from surefoot.action_values import ActionValues, NoisyLinear
from surefoot.algorithms import dqn
from surefoot.algorithms.dqn import DQN, Acting, Rainbow
from surefoot.replay import Transitions, draw_prioritised, draw_uniform, insert
from surefoot.types import EnvironmentSpec, Rollout

S, A = 5, 3
SPEC = EnvironmentSpec("table", Discrete(S), Discrete(A), 2)
EXACT = {"rtol": 2e-5, "atol": 2e-6}
Small = partial(DQN, hidden=(), replay_size=64, learning_starts=1, gamma=0.9)

update = jax.jit(lambda config, state, rollout, key: dqn.update(config, state, rollout, None, key), static_argnums=0)


def network(seed, spec=SPEC, **options):
    return ActionValues(spec, jax.random.key(seed), network="mlp", hidden=(), activation="relu", **options)


def table(network, noise=None):
    """What the network puts out for each state, [S, A, K]."""
    return np.asarray(jax.vmap(network, (0, None))(jnp.arange(S), noise), np.float64)


# The network


def test_a_network_without_hidden_layers_is_a_table():
    one = network(0)
    np.testing.assert_allclose(table(one)[..., 0], (one.advantage.weight + one.advantage.bias[:, None]).T, rtol=1e-6)


@pytest.mark.parametrize("num_atoms", [1, 4])
def test_advantages_are_centred_over_actions_and_the_value_is_added(num_atoms):
    one = network(1, dueling=True, num_atoms=num_atoms)
    advantage = np.asarray(one.advantage.weight + one.advantage.bias[:, None]).T.reshape(S, A, num_atoms)
    value = np.asarray(one.value.weight + one.value.bias[:, None]).T.reshape(S, 1, num_atoms)
    expected = np.zeros((S, A, num_atoms))
    for s in range(S):
        for k in range(num_atoms):
            for a in range(A):
                expected[s, a, k] = value[s, 0, k] + advantage[s, a, k] - sum(advantage[s, :, k]) / A
    np.testing.assert_allclose(table(one), expected, **EXACT)


def test_values_are_means_of_distributions():
    output = np.random.default_rng(0).normal(size=(4, A, 6)).astype(np.float32)
    np.testing.assert_allclose(network(0, num_atoms=6).expected(output), output.mean(axis=-1), rtol=1e-5, atol=1e-6)
    p = np.exp(output) / np.exp(output).sum(axis=-1, keepdims=True)
    categorical = network(0, num_atoms=6, support=(-1.0, 4.0))
    np.testing.assert_allclose(categorical.expected(output), p @ np.array([-1.0, 0, 1, 2, 3, 4]), **EXACT)


# Targets and errors, one transition at a time


def some_transitions(*, masked):
    rng = np.random.default_rng(3)
    legal = rng.random((2, 40, A)) < 0.6
    legal[:, np.arange(40), rng.integers(A, size=40)] = True
    return Transitions(
        obs=rng.integers(S, size=40).astype(np.int32),
        action=rng.integers(A, size=40).astype(np.int32),
        reward=rng.normal(size=40).astype(np.float32),
        next_obs=rng.integers(S, size=40).astype(np.int32),
        discount=rng.choice([0.0, 0.729, 0.9], size=40).astype(np.float32),
        action_mask=legal[0] if masked else None,
        next_action_mask=legal[1] if masked else None,
    )


DISTRIBUTIONS = {
    "none": {},
    "categorical": {"distribution": "categorical", "num_atoms": 6, "value_range": (-1.0, 1.5)},
    "quantile": {"distribution": "quantile", "num_atoms": 5},
}


def networks_for(config):
    options = {
        "num_atoms": 1 if config.distribution == "none" else config.num_atoms,
        "support": config.value_range if config.distribution == "categorical" else None,
    }
    options |= {"dueling": config.dueling, "noisy": config.exploration == "noisy"}
    return network(11, **options), network(12, **options)


def target_by_definition(config, online, target, batch, i):
    """Of the i-th transition: a number, probabilities of atoms, or samples."""
    rows = {"online": online[batch.next_obs[i]], "target": target[batch.next_obs[i]]}  # [A, K]
    support = np.linspace(*config.value_range, config.num_atoms) if config.distribution == "categorical" else None

    def value(row):
        return row.mean() if support is None else np.exp(row) / np.exp(row).sum() @ support

    judged_by = rows["online" if config.double else "target"]
    legal = [a for a in range(A) if batch.next_action_mask is None or batch.next_action_mask[i][a]]
    following = rows["target"][max(legal, key=lambda a: value(judged_by[a]))]
    returns = [batch.reward[i] + batch.discount[i] * z for z in (following if support is None else support)]
    if config.distribution == "none":
        return returns[0]
    if support is None:
        return returns
    wanted, spacing = np.zeros(len(support)), support[1] - support[0]
    for p, z in zip(np.exp(following) / np.exp(following).sum(), returns, strict=True):
        place = (min(max(z, support[0]), support[-1]) - support[0]) / spacing
        low = min(int(np.floor(place)), len(support) - 2)
        wanted[low] += p * (low + 1 - place)
        wanted[low + 1] += p * (place - low)
    return wanted


@pytest.mark.parametrize("masked", [False, True], ids=["every action", "masked"])
@pytest.mark.parametrize("double", [False, True], ids=["one judge", "double"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_targets_and_errors_by_definition(distribution, double, masked):
    config = Small(double=double, dueling=masked, **DISTRIBUTIONS[distribution])
    online, target = networks_for(config)
    batch = some_transitions(masked=masked)
    got = dqn.target_of(config, online, target, batch, (None, None))
    expected = [target_by_definition(config, table(online), table(target), batch, i) for i in range(40)]
    np.testing.assert_allclose(got, expected, **EXACT)
    loss, error = dqn.errors(config, online, batch, got, None)
    for i in range(40):
        row = table(online)[batch.obs[i], batch.action[i]]
        if distribution == "none":
            difference = abs(row[0] - expected[i])
            wanted = 0.5 * difference**2 if difference < 1 else difference - 0.5, difference
        elif distribution == "categorical":
            wanted = (-expected[i] @ np.log(np.exp(row) / np.exp(row).sum()),) * 2
        else:
            total = 0.0
            for k, quantile in enumerate(row):
                for sample in expected[i]:
                    u = sample - quantile
                    huber = 0.5 * u**2 if abs(u) < 1 else abs(u) - 0.5
                    total += abs((k + 0.5) / 5 - (u < 0)) * huber / 5
            wanted = total, abs(np.mean(row) - np.mean(expected[i]))
        np.testing.assert_allclose([loss[i], error[i]], wanted, **EXACT)


# Whole runs against a learner in NumPy


class Tape:
    """Rows of two streams in which every observation has a number of its own: (action, reward, ends, what comes after)."""

    num_rows = 6 * 4 * 2
    spec = EnvironmentSpec("tape", Discrete(2 * num_rows), Discrete(A), 2)

    def __init__(self):
        rng, size = np.random.default_rng(4), (self.num_rows // 2, 2)
        self.obs = np.arange(self.num_rows, dtype=np.int32).reshape(size)
        self.action = rng.integers(A, size=size).astype(np.int32)
        self.reward = rng.normal(size=size).astype(np.float32)
        self.ended = rng.random(size) < 0.25
        self.terminated = self.ended & (rng.random(size) < 0.5)
        self.time = np.zeros(size, np.int32)
        for t in range(1, size[0]):
            self.time[t] = np.where(self.ended[t - 1], 0, self.time[t - 1] + 1)

    def rollout(self, index):
        rows = slice(4 * index, 4 * index + 4)
        after = self.obs[4 * index + 3] + 2
        return Rollout(
            obs=self.obs[rows],
            action=self.action[rows],
            reward=self.reward[rows],
            terminated=self.terminated[rows],
            truncated=(self.ended & ~self.terminated)[rows],
            final_obs=self.obs[rows] + self.num_rows,  # numbers that stand nowhere else
            valid=np.ones((4, 2), bool),
            time=self.time[rows],
            last_obs=after,
            progress=np.float32(index / 6),
        )

    def n_step(self, number, n, gamma, written):
        """(action, rewards, observation after them, discount) of the row `number` when `written` rows of each stream are there."""
        t, stream = divmod(number, 2)
        total = 0.0
        for k in range(n):
            total += gamma**k * self.reward[t + k, stream]
            if self.ended[t + k, stream]:
                return (
                    self.action[t, stream],
                    total,
                    number + 2 * k + self.num_rows,
                    0.0 if self.terminated[t + k, stream] else gamma ** (k + 1),
                )
            if t + k + 1 == written:
                break
        return self.action[t, stream], total, number + 2 * (k + 1), gamma ** (k + 1)


class Reference:
    """Everything between the rows that were drawn and the parameters that follow."""

    def __init__(self, config, flat):
        self.config, self.flat, self.target = config, np.array(flat, np.float64), np.array(flat, np.float64)
        self.adam, self.count = Adam(), 0

    def values(self, flat):
        weight, bias = flat[:-A].reshape(A, -1), flat[-A:]
        return (weight + bias[:, None]).T  # [S, A]

    def step(self, batch, weight):
        """One gradient step on [(number, action, reward, next, discount)]; the errors."""
        config, q, target_q = self.config, self.values(self.flat), self.values(self.target)
        gradient, errors = np.zeros((A, len(q))), []
        for (number, action, reward, after, discount), w in zip(batch, weight, strict=True):
            best = int(np.argmax((q if config.double else target_q)[after]))
            error = q[number, action] - (reward + discount * target_q[after, best])
            gradient[action, number] += w * np.clip(error, -1, 1) / len(batch)
            errors.append(abs(error))
        gradient = np.concatenate([gradient.ravel(), gradient.sum(axis=1)])
        norm = np.linalg.norm(gradient)
        self.flat = self.flat - config.learning_rate * self.adam(gradient * min(1.0, config.max_grad_norm / norm))
        self.count += 1
        if self.count % config.target_interval == 0:
            self.target = (1 - config.target_rate) * self.target + config.target_rate * self.flat
        return errors


@pytest.mark.parametrize(
    "settings",
    [
        {"target_interval": 4},
        {"target_interval": 5, "double": True, "n_step": 3},
        {"target_interval": 1, "target_rate": 0.1, "max_grad_norm": 0.05},
        {"target_interval": 2, "prioritised": True, "priority_exponent": 0.7, "importance_exponent": 0.3, "n_step": 2},
    ],
    ids=["copies", "double and three steps", "Polyak and clipped", "prioritised"],
)
def test_a_run_is_that_of_a_learner_in_numpy(settings):
    """Nothing is learned from the first 8 transitions; from then on 3 gradient steps follow on each 8."""
    config = Small(**{"max_grad_norm": np.inf} | settings, learning_starts=10, update_to_data=3 / 8, minibatch_size=7, learning_rate=0.05)
    tape, state = Tape(), jax.jit(partial(dqn.init, config, Tape.spec))(jax.random.key(0))
    reference = Reference(config, state.target)
    np.testing.assert_array_equal(ravel_pytree(state.acting.network)[0], state.target)
    for index in range(6):
        key, rollout = jax.random.fold_in(jax.random.key(7), index), tape.rollout(index)
        filled = insert(state.replay, rollout)
        before, (state, metrics) = state, update(config, state, rollout, key)
        assert metrics["replay_size"] == 8 * (index + 1)
        if index == 0:
            for old, new in zip(jax.tree.leaves(before[:4]), jax.tree.leaves(state[:4]), strict=True):
                np.testing.assert_array_equal(old, new)
            assert np.isnan(metrics["td_error"])
            jax.tree.map(np.testing.assert_array_equal, state.replay, filled)
            continue
        draw_key, weight = jax.random.split(key)[0], np.ones((3, 7))
        if config.prioritised:
            rows, probability = draw_prioritised(filled, draw_key, (3, 7))
            exponent = 0.3 + 0.7 * index / 6
            for k, p in enumerate(np.asarray(probability, np.float64)):
                weight[k] = [(8 * (index + 1) * each) ** -exponent for each in p]
                weight[k] /= max(weight[k])
        else:
            rows = draw_uniform(filled, draw_key, (3, 7))
        priority = {}
        errors = []
        for k in range(3):
            numbers = [int(filled.rows.obs[row]) for row in rows[k]]
            written = 4 * (index + 1)
            batch = [(number, *tape.n_step(number, config.n_step, 0.9, written)) for number in numbers]
            errors.append(reference.step(batch, weight[k]))
            priority |= dict(zip(map(int, rows[k]), errors[-1], strict=True))
        np.testing.assert_allclose(ravel_pytree(state.acting.network)[0], reference.flat, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(state.target, reference.target, rtol=1e-4, atol=2e-5)
        assert state.num_updates == reference.count == 3 * index
        np.testing.assert_allclose(metrics["td_error"], np.mean(errors), rtol=1e-4)
        if config.prioritised:
            expected = np.array(filled.sums[0])
            for row, error in priority.items():
                drawn_twice = np.sum(np.asarray(rows) == row) > 1
                expected[row] = state.replay.sums[0][row] if drawn_twice else (error + 1e-6) ** 0.7
            np.testing.assert_allclose(state.replay.sums[0], expected, rtol=1e-3)
            wanted = max(1.0, *[(error + 1e-6) ** 0.7 for each in errors for error in each], float(filled.max_priority))
            np.testing.assert_allclose(state.replay.max_priority, wanted, rtol=1e-3)


# Exploration


def acting(epsilon, seed=0):
    return Acting(network(seed), jnp.asarray(epsilon))


def test_the_probability_of_a_random_action_falls_linearly_and_acts_one_iteration_later():
    config = Small(exploration_fraction=0.5, final_epsilon=0.1, num_steps=1, update_to_data=1 / 8)
    state = dqn.init(config, EnvironmentSpec("pairs", Discrete(4), Discrete(2), 8), jax.random.key(0))
    assert state.acting.epsilon == 1.0
    for progress, epsilon in ((0.0, 1.0), (0.125, 0.775), (0.25, 0.55), (0.5, 0.1), (0.75, 0.1), (1.0, 0.1)):
        state, metrics = update(config, state, every_pair(progress), jax.random.key(1))
        np.testing.assert_allclose([state.acting.epsilon, metrics["epsilon"]], epsilon, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_random_actions_are_as_frequent_as_epsilon_says(epsilon):
    obs = jnp.zeros(20_000, jnp.int32)
    best = int(np.argmax(table(network(0))[0, :, 0]))
    action, _ = dqn.act(Small(), acting(epsilon), obs, None, None, jax.random.key(3))
    counts = np.bincount(action, minlength=A)
    expected = 20_000 * (epsilon / A + (1 - epsilon) * (np.arange(A) == best))
    assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(20_000 * 0.25) * (epsilon > 0))
    assert set(dqn.act(Small(), acting(epsilon), obs[:9], None, None, None)[0].tolist()) == {best}


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_illegal_actions_are_not_taken_at_random_or_otherwise(epsilon):
    mask = np.random.default_rng(0).random((5000, A)) < 0.5
    mask[np.arange(5000), np.random.default_rng(1).integers(A, size=5000)] = True
    obs = jnp.asarray(np.arange(5000) % S)
    for key in (None, jax.random.key(0)):
        action, _ = dqn.act(Small(), acting(epsilon), obs, mask, None, key)
        assert mask[np.arange(5000), action].all()
    noisy = Small(exploration="noisy")
    action, _ = dqn.act(noisy, Acting(network(0, noisy=True), jnp.zeros(())), obs, mask, None, jax.random.key(0))
    assert mask[np.arange(5000), action].all()


def test_noise_is_factorised_and_has_no_mean():
    layer, num = NoisyLinear(4, 3, jax.random.key(0)), 20_000

    def drawn(key):
        noise = layer.noise(key)
        return jax.vmap(layer, (0, None))(jnp.eye(4), noise), layer(jnp.zeros(4), noise)

    draw = jax.jit(jax.vmap(drawn))
    together, bias = (np.asarray(x, np.float64) for x in draw(jax.random.split(jax.random.key(1), num)))
    weight = together - bias[:, None]  # [num, in, out]
    of_output = (bias - layer.bias) / layer.bias_scale
    of_both = (weight - layer.weight) / layer.weight_scale
    of_input = of_both[:, :, :1] / of_output[:, None, :1]
    sure = np.abs(of_output[:, 0]) > 0.3  # what is divided by
    np.testing.assert_allclose(of_both[sure], (of_output[:, None] * of_input)[sure], rtol=1e-2, atol=2e-3)
    spread = np.sqrt(2 / np.pi)  # the variance of sign(x) sqrt|x| of a normal x
    for noise in (of_output, of_both.reshape(num, -1)):
        variance = spread if noise is of_output else spread**2
        assert np.all(np.abs(noise.mean(axis=0)) < 5 * np.sqrt(variance / num))
        np.testing.assert_allclose(noise.var(axis=0), variance, rtol=0.06)
    covariance = np.cov(of_both.reshape(num, -1).T)
    assert np.all(np.abs(covariance - np.diag(np.diag(covariance))) < 0.04), "uncorrelated, though not independent"
    np.testing.assert_allclose(layer(jnp.ones(4), None), layer.weight.sum(axis=0) + layer.bias, rtol=1e-5)
    np.testing.assert_allclose(layer.weight_scale, 0.5 / 2)


def test_noise_begins_with_the_types_that_an_update_leaves():
    """Or the program would be compiled twice."""
    layers = [NoisyLinear(4, 3, jax.random.key(0)), ravel_pytree(NoisyLinear(4, 3, jax.random.key(0)))[1](jnp.zeros(30))]
    before, after = ([(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(layer)] for layer in layers)
    assert before == after


def test_noisy_acting_varies_with_the_key_alone():
    config, obs = Small(exploration="noisy"), jnp.arange(S).repeat(4)
    one = Acting(network(5, noisy=True), jnp.zeros(()))
    taken = [tuple(dqn.act(config, one, obs, None, None, jax.random.key(k))[0].tolist()) for k in range(20)]
    again = [tuple(dqn.act(config, one, obs, None, None, jax.random.key(k))[0].tolist()) for k in range(20)]
    assert taken == again
    assert len(set(taken)) > 5
    greedy = np.argmax(table(one.network)[..., 0], axis=-1).repeat(4)
    np.testing.assert_array_equal(dqn.act(config, one, obs, None, None, None)[0], greedy)


def test_noise_is_drawn_anew_for_online_network_and_target():
    config = Small(exploration="noisy", double=True)
    online, target = networks_for(config)
    batch = some_transitions(masked=False)
    first, second, third = map(online.noise, jax.random.split(jax.random.key(0), 3))
    got = dqn.target_of(config, online, target, batch, (first, second))
    chosen = table(online, second)[batch.next_obs, :, 0].argmax(axis=-1)
    value = table(target, first)[batch.next_obs, chosen, 0]
    np.testing.assert_allclose(got, batch.reward + batch.discount * value, **EXACT)
    _, error = dqn.errors(config, online, batch, got, third)
    np.testing.assert_allclose(error, np.abs(table(online, third)[batch.obs, batch.action, 0] - got), **EXACT)


def test_every_gradient_step_draws_noise_of_its_own_for_each_of_three_passes(monkeypatch):
    config = Small(exploration="noisy", double=True, dueling=True, learning_starts=1, update_to_data=3 / 8, minibatch_size=7)
    given = []

    def recorded(name):
        function = getattr(dqn, name)

        def record(*arguments):
            jax.debug.callback(lambda *noises: given.extend(np.array(noise) for noise in noises), *jax.tree.leaves(arguments[-1]))
            return function(*arguments)

        return record

    for name in ("target_of", "errors"):
        monkeypatch.setattr(dqn, name, recorded(name))
    state = dqn.init(config, Tape.spec, jax.random.key(0))
    state, _ = jax.jit(partial(dqn.update, config))(state, Tape().rollout(0), None, jax.random.key(1))
    assert state.num_updates == 3
    jax.effects_barrier()
    assert len(given) == 3 * 3 * 2  # two heads
    assert len({noise.tobytes() for noise in given}) == len(given)


# Where it ends


@pytest.mark.parametrize(
    "settings", [{}, {"double": True, "dueling": True, "prioritised": True}], ids=["plain", "double dueling prioritised"]
)
def test_a_table_ends_at_the_values_of_the_best_policy(settings):
    """Transitions of every state and action, so that there is nothing to explore."""
    spec = EnvironmentSpec("pairs", Discrete(4), Discrete(2), 8)
    config = Small(
        num_steps=1,
        update_to_data=1.0,
        minibatch_size=32,
        target_interval=20,
        learning_rate=0.05,
        learning_rate_schedule="linear",
        **settings,
    )

    @jax.jit
    def run(state):
        def iteration(state, index):
            rollout = every_pair()._replace(progress=index / 300)
            return dqn.update(config, state, rollout, None, jax.random.fold_in(jax.random.key(0), index))[0], None

        return jax.lax.scan(iteration, state, jnp.arange(300))[0]

    state = run(dqn.init(config, spec, jax.random.key(0)))
    values = jax.vmap(state.acting.network)(jnp.arange(4))[..., 0]
    np.testing.assert_allclose(values, best_values(FOLLOWING, PAID, ENDS, 0.9), atol=0.01)


def test_rainbow_is_dqn_with_everything():
    config = Rainbow()
    assert (config.double, config.dueling, config.prioritised, config.n_step) == (True, True, True, 3)
    assert (config.exploration, config.distribution) == ("noisy", "categorical")
    state = dqn.init(Rainbow(hidden=(), replay_size=64, learning_starts=8), SPEC, jax.random.key(0))
    assert isinstance(state.acting.network.value, NoisyLinear)
    assert state.acting.network.advantage.weight.shape == (S, A * 51)
    assert state.replay.sums
    assert state.acting.epsilon == 0
