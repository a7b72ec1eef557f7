"""Settings known to work: applied under what the user sets, announced at the start of a run, off with `preset=False`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..algorithms import of

REPLAY_CARTPOLE = {
    "gamma": 0.98,
    "num_steps": 16,
    "update_to_data": 1.0,
    "minibatch_size": 64,
    "replay_size": 50_000,
    "learning_rate": 2e-3,
    "learning_rate_schedule": "linear",
    "target_interval": 1,
    "target_rate": 0.02,
    "hidden": (128,),
    "activation": "tanh",
}
OFF_POLICY_CARTPOLE = {
    "gamma": 0.98,
    "num_steps": 16,
    "update_to_data": 0.5,
    "minibatch_size": 64,
    "replay_size": 50_000,
    "critic_learning_rate": 1e-3,
    "target_rate": 0.01,
    "hidden": (64, 64),
    "activation": "tanh",
}
PATHWISE_PENDULUM = {"learning_starts": 512, "hidden": (64, 64), "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
MUJOCO_TRPO = {"initial_log_std": -1.0, "num_steps": 128, "critic_epochs": 20}
# By algorithm and environment. The number of environments is the user's: every entry was tuned with the default of 8.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("reinforce", "CartPole-v1"): {"num_steps": 128},
    ("ppo", "CartPole-v1"): {
        "gae_lambda": 0.98,
        "num_steps": 128,
        "minibatch_size": 256,
        "learning_rate": 1e-3,
        "learning_rate_schedule": "linear",
    },
    ("ppo", "MountainCar-v0"): {"gamma": 0.999, "gae_lambda": 0.98, "num_steps": 512},
    ("ppo", "MountainCarContinuous-v0"): {"gamma": 0.999, "num_steps": 512, "entropy_coef": 0.01},
    ("ppo", "HalfCheetah-v5"): {"initial_log_std": -1.0, "learning_rate_schedule": "linear"},
    ("ppo", "Pendulum-v1"): {"gamma": 0.9, "learning_rate": 1e-3, "learning_rate_schedule": "linear"},
    ("dqn", "CartPole-v1"): REPLAY_CARTPOLE | {"exploration_fraction": 0.4, "final_epsilon": 0.01},
    ("rainbow", "CartPole-v1"): REPLAY_CARTPOLE | {"n_step": 2, "target_rate": 0.01, "value_range": (0.0, 50.0)},
    ("off-policy-actor-critic", "CartPole-v1"): OFF_POLICY_CARTPOLE,
    ("ddpg", "Pendulum-v1"): PATHWISE_PENDULUM,
    ("td3", "Pendulum-v1"): PATHWISE_PENDULUM,
    ("sac", "Pendulum-v1"): PATHWISE_PENDULUM,
    ("trpo", "HalfCheetah-v5"): MUJOCO_TRPO,
    ("trpo", "Hopper-v5"): MUJOCO_TRPO,
    ("trpo", "Walker2d-v5"): MUJOCO_TRPO | {"initial_log_std": -0.5, "max_kl": 0.02},
}


def preset_for(config: Any, environment: str) -> dict[str, Any]:
    """The preset's settings for this algorithm and environment that the user has not set, and that something reads."""
    preset = PRESETS.get((of(config).name, environment.removeprefix("gymnasium:")), {})
    taken = config.explicit | getattr(config, "unread", {}).keys()
    return {name: value for name, value in preset.items() if name not in taken}


def with_settings(config: Any, settings: dict[str, Any]) -> Any:
    """`config` with other values for some settings."""
    return type(config)(**{**dataclasses.asdict(config), **settings}) if settings else config
