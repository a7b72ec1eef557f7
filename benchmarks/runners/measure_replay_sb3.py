"""Stable-Baselines3's ReplayBuffer, full."""

from __future__ import annotations

import numpy as np
from clock import print_time_of, read_job
from gymnasium.spaces import Box
from stable_baselines3.common.buffers import ReplayBuffer

job = read_job()
space, actions = Box(-np.inf, np.inf, (job["observation"],), np.float32), Box(-1.0, 1.0, (job["action"],), np.float32)
buffer, rng = ReplayBuffer(job["size"], space, actions, device="cpu"), np.random.default_rng(0)
for rows in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
    rows[...] = rng.standard_normal(rows.shape, np.float32)
buffer.dones[...] = rng.random(buffer.dones.shape) < 0.01
buffer.full = True
print_time_of(lambda: buffer.sample(job["batch_size"]), job, 1)
