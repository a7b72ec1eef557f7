"""Tianshou's ReplayBuffer and PrioritizedReplayBuffer, full."""

from __future__ import annotations

from typing import Any

import numpy as np
from clock import print_time_of, read_job
from tianshou.data import PrioritizedReplayBuffer, ReplayBuffer

job = read_job()
size, rng = job["size"], np.random.default_rng(0)
ends, never = rng.random(size) < 0.01, np.zeros(size, bool)
columns: dict[str, Any] = {
    "obs": rng.standard_normal((size, job["observation"]), np.float32),
    "act": rng.standard_normal((size, job["action"]), np.float32),
    "rew": rng.standard_normal(size, np.float32),
    "terminated": ends,
    "truncated": never,
    "done": ends,
    "obs_next": rng.standard_normal((size, job["observation"]), np.float32),
}
buffer = ReplayBuffer.from_data(**columns)
if job["prioritised"]:
    buffer, full = PrioritizedReplayBuffer(size, alpha=0.5, beta=0.4), buffer
    buffer.update(full)
assert len(buffer) == size


def call() -> None:
    """Draw a minibatch, and give it new priorities where there are any."""
    _, index = buffer.sample(job["batch_size"])
    if job["prioritised"]:
        buffer.update_weight(index, rng.random(job["batch_size"]))


print_time_of(call, job, 1)
