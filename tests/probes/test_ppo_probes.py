"""PPO on the probe environments: each fails for one cause only. All discrete probes run in one compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.algorithms import ppo
from surefoot.collect import scan_rollout, start_stream
from surefoot.envs.probes import Probe, ProbeId, expectation
from surefoot.normalise import normalise
from surefoot.types import EnvironmentSpec

CONFIG = ppo.PPO(gamma=0.8, num_steps=16, minibatch_size=64, epochs=8, learning_rate=3e-3, normalise_reward=False, clip=0.2)
NUM_ENVS, ITERATIONS = 16, 60


@partial(jax.jit, static_argnums=1)
def learn(probe_id: jax.Array, continuous: bool, key: jax.Array) -> ppo.State:
    environment = Probe(probe_id, continuous)
    spec = EnvironmentSpec(environment.name, environment.observation_space, environment.action_space, NUM_ENVS)
    state, stream = ppo.init(CONFIG, spec, key), start_stream(environment, NUM_ENVS, key)

    def iteration(carry: Any, index: jax.Array) -> tuple[Any, None]:
        state, stream = carry
        act_key, update_key = jax.random.split(jax.random.fold_in(key, index))
        act = partial(ppo.act, CONFIG, state.acting)
        stream, rollout = scan_rollout(environment, act, stream, CONFIG.num_steps, index / ITERATIONS, act_key)
        state, _ = ppo.update(CONFIG, state, rollout, None, update_key)
        return (state, stream), None

    return jax.lax.scan(iteration, (state, stream), jnp.arange(ITERATIONS))[0][0]


@pytest.mark.parametrize("probe", list(ProbeId), ids=lambda probe: probe.name.lower())
@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_ppo_learns_the_value_and_the_action_of_each_probe(probe: ProbeId, continuous: bool) -> None:
    state = learn(jnp.int32(probe), continuous, jax.random.key(1))
    expected = expectation(probe, CONFIG.gamma, continuous=continuous)
    value = jax.vmap(state.critic)(normalise(state.acting.normaliser, expected.obs))
    # An exploring policy earns less than the best action where the action matters: the critic is right to lie below.
    tolerance = 0.1 if expected.action is None else 0.2
    np.testing.assert_allclose(value, expected.value, atol=tolerance)
    if expected.action is not None:
        action, _ = ppo.act(CONFIG, state.acting, jnp.asarray(expected.obs), None, None, None)
        np.testing.assert_allclose(action, expected.action, atol=0.15 if continuous else 0)
