"""Surefoot's replay inside a compiled program, as its algorithms use it: all minibatches of an iteration at once, or only one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from clock import print_time_of, read_job
from gymnasium.spaces import Box

from surefoot.replay import draw_prioritised, draw_uniform, importance_weight, insert, prioritise, start_replay, transitions
from surefoot.training.engine import compiler_options
from surefoot.types import EnvironmentSpec, Rollout

job = read_job()
size, shape = job["size"], (job["batches"], job["batch_size"])
space, actions = Box(-np.inf, np.inf, (job["observation"],), np.float32), Box(-1.0, 1.0, (job["action"],), np.float32)
spec, num_steps = EnvironmentSpec("Random", space, actions, job["num_envs"]), 25
replay = jax.jit(lambda: start_replay(spec, capacity=size, num_steps=num_steps, prioritised=job["prioritised"]))()


def rollout(index: jax.Array) -> Rollout:
    """Random rows of which one in a hundred ends an episode."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), 6)
    rows = num_steps, spec.num_envs
    obs, final_obs = (jax.random.normal(key, (*rows, job["observation"])) for key in keys[:2])
    return Rollout(
        obs=obs,
        action=jax.random.uniform(keys[2], (*rows, job["action"])),
        reward=jax.random.normal(keys[3], rows),
        terminated=jax.random.bernoulli(keys[4], 0.01, rows),
        truncated=jnp.zeros(rows, bool),
        final_obs=final_obs,
        valid=jnp.ones(rows, bool),
        time=jnp.ones(rows, jnp.int32),
        last_obs=jax.random.normal(keys[5], (spec.num_envs, job["observation"])),
        progress=jnp.zeros(()),
    )


def learn(priorities, others, count):
    """What a call gives: the minibatches of an iteration, and new priorities where there are any."""
    replay = others._replace(sums=priorities[0], max_priority=priorities[1])
    draw_key, priority_key = jax.random.split(jax.random.fold_in(jax.random.key(1), count))
    if not job["prioritised"]:
        return priorities, transitions(replay, draw_uniform(replay, draw_key, shape), n_step=1, discount=0.99)
    index, probability = draw_prioritised(replay, draw_key, shape)
    batches = transitions(replay, index, n_step=1, discount=0.99), importance_weight(replay, probability, exponent=0.4)
    replay = prioritise(replay, index, jax.random.uniform(priority_key, shape) + 1e-6)
    return (replay.sums, replay.max_priority), batches


fill = jax.jit(lambda replay, index: insert(replay, rollout(index)), donate_argnums=0, compiler_options=compiler_options())
for i in range(-(-size // (num_steps * spec.num_envs))):
    replay = fill(replay, np.int32(i))
assert replay.size > 0.95 * size - 100
program = jax.jit(learn, donate_argnums=0, compiler_options=compiler_options())
priorities, others = (replay.sums, replay.max_priority), replay._replace(sums=(), max_priority=None)
counter = iter(range(10**9))


def call() -> None:
    """One compiled call, of other minibatches than the last."""
    global priorities
    priorities, _ = jax.block_until_ready(program(priorities, others, np.int32(next(counter))))


print_time_of(call, job, job["batches"])
