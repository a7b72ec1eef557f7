"""SBX, Stable-Baselines3's algorithms in JAX, which take the same settings."""

from __future__ import annotations

import os

from clock import read_job

if __name__ == "__main__":  # the processes of a SubprocVecEnv import this file
    job = read_job()
    if job["threads"] == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # read when JAX starts

    import flax
    from measure_sb3 import dqn_arguments, measure, ppo_arguments, sac_arguments, td3_arguments
    from sbx import DQN, PPO, SAC, TD3

    settings, num_envs = job["settings"], job["num_envs"]
    if job["algorithm"] == "ppo":
        measure(job, PPO, ppo_arguments(settings), flax.linen.tanh)
    elif job["algorithm"] == "dqn":
        arguments = dqn_arguments(settings, num_envs)
        del arguments["max_grad_norm"]  # it clips no gradients
        measure(job, DQN, arguments, flax.linen.relu)
    else:
        algorithm, arguments_of = {"sac": (SAC, sac_arguments), "td3": (TD3, td3_arguments)}[job["algorithm"]]
        measure(job, algorithm, arguments_of(settings, num_envs), flax.linen.relu)
