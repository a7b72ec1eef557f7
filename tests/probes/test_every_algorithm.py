"""Every algorithm on the probe environments, each of which fails for one cause only. One program for all probes of a kind."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.algorithms import ALGORITHMS, named
from surefoot.algorithms.a2c import A2C
from surefoot.algorithms.cem import CEM
from surefoot.algorithms.ppo import PPO
from surefoot.algorithms.ppo_penalty import PPOPenalty
from surefoot.algorithms.reinforce import REINFORCE
from surefoot.algorithms.trpo import TRPO
from surefoot.algorithms.trpo_penalty import TRPOPenalty
from surefoot.algorithms.vpg_adaptive import VPGAdaptive
from surefoot.collect import scan_rollout, start_stream
from surefoot.envs.probes import Probe, ProbeId, expectation
from surefoot.normalise import normalise
from surefoot.types import EnvironmentSpec

SHARED = {"gamma": 0.8, "hidden": (16,), "normalise_reward": False}
COMMON = SHARED | {"num_steps": 16, "minibatch_size": 64}
CRITIC = {"critic_epochs": 8, "critic_learning_rate": 1e-2}
SETTINGS: dict[str, Any] = {  # and iterations
    "reinforce": (REINFORCE(**COMMON, **CRITIC, window=8, learning_rate=2e-2), 60),
    "vpg-adaptive": (VPGAdaptive(**COMMON, **CRITIC, target_kl=0.01, learning_rate=2e-2), 60),
    "a2c": (A2C(**SHARED, learning_rate=2e-2), 1000),
    "trpo": (TRPO(**COMMON, **CRITIC, max_kl=0.02), 25),
    "trpo-penalty": (TRPOPenalty(**COMMON, **CRITIC, max_kl=0.02), 25),
    "ppo-penalty": (PPOPenalty(**COMMON, epochs=4, learning_rate=1e-2), 40),
    "ppo": (PPO(**COMMON, epochs=4, learning_rate=1e-2), 40),
    "cem": (CEM(num_steps=16, gamma=0.8), 60),
}
NUM_ENVS = 16


@partial(jax.jit, static_argnums=(0, 2))
def learn(name: str, probe_id: jax.Array, continuous: bool, key: jax.Array) -> Any:
    algorithm, (config, iterations) = named(name), SETTINGS[name]
    environment = Probe(probe_id, continuous)
    spec = EnvironmentSpec(environment.name, environment.observation_space, environment.action_space, NUM_ENVS)
    state = algorithm.init(config, spec, key)
    stream = start_stream(environment, NUM_ENVS, key, partial(algorithm.act, config, state.acting))

    def iteration(carry: Any, index: jax.Array) -> tuple[Any, None]:
        state, stream = carry
        act_key, update_key = jax.random.split(jax.random.fold_in(key, index))
        act = partial(algorithm.act, config, state.acting)
        stream, rollout = scan_rollout(environment, act, stream, config.num_steps, index / iterations, act_key)
        state, _ = algorithm.update(config, state, rollout, None, update_key)
        return (state, stream), None

    return jax.lax.scan(iteration, (state, stream), jnp.arange(iterations))[0][0]


@pytest.mark.parametrize("probe", list(ProbeId), ids=lambda probe: probe.name.lower())
@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_the_value_and_the_action_of_each_probe(name: str, probe: ProbeId, continuous: bool) -> None:
    state, config = learn(name, jnp.int32(probe), continuous, jax.random.key(1)), SETTINGS[name][0]
    expected = expectation(probe, config.gamma, continuous=continuous)
    if hasattr(state, "critic"):
        value = jax.vmap(state.critic, (0, None))(normalise(state.acting.normaliser, expected.obs), None)
        # An exploring policy earns less than the best action where the action matters: the critic is right to lie below.
        tolerance = 0.1 if expected.action is None else 0.2
        np.testing.assert_allclose(value, expected.value, atol=tolerance)
    if expected.action is not None:
        action, _ = named(name).act(config, state.acting, jnp.asarray(expected.obs), None, None, None)
        np.testing.assert_allclose(action, expected.action, atol=0.15 if continuous else 0)
