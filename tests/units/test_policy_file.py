"""A policy in the hand and in its file: what it takes, what it refuses, and that a file can neither change it nor run anything."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from surefoot import PPO, CheckpointError, load, networks
from surefoot.algorithms import ppo
from surefoot.normalise import normalise, update_normaliser
from surefoot.training.checkpoint import read_file, save_file
from surefoot.training.policy import Policy, describe
from surefoot.types import EnvironmentSpec

SPACES = {
    "box": (Box(-9.0, 9.0, (3,)), Discrete(4, start=2)),
    "continuous": (Box(-9.0, 9.0, (3,)), Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32))),
    "dictionary": (
        Dict(speed=Box(-9.0, 9.0, ()), image=Box(0, 255, (2, 2), np.uint8), inner=Dict(place=Discrete(3, start=1))),
        Discrete(3),
    ),
    "vector": (Box(-9.0, 9.0, (3,)), MultiDiscrete([[2, 3], [4, 1]], start=[[0, -1], [5, 2]])),
}


@functools.cache
def policy_for(kind, *, network="mlp", seed=0):
    """A policy whose normaliser has seen something, with a head large enough that observations matter."""
    config = PPO(hidden=(8,), num_steps=4, minibatch_size=4, network=network)
    spec = EnvironmentSpec(f"test-{kind}", *SPACES[kind], num_envs=2, has_action_mask=kind == "dictionary")
    acting = jax.jit(functools.partial(ppo.init, config, spec))(jax.random.key(seed)).acting
    acting = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), acting)
    normaliser = update_normaliser(acting.normaliser, observations(kind, 5, 2), jnp.ones((5, 2), bool))
    return Policy(config, spec, acting._replace(normaliser=normaliser))


def observations(kind, *leading, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "dictionary":
        image, place = rng.integers(0, 256, (*leading, 2, 2)).astype(np.uint8), rng.integers(1, 4, leading)
        return {"speed": rng.normal(size=leading), "image": image, "inner": {"place": place}}
    return rng.normal(size=(*leading, 3))


def row(obs, index):
    return jax.tree.map(lambda x: x[index], obs)


# Acting


@pytest.mark.parametrize("kind", SPACES)
def test_actions_for_one_observation_and_for_a_batch(kind):
    policy, obs = policy_for(kind), observations(kind, 16)
    actions = policy.act(obs)
    assert isinstance(actions, np.ndarray)
    assert actions.shape == (16, *policy.action_space.shape)
    for index in range(3):
        action = policy.act(row(obs, index))
        assert policy.action_space.contains(action)
        np.testing.assert_allclose(action, actions[index], rtol=1e-6)
    assert len(np.unique(actions, axis=0)) > 1
    assert all(policy.action_space.contains(action) for action in actions)


def test_the_deterministic_action_is_the_most_likely():
    policy, obs = policy_for("box"), observations("box", 16)
    actor, seen = policy.acting.actor, normalise(policy.acting.normaliser, obs.astype(np.float32))
    log_probs = jax.vmap(lambda row: actor.choose(actor.torso(row), None).log_probs)(seen)
    np.testing.assert_array_equal(policy.act(obs), np.argmax(log_probs, axis=-1) + 2)


@pytest.mark.parametrize("kind", ["box", "continuous"])
def test_deterministic_actions_repeat_and_drawn_ones_do_not(kind):
    policy, obs = policy_for(kind), observations(kind, 16)
    np.testing.assert_array_equal(policy.act(obs), policy.act(obs))
    first, second = (policy.act(obs, deterministic=False) for _ in range(2))
    assert (first != second).any()
    assert (first != policy.act(obs)).any()
    assert all(policy.action_space.contains(action) for action in np.concatenate([first, second]))


def test_draws_follow_from_the_seed():
    policy, obs = policy_for("box"), observations("box", 16)

    def draws(seed):
        fresh = Policy(policy.config, policy.spec, policy.acting, seed=seed)
        return [fresh.act(obs, deterministic=False).tolist() for _ in range(2)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)


def test_masked_actions_are_not_taken():
    policy, obs = policy_for("dictionary"), observations("dictionary", 16)
    forbidden = np.bincount(policy.act(obs)).argmax()
    mask = np.arange(3) != forbidden
    assert (policy.act(obs, action_mask=np.tile(mask, (16, 1))) != forbidden).all()
    assert all((policy.act(obs, deterministic=False, action_mask=np.tile(mask, (16, 1))) != forbidden).all() for _ in range(5))
    only = np.eye(3, dtype=np.int8)
    assert [policy.act(row(obs, 0), action_mask=only[index]) for index in range(3)] == [0, 1, 2]


def test_lists_and_integers_are_observations_too():
    policy = policy_for("box")
    assert policy.act([1, 2, 3]) == policy.act(np.array([1.0, 2.0, 3.0]))
    assert policy.act([[1, 2, 3]]).shape == (1,)


def test_policies_of_one_configuration_share_their_program(monkeypatch):
    """A run yields a policy with every report; compiling each would take longer than training."""
    policy, obs = policy_for("box"), observations("box", 16)
    expected = policy.act(obs)
    monkeypatch.setattr(jax.nn, "log_softmax", None)  # would be called if anything were traced again
    same_config = PPO(**{name: getattr(policy.config, name) for name in policy.config.explicit})
    np.testing.assert_array_equal(Policy(same_config, policy.spec, policy.acting).act(obs), expected)


@pytest.mark.parametrize(
    ("kind", "obs", "message"),
    [
        ("box", np.zeros(4), r"An observation of shape \(3,\), or a batch \[N, \.\.\.\] of them, was expected; got shape \(4,\)"),
        ("box", np.zeros((5, 4)), r"shape \(3,\), .* got shape \(5, 4\)"),
        ("box", np.zeros((3, 1)), r"shape \(3,\), .* got shape \(3, 1\)"),
        ("box", np.zeros((2, 5, 3)), r"shape \(3,\), .* got shape \(2, 5, 3\)"),
        ("box", 1.0, r"shape \(3,\), .* got shape \(\)"),
        ("box", {"a": np.zeros(3)}, r"shape \(3,\), .* got shape \(\)"),
        ("dictionary", np.zeros(3), "The observation does not fit Dict"),
        ("dictionary", {"speed": 1.0}, r"does not fit Dict.*KeyError\('image'\)|does not fit Dict.*KeyError\('inner'\)"),
        ("dictionary", observations("dictionary") | {"speed": np.zeros(2)}, "not all single, or all batches of one length"),
        ("dictionary", observations("dictionary", 2) | {"speed": np.zeros(3)}, "not all single, or all batches of one length"),
        ("dictionary", observations("dictionary") | {"image": np.full((2, 2), 0.5)}, "float64 values that the space .* cannot hold"),
        ("dictionary", observations("dictionary") | {"image": np.full((2, 2), 256)}, "int64 values that the space .* cannot hold"),
    ],
)
def test_observations_that_do_not_fit_are_refused(kind, obs, message):
    with pytest.raises(ValueError, match=message):
        policy_for(kind).act(obs)


@pytest.mark.parametrize(
    ("kind", "leading", "mask", "message"),
    [
        ("dictionary", (), np.ones(2), r"An action mask of shape \(3,\) was expected; got shape \(2,\)"),
        ("dictionary", (2,), np.ones(3), r"An action mask of shape \(2, 3\) was expected; got shape \(3,\)"),
        ("dictionary", (2,), np.ones((3, 3)), r"An action mask of shape \(2, 3\) was expected; got shape \(3, 3\)"),
        ("dictionary", (2,), np.array([[1, 1, 1], [0, 0, 0]]), "There is no legal action"),
        ("continuous", (), np.ones(2), "An action mask is for discrete actions"),
        ("vector", (), np.array([1, 1, 0, 0, 0, 1, 1, 1, 1, 1]), "There is no legal action"),
    ],
)
def test_masks_that_do_not_fit_are_refused(kind, leading, mask, message):
    with pytest.raises(ValueError, match=message):
        policy_for(kind).act(observations(kind, *leading), action_mask=mask)


# Memory


def test_a_policy_with_a_memory_remembers_until_it_is_reset():
    config = PPO(hidden=(8,), num_steps=4, minibatch_size=4, sequence_length=2, memory="gru", memory_size=6)
    spec = EnvironmentSpec("test", *SPACES["box"], num_envs=2)
    acting = jax.jit(functools.partial(ppo.init, config, spec))(jax.random.key(0)).acting
    policy = Policy(config, spec, jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape), acting))
    obs = observations("box", 40, 16)

    def play():
        return [policy.act(row) for row in obs]

    first, going_on = play(), play()
    assert np.any(first[0] != going_on[0])
    policy.reset()
    np.testing.assert_array_equal(play(), first)
    policy.reset(began=np.arange(16) < 8)
    again = play()
    np.testing.assert_array_equal(np.array(again)[:, :8], np.array(first)[:, :8])
    assert np.any(np.array(again)[:, 8:] != np.array(first)[:, 8:])
    with pytest.raises(ValueError, match=r"remembers other observations than one observation; call reset\(\)"):
        policy.act(obs[0, 0])
    with pytest.raises(ValueError, match=r"reset expects one truth value for each of the streams, shape \(16,\); got shape \(3,\)"):
        policy.reset(began=np.ones(3))
    policy.reset()
    assert policy.act(obs[0, 0]) == first[0][0]


def test_a_policy_without_a_memory_has_nothing_to_reset():
    policy, obs = policy_for("box"), observations("box", 16)
    actions = policy.act(obs)
    policy.reset()
    policy.reset(began=np.ones(3))
    np.testing.assert_array_equal(policy.act(obs), actions)


# The file


@pytest.mark.parametrize("kind", SPACES)
def test_a_policy_comes_back_bit_for_bit(kind, tmp_path):
    policy, obs = policy_for(kind), observations(kind, 16)
    path = policy.save(tmp_path / "policy.safetensors")
    back = load(path)
    assert back.config == policy.config
    assert back.spec == policy.spec
    np.testing.assert_array_equal(back.act(obs), policy.act(obs))
    fresh = Policy(policy.config, policy.spec, policy.acting)
    np.testing.assert_array_equal(back.act(obs, deterministic=False), fresh.act(obs, deterministic=False))
    assert jax.tree.structure(back.acting) == jax.tree.structure(policy.acting)
    for leaf, original in zip(jax.tree.leaves(back.acting), jax.tree.leaves(policy.acting), strict=True):
        np.testing.assert_array_equal(leaf, original)
    again = back.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert load(tmp_path).config == policy.config  # a run directory holds it under this name


def test_a_policy_comes_back_in_any_order_of_its_keys(tmp_path):
    """Gymnasium sorts the keys of a plain dictionary, and keeps the order of keyword arguments."""
    spaces = Dict(b=Box(-9.0, 9.0, (2,)), a=Box(-9.0, 9.0, (2,))), Discrete(4)
    config = PPO(hidden=(8,), num_steps=4, minibatch_size=4, normalise_observation=False)
    spec = EnvironmentSpec("test-order", *spaces, num_envs=2)
    acting = jax.jit(functools.partial(ppo.init, config, spec))(jax.random.key(0)).acting
    policy = Policy(config, spec, jax.tree.map(lambda x: 10 * x, acting))
    obs = {"a": np.random.default_rng(0).normal(size=(16, 2)), "b": np.random.default_rng(1).normal(size=(16, 2))}
    actions = policy.act(obs)
    assert (actions != policy.act({"a": obs["b"], "b": obs["a"]})).any()
    np.testing.assert_array_equal(load(policy.save(tmp_path / "policy.safetensors")).act(obs), actions)


SOURCE = """
import pathlib
pathlib.Path({trace!r}).touch()
import equinox, jax

