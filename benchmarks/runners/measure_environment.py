"""An environment alone, played at random as Surefoot's collector plays it: the speed that no learner on it can exceed."""

from __future__ import annotations

import jax
import numpy as np
from clock import Clock, read_job
from gymnasium.spaces import Discrete

from surefoot.collect import scan_rollout, start_stream
from surefoot.envs import is_device, make
from surefoot.spaces import action_size

job = read_job()
num_envs, num_steps = job["num_envs"], job["settings"]["num_steps"]
clock = Clock(job)
environment, spec = make(job["environment"], num_envs)

if is_device(environment):

    def act(obs, action_mask, carry, key):
        if isinstance(spec.action_space, Discrete):
            return jax.random.randint(key, num_envs, 0, spec.action_space.n), carry
        return jax.random.uniform(key, (num_envs, action_size(spec.action_space)), minval=-1.0, maxval=1.0), carry

    play = jax.jit(lambda stream, key: scan_rollout(environment, act, stream, num_steps, 1.0, key))
    stream, key = start_stream(environment, num_envs, jax.random.key(0)), jax.random.key(1)
    while not clock.enough:
        key, rollout_key = jax.random.split(key)
        stream, _ = jax.block_until_ready(play(stream, rollout_key))  # with the rollout, or nothing would compute its rewards
        clock.tick()
else:
    spec.action_space.seed(0)
    actions = np.array([[spec.action_space.sample() for _ in range(num_envs)] for _ in range(num_steps)])
    environment.reset(0)
    while not clock.enough:
        for action in actions:
            environment.step(action)
        clock.tick()
    environment.close()
clock.print_result()
