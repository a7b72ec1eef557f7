"""Variance of the policy-gradient estimate from one episode, by what each action is credited with, on the ridge."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ...math.policy_gradient import score_function_loss
from ...math.returns import reward_to_go, total_return
from ..curves import COLOURS, Vector, write_names
from .drawing import few_powers, label
from .ridge import HORIZON, TIMID, log_policy, values, walks

SENTENCE = "Every rung of the ladder estimates the same gradient on average, and each leaves out noise that the rung before it kept."
RUNGS = "total return", "reward-to-go", "reward-to-go less V", "exact advantage"


class Numbers(NamedTuple):
    """Exact moments of the gradient estimate from one episode, by the number of its steps."""

    num_steps: Vector  # [H]
    mean: Vector  # [H, rungs, D]
    variance: Vector  # [H, rungs] trace of the covariance


def compute() -> Numbers:
    """Sums over every walk. A shorter episode is the beginning of a longer one, and counted as often as it can go on."""
    batch = walks()
    value, action_value = values(jnp.asarray(TIMID))

    def log_prob(theta: jax.Array) -> jax.Array:
        return jnp.where(batch.valid, log_policy(theta)[batch.position, batch.action], 0.0)

    def moments(num_steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        counts = batch.valid & (batch.time < num_steps)
        reward, ends = jnp.where(counts, batch.reward, 0.0), (batch.terminated, np.zeros_like(batch.terminated))
        place = HORIZON - num_steps + batch.time, batch.position  # values are those with as many steps to go
        to_go = reward_to_go(reward, jnp.zeros_like(reward), *ends, discount=1.0)
        credits = jnp.stack(
            [
                total_return(reward, batch.time, *ends, discount=1.0),
                to_go,
                to_go - value[place],
                action_value[(*place, batch.action)] - value[place],
            ]
        )

        def estimates(theta: jax.Array) -> jax.Array:
            loss = jax.vmap(score_function_loss, (None, 0))(log_prob(theta), credits)
            return -jnp.sum(jnp.where(counts, loss, 0.0), axis=1)

        estimate = jax.jacfwd(estimates)(jnp.asarray(TIMID))  # [rungs, N, D]
        mean = jnp.einsum("n,rnd->rd", prob, estimate)
        return mean, jnp.einsum("n,rnd->r", prob, jnp.square(estimate - mean[:, None]))

    prob = batch.slip_prob * jnp.exp(jnp.sum(log_prob(jnp.asarray(TIMID)), axis=0))
    num_steps = np.arange(1, HORIZON + 1)
    mean, variance = jax.jit(jax.vmap(moments))(num_steps)
    return Numbers(num_steps, np.asarray(mean), np.asarray(variance))


def draw(figure: Figure, numbers: Numbers) -> None:
    """One line for each rung."""
    axes = figure.add_subplot()
    ends = []
    for rung, line, colour in zip(RUNGS, numbers.variance.T, COLOURS, strict=False):
        axes.plot(numbers.num_steps, line, "o-", color=colour, linewidth=2, markersize=5, clip_on=False, zorder=3)
        ends.append((float(line[-1]), rung, {"color": colour}))
    axes.set_yscale("log")
    few_powers(axes.yaxis, 0.1, 1, 10)
    label(axes, "steps of an episode", "variance of the gradient from one episode")
    write_names(axes, ends, gap=0.055)
