"""Tianshou's off-policy trainer, with the settings that Surefoot has, by their names for them."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import torch
from clock import Clock, read_job
from tianshou.algorithm import DQN, SAC, TD3
from tianshou.algorithm.modelfree.ddpg import ContinuousDeterministicPolicy
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.modelfree.sac import AutoAlpha, SACPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, SubprocVectorEnv
from tianshou.exploration import GaussianNoise
from tianshou.trainer import OffPolicyTrainer, OffPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorDeterministic, ContinuousActorProbabilistic, ContinuousCritic


def critics(s: dict[str, Any], env: gymnasium.Env) -> dict[str, Any]:
    """What both methods for continuous actions are given: two critics and what is fitted how fast."""

    def critic() -> ContinuousCritic:
        shapes = {"state_shape": env.observation_space.shape, "action_shape": env.action_space.shape}
        return ContinuousCritic(preprocess_net=Net(**shapes, hidden_sizes=s["hidden"], concat=True))

    return {
        "critic": critic(),
        "critic2": critic(),
        "policy_optim": AdamOptimizerFactory(lr=s["actor_learning_rate"]),
        "critic_optim": AdamOptimizerFactory(lr=s["critic_learning_rate"]),
        "gamma": s["gamma"],
        "tau": s["target_rate"],
    }


def sac(s: dict[str, Any], env: gymnasium.Env) -> SAC:
    torso = Net(state_shape=env.observation_space.shape, hidden_sizes=s["hidden"])
    actor = ContinuousActorProbabilistic(preprocess_net=torso, action_shape=env.action_space.shape, unbounded=True, conditioned_sigma=True)
    policy = SACPolicy(actor=actor, action_space=env.action_space)
    rate = AdamOptimizerFactory(lr=s["temperature_learning_rate"])
    temperature = AutoAlpha(target_entropy=-math.prod(env.action_space.shape), log_alpha=0.0, optim=rate)
    return SAC(policy=policy, alpha=temperature, **critics(s, env))


def td3(s: dict[str, Any], env: gymnasium.Env) -> TD3:
    torso = Net(state_shape=env.observation_space.shape, hidden_sizes=s["hidden"])
    actor = ContinuousActorDeterministic(preprocess_net=torso, action_shape=env.action_space.shape)
    noise = GaussianNoise(sigma=s["exploration_noise"])
    policy = ContinuousDeterministicPolicy(actor=actor, action_space=env.action_space, exploration_noise=noise)
    smoothing = {"policy_noise": s["target_noise"], "noise_clip": s["target_noise_clip"], "update_actor_freq": s["policy_delay"]}
    return TD3(policy=policy, **smoothing, **critics(s, env))


def dqn(s: dict[str, Any], env: gymnasium.Env) -> DQN:
    """Does not clip gradients."""
    network = Net(state_shape=env.observation_space.shape, action_shape=env.action_space.n, hidden_sizes=s["hidden"])
    policy = DiscreteQLearningPolicy(model=network, action_space=env.action_space, eps_training=s["final_epsilon"])
    rates = {"optim": AdamOptimizerFactory(lr=s["learning_rate"]), "gamma": s["gamma"]}
    return DQN(policy=policy, target_update_freq=s["target_interval"], is_double=False, huber_loss_delta=1.0, **rates)


class Enough(Exception):
    """The trainer has no other way to be told."""


if __name__ == "__main__":
    job = read_job()
    settings, num_envs = job["settings"], job["num_envs"]
    torch.set_num_threads(job["threads"])
    vec_env_class = {"DummyVecEnv": DummyVectorEnv, "SubprocVecEnv": SubprocVectorEnv}[job["vec_env"]]
    clock = Clock(job)
    algorithm = {"sac": sac, "td3": td3, "dqn": dqn}[job["algorithm"]](settings, gymnasium.make(job["environment"]))
    environments = vec_env_class([lambda: gymnasium.make(job["environment"])] * num_envs)
    collector = Collector(algorithm, environments, VectorReplayBuffer(settings["replay_size"], num_envs), exploration_noise=True)
    collector.reset()
    collector.collect(n_step=clock.filling * clock.iteration_steps, random=True)

    def begin_iteration(epoch: int, steps: int) -> None:
        clock.tick(1 if steps else clock.filling)
        if clock.enough:
            raise Enough

    parameters = OffPolicyTrainerParams(
        training_collector=collector,
        training_fn=begin_iteration,
        max_epochs=1,
        epoch_num_steps=10**9,
        collection_step_num_env_steps=clock.iteration_steps,
        update_step_num_gradient_steps_per_sample=settings["update_to_data"],
        batch_size=settings["minibatch_size"],
        verbose=False,
        show_progress=False,
    )
    try:
        OffPolicyTrainer(algorithm, parameters).run(reset_collectors=False)
    except Enough:
        environments.close()
        clock.print_result()
