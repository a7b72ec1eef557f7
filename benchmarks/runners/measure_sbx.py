"""SBX, Stable-Baselines3's algorithms in JAX, which take the same settings."""

from __future__ import annotations

import os

from clock import read_job

if __name__ == "__main__":  # the processes of a SubprocVecEnv import this file
    job = read_job()
    if job["threads"] == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # read when JAX starts

    import flax
    from measure_sb3 import measure, ppo_arguments
    from sbx import PPO

    measure(job, {"ppo": PPO}[job["algorithm"]], ppo_arguments(job["settings"]), flax.linen.tanh)
