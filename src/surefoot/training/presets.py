"""Settings known to work: applied under what the user sets, announced at the start of a run, off with `preset=False`."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

from ..algorithms import of

PPO_CARTPOLE = {
    "gae_lambda": 0.98,
    "num_steps": 128,
    "minibatch_size": 256,
    "learning_rate": 1e-3,
    "learning_rate_schedule": "linear",
}
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
# Schulman et al. 2017, table 5, whose c1 weighs an error that is halved here; a critic on the actor's convolutions, as in its code.
ATARI_PPO = {
    "network": "nature",
    "shared_trunk": True,
    "num_steps": 128,
    "epochs": 3,
    "minibatch_size": 256,
    "learning_rate": 2.5e-4,
    "learning_rate_schedule": "linear",
    "clip": 0.1,
    "clip_schedule": "linear",
    "entropy_coef": 0.01,
    "value_coef": 1.0,
}
# Mnih et al. 2015, extended data table 1, but for Adam in place of RMSprop. Its million steps with more than `final_epsilon` are a
# tenth of ten million.
ATARI_DQN = {"network": "nature", "learning_starts": 50_000, "final_epsilon": 0.1}
# Hessel et al. 2018, table 1, in steps of four frames.
ATARI_RAINBOW = {"network": "nature", "learning_starts": 20_000, "target_interval": 2_000}
# Replay, step size and target's period are Dopamine's, whose thousand environment steps are 250 gradient steps.
MINATAR_RAINBOW = {"network": "minatar", "replay_size": 100_000, "learning_rate": 2.5e-4, "target_interval": 250}
MUJOCO_TRPO = {"initial_log_std": -1.0, "num_steps": 128, "critic_epochs": 20}
# By algorithm and environment, or a pattern of its id. The number of environments is the user's: every entry is for the default of 8.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("reinforce", "CartPole-v1"): {"num_steps": 128},
    ("ppo", "CartPole-v1"): PPO_CARTPOLE,
    ("ppo-penalty", "CartPole-v1"): PPO_CARTPOLE,
    ("ppo", "MountainCar-v0"): {"gamma": 0.999, "gae_lambda": 0.98, "num_steps": 512},
    ("ppo", "MountainCarContinuous-v0"): {"gamma": 0.999, "num_steps": 512, "entropy_coef": 0.01},
    ("ppo", "HalfCheetah-v5"): {"initial_log_std": -1.0, "learning_rate_schedule": "linear"},
    ("ppo", "Pendulum-v1"): {"gamma": 0.9, "gae_lambda": 0.9, "learning_rate": 1e-3, "learning_rate_schedule": "linear"},
    ("dqn", "CartPole-v1"): REPLAY_CARTPOLE | {"exploration_fraction": 0.4, "final_epsilon": 0.01},
    ("rainbow", "CartPole-v1"): REPLAY_CARTPOLE | {"n_step": 2, "target_rate": 0.01, "value_range": (0.0, 50.0)},
    ("off-policy-actor-critic", "CartPole-v1"): OFF_POLICY_CARTPOLE,
    ("ddpg", "Pendulum-v1"): PATHWISE_PENDULUM,
    ("td3", "Pendulum-v1"): PATHWISE_PENDULUM,
    ("sac", "Pendulum-v1"): PATHWISE_PENDULUM,
    ("trpo", "HalfCheetah-v5"): MUJOCO_TRPO,
    ("trpo", "Hopper-v5"): MUJOCO_TRPO,
    ("trpo", "Walker2d-v5"): MUJOCO_TRPO | {"initial_log_std": -0.5, "max_kl": 0.02},
    ("ppo", "*NoFrameskip-v4"): ATARI_PPO | {"normalise_reward": False},  # they are clipped
    ("ppo", "ALE/*-v5"): ATARI_PPO,
    ("dqn", "*NoFrameskip-v4"): ATARI_DQN,
    ("dqn", "ALE/*-v5"): ATARI_DQN,
    ("rainbow", "*NoFrameskip-v4"): ATARI_RAINBOW,
    ("rainbow", "ALE/*-v5"): ATARI_RAINBOW,
    ("dqn", "MinAtar/*"): MINATAR_RAINBOW | {"final_epsilon": 0.01},
    ("rainbow", "MinAtar/*"): MINATAR_RAINBOW,
}


def preset_for(config: Any, environment: str) -> dict[str, Any]:
    """The preset's settings for this algorithm and environment that the user has not set, and that something reads."""
    name, environment = of(config).name, environment.removeprefix("gymnasium:").partition("?")[0]
    preset = next((preset for (own, pattern), preset in PRESETS.items() if own == name and fnmatchcase(environment, pattern)), {})
    taken = config.explicit | getattr(config, "unread", {}).keys()
    return {name: value for name, value in preset.items() if name not in taken}


def with_settings(config: Any, settings: dict[str, Any]) -> Any:
    """`config` with other values for some settings."""
    return type(config)(**{**dataclasses.asdict(config), **settings}) if settings else config