class Torso(equinox.Module):
    mlp: equinox.nn.MLP

    def __init__(self, space, key):
        self.mlp = equinox.nn.MLP(3, 5, 4, depth=1, key=key)

    def __call__(self, obs):
        return self.mlp(obs)
"""


def test_a_file_of_a_network_of_ones_own_loads_with_its_class_and_never_imports_it(tmp_path, monkeypatch):
    trace = tmp_path / "was_imported"
    (tmp_path / "own_network.py").write_text(SOURCE.format(trace=str(trace)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(networks, "_factories", {})
    torso = importlib.import_module("own_network").Torso
    monkeypatch.delitem(sys.modules, "own_network")
    trace.unlink()

    policy, obs = policy_for("box", network=torso), observations("box", 16)
    path = policy.save(tmp_path / "policy.safetensors")
    np.testing.assert_array_equal(load(path).act(obs), policy.act(obs))  # this program knows the class

    networks._factories.clear()
    with pytest.raises(
        CheckpointError, match=r"'own_network:Torso' is not .* import the module 'own_network' first, or hand the class over"
    ):
        load(path)
    assert not trace.exists()
    assert "own_network" not in sys.modules
    back = load(path, network=torso)
    assert not trace.exists()
    np.testing.assert_array_equal(back.act(obs), policy.act(obs))
    assert back.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    networks._factories.clear()
    with pytest.raises(CheckpointError, match="does not fit"):
        load(path, network=lambda space, key: lambda obs: obs)


def test_a_file_that_is_missing_or_no_policy_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match=r"policy\.safetensors"):
        load(tmp_path)
    (tmp_path / "policy.safetensors").write_bytes(b"\x80\x04\x95cos\nsystem\n")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(tmp_path)


DISCRETE = {"type": "Discrete", "n": 4, "start": 2}


def nested(depth):
    data = DISCRETE
    for _ in range(depth):
        data = {"type": "Dict", "spaces": {"a": data}}
    return data


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "no such"},
        {"algorithm": ["ppo"]},
        {"config": None},
        {"config": {"gama": 0.9}},
        {"config": {"gamma": 2.0}},
        {"config": {"gamma": 10**400}},
        {"config": {"hidden": [[8]]}},
        {"config": {"hidden": [-1]}},
        {"config": {"hidden": [0]}},
        {"config": {"hidden": [2**62]}},
        {"config": {"minibatch_size": 7}},
        {"config": {"network": "os:system"}},
        {"config": {"network": "subprocess:Popen"}},
        {"config": {"network": "surefoot:train"}},
        {"config": {"network": "mlp "}},
        {"config": {"network": ":"}},
        {"environment": None, "num_envs": None},
        {"num_envs": -2},
        {"num_envs": float("inf")},
        {"observation_space": None},
        {"observation_space": DISCRETE},
        {"observation_space": {"type": "MultiBinary", "shape": [2**20, 2**20]}},
        {"observation_space": nested(300)},
        {"observation_space": {"type": "Discrete", "n": 2**62, "start": 0}},
        {"action_space": nested(1)},
        {"action_space": {"type": "MultiDiscrete", "nvec": [2], "start": [0], "dtype": "int64"}},
        {"action_space": {"type": "Discrete", "n": 5, "start": 0}},
        {"action_space": {"type": "Discrete", "n": 2**62, "start": 0}},
        {"action_space": {"type": "Box", "low": ["0"], "high": ["1"], "shape": [4], "dtype": "float32"}},
    ],
    ids=str,
)
def test_hostile_descriptions_are_refused(changes, tmp_path):
    policy = policy_for("box")
    info = describe(policy.config, policy.spec)
    if isinstance(changes.get("config"), dict):
        changes = {"config": info["config"] | changes["config"]}
    path = save_file(tmp_path / "policy.safetensors", policy.acting, info | changes)
    assert read_file(path)[1] != info
    with pytest.raises(CheckpointError):
        load(path)


def test_spaces_that_no_policy_could_have_are_refused(tmp_path):
    """The arrays would fit, and the actions would be infinite."""
    policy = policy_for("continuous")
    info = describe(policy.config, policy.spec)
    info["action_space"]["high"] = ["inf", "1"]
    with pytest.raises(CheckpointError, match="is unbounded"):
        load(save_file(tmp_path / "policy.safetensors", policy.acting, info))


@pytest.mark.parametrize("key", ["algorithm", "config", "environment", "observation_space", "action_space", "num_envs", "has_action_mask"])
def test_descriptions_that_lack_something_are_refused(key, tmp_path):
    policy = policy_for("box")
    info = describe(policy.config, policy.spec)
    del info[key]
    with pytest.raises(CheckpointError, match=f"makes no sense here: '{key}'"):
        load(save_file(tmp_path / "policy.safetensors", policy.acting, info))
