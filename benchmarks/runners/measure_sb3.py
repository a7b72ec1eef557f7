"""Stable-Baselines3 and sb3-contrib, with the settings that Surefoot has, by their names for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from clock import Clock, read_job
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv


def ppo_arguments(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_steps": s["num_steps"],
        "batch_size": s["minibatch_size"],
        "n_epochs": s["epochs"],
        "learning_rate": s["learning_rate"],
        "gamma": s["gamma"],
        "gae_lambda": s["gae_lambda"],
        "clip_range": s["clip"],
        "ent_coef": s["entropy_coef"],
        "vf_coef": s["value_coef"] / 2,  # of a squared error that is not halved
        "max_grad_norm": s["max_grad_norm"],
        "normalize_advantage": s["normalise_advantage"],
        "device": "cpu",
    }


def a2c_arguments(s: dict[str, Any]) -> dict[str, Any]:
    names = "n_steps", "learning_rate", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm", "normalize_advantage", "device"
    shared = ppo_arguments(s | {"minibatch_size": None, "epochs": None, "clip": None})
    return {name: shared[name] for name in names}


def trpo_arguments(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_steps": s["num_steps"],
        "batch_size": s["minibatch_size"],
        "n_critic_updates": s["critic_epochs"],  # each is a pass over the batch
        "learning_rate": s["critic_learning_rate"],
        "gamma": s["gamma"],
        "gae_lambda": s["gae_lambda"],
        "target_kl": s["max_kl"],
        "cg_max_steps": s["cg_iterations"],
        "cg_damping": s["cg_damping"],
        "line_search_shrinking_factor": s["backtrack_factor"],
        "line_search_max_iter": s["backtrack_tries"],
        "sub_sampling_factor": round(1 / s["fisher_fraction"]),
        "normalize_advantage": True,
        "device": "cpu",
    }


def replay_arguments(s: dict[str, Any], num_envs: int) -> dict[str, Any]:
    return {
        "train_freq": s["num_steps"],  # of each environment
        "gradient_steps": round(s["update_to_data"] * s["num_steps"] * num_envs),
        "batch_size": s["minibatch_size"],
        "buffer_size": s["replay_size"],
        "learning_starts": s["learning_starts"],
        "learning_rate": s["learning_rate"] if "learning_rate" in s else s["critic_learning_rate"],  # the actor's too
        "gamma": s["gamma"],
        "tau": s["target_rate"],
        "device": "cpu",
    }


def sac_arguments(s: dict[str, Any], num_envs: int) -> dict[str, Any]:
    return replay_arguments(s, num_envs) | {"ent_coef": "auto", "target_entropy": "auto"}


def td3_arguments(s: dict[str, Any], num_envs: int) -> dict[str, Any]:
    return replay_arguments(s, num_envs) | {
        "policy_delay": s["policy_delay"],
        "target_policy_noise": s["target_noise"],
        "target_noise_clip": s["target_noise_clip"],
    }


def dqn_arguments(s: dict[str, Any], num_envs: int) -> dict[str, Any]:
    return replay_arguments(s, num_envs) | {
        "target_update_interval": round(s["target_interval"] / s["update_to_data"]),  # environment steps
        "exploration_fraction": s["exploration_fraction"],
        "exploration_final_eps": s["final_epsilon"],
        "max_grad_norm": s["max_grad_norm"],
    }


class Iterations(BaseCallback):
    """Ticks when an iteration has ended, which is when the next begins to collect; stops the training after enough."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > 0:
            self.clock.tick()

    def _on_step(self) -> bool:
        return not self.clock.enough


def measure(job: dict[str, Any], algorithm: type, arguments: dict[str, Any], activation: Any, **optimiser: Any) -> None:
    """Train until enough was seen, and print the result."""
    torch.set_num_threads(job["threads"])
    vec_env_class = {"DummyVecEnv": DummyVecEnv, "SubprocVecEnv": SubprocVecEnv}[job["vec_env"]]
    hidden = list(job["settings"]["hidden"])
    clock = Clock(job)
    env = make_vec_env(job["environment"], n_envs=job["num_envs"], vec_env_cls=vec_env_class)
    layers = hidden if job["algorithm"] == "dqn" else dict.fromkeys(("pi", "qf" if "replay_size" in job["settings"] else "vf"), hidden)
    policy = {"net_arch": layers, "activation_fn": activation, **optimiser}
    if (noise := job["settings"].get("exploration_noise")) is not None:
        shape = env.action_space.shape
        arguments = arguments | {"action_noise": NormalActionNoise(np.zeros(shape), np.full(shape, noise))}
    algorithm("MlpPolicy", env, policy_kwargs=policy, **arguments).learn(10**9, callback=Iterations(clock))
    env.close()
    clock.print_result()


if __name__ == "__main__":
    job = read_job()
    if job["algorithm"] == "ppo":
        from stable_baselines3 import PPO

        measure(job, PPO, ppo_arguments(job["settings"]), torch.nn.Tanh)
    elif job["algorithm"] == "a2c":
        from stable_baselines3 import A2C
        from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

        rmsprop = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
        measure(job, A2C, a2c_arguments(job["settings"]) | {"use_rms_prop": False}, torch.nn.Tanh, **rmsprop)
    elif job["algorithm"] == "trpo":
        from sb3_contrib import TRPO

        measure(job, TRPO, trpo_arguments(job["settings"]), torch.nn.Tanh)
    else:
        from stable_baselines3 import DQN, SAC, TD3

        algorithm, arguments = {"sac": (SAC, sac_arguments), "td3": (TD3, td3_arguments), "dqn": (DQN, dqn_arguments)}[job["algorithm"]]
        measure(job, algorithm, arguments(job["settings"], job["num_envs"]), torch.nn.ReLU)
