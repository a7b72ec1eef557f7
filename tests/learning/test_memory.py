"""A task that nobody solves without remembering: what the first observation showed decides which action the last one rewards."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

import surefoot as sf

LENGTH = 6


class Recall:
    """Observations [cue, time]: the cue, 1 or -1, is seen in the first alone."""

    name = "Recall"
    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(2)
    max_episode_steps = 100

    def reset(self, key: jax.Array) -> tuple[Any, jax.Array]:
        cue = jax.random.bernoulli(key).astype(jnp.int32)
        return (cue, jnp.int32(0)), jnp.stack([2.0 * cue - 1.0, 0.0])

    def step(self, state: Any, action: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        cue, time = state[0], state[1] + 1
        ended = time == LENGTH
        return (cue, time), jnp.stack([0.0, time / LENGTH]), jnp.where(ended & (action == cue), 1.0, 0.0), ended


COMMON = {"num_steps": 48, "hidden": (32,), "gamma": 1.0, "normalise_reward": False}
PPO = {"minibatch_size": 96, "sequence_length": 12, "learning_rate": 1e-3, "epochs": 4, "entropy_coef": 0.01}
A2C = {"num_steps": 12, "optimiser": "adam", "learning_rate": 3e-3, "learning_rate_schedule": "constant"}
CONFIGS = {
    "ppo": sf.PPO(**COMMON, **PPO, memory="gru"),
    "ppo, shared trunk": sf.PPO(**COMMON, **PPO, memory="gru", shared_trunk=True),
    "ppo-penalty": sf.PPOPenalty(**COMMON, **PPO, memory="gru"),
    "actor-critic": sf.ActorCritic(**COMMON | {"num_steps": 12}, memory="gru", learning_rate=3e-3),
    "a2c": sf.A2C(**COMMON | A2C, memory="gru"),
    "a2c-trust-region": sf.A2CTrustRegion(**COMMON | A2C, memory="gru"),
    "trpo": sf.TRPO(**COMMON, memory="gru", max_kl=0.02),
    "trpo-penalty": sf.TRPOPenalty(**COMMON, memory="gru", max_kl=0.02),
    "vpg-adaptive": sf.VPGAdaptive(**COMMON, memory="gru", target_kl=0.01, learning_rate=1e-2),
}


def success(config: Any, path: Path, seed: int) -> float:
    run = sf.train(config, Recall(), steps=60_000, num_envs=16, seed=seed, out=path / "run", progress=False)
    return float(run.evaluate(episodes=200).mean())


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_policy_with_a_memory_recalls_the_cue(name: str, seed: int, tmp_path: Path) -> None:
    assert success(CONFIGS[name], tmp_path, seed) == 1.0


def test_a_policy_without_one_can_but_guess(tmp_path: Path) -> None:
    assert success(sf.PPO(**COMMON, **PPO), tmp_path, 0) < 0.65
