"""Bias and variance of n-step targets on a random walk, from TD(0) to Monte Carlo. Sutton & Barto 2018, example 7.1.

From each of 19 states in a row the walk goes left or right with equal probability; leaving at the right pays 1, at the left -1. The
critic that targets lean on knows nothing yet: it says 0 everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ...math.returns import n_step_return, reward_to_go
from ..curves import COLOURS, Vector, write_names
from .drawing import label, note

SENTENCE = (
    "A one-step target hardly varies and is almost as wrong as the critic it leans on; a Monte Carlo return is right on average and varies "
    "most; the least error lies between."
)
NUM_STATES = 19
NUM_STEPS = 1, 2, 4, 8, 16, 32, 64, 128
NUM_EPISODES = 100  # from each state
NUM_AVERAGED = 4  # targets, to show where their mean is closest to the value


class Numbers(NamedTuple):
    """Means over the states, [len(NUM_STEPS) + 1]; the last entry is Monte Carlo."""

    bias_squared: Vector
    variance: Vector
    measured_bias_squared: Vector
    measured_variance: Vector


def true_value() -> Vector:
    """[S]: a straight line between what the two ends pay."""
    return np.linspace(-1.0, 1.0, NUM_STATES + 2)[1:-1]


def exact_moments() -> tuple[Vector, Vector]:
    """Mean and variance of the targets of each state, both [len(NUM_STEPS) + 1, S], from those of its neighbours with a step less."""
    mean, square = np.zeros(NUM_STATES + 2), np.zeros(NUM_STATES + 2)
    mean[[0, -1]], square[[0, -1]] = (-1.0, 1.0), 1.0  # paid on leaving
    found = []
    for num_steps in range(1, max(NUM_STEPS) + 1):
        mean[1:-1], square[1:-1] = (mean[:-2] + mean[2:]) / 2, (square[:-2] + square[2:]) / 2
        if num_steps in NUM_STEPS:
            found.append((mean[1:-1].copy(), square[1:-1] - mean[1:-1] ** 2))
    found.append((true_value(), 1 - true_value() ** 2))
    means, variances = zip(*found, strict=True)
    return np.stack(means), np.stack(variances)


def sampled_targets() -> Vector:
    """Targets of the first step of episodes, [len(NUM_STEPS) + 1, S, NUM_EPISODES]."""
    rng = np.random.default_rng(0)
    position = np.repeat(np.arange(NUM_STATES), NUM_EPISODES)
    rewards, ends = [], []
    while (inside := (position >= 0) & (position < NUM_STATES)).any():
        position = np.where(inside, position + rng.choice([-1, 1], size=len(position)), position)
        ends.append(inside & ((position < 0) | (position == NUM_STATES)))
        rewards.append(np.where(ends[-1], np.sign(position), 0.0))
    reward, terminated = jnp.asarray(rewards), jnp.asarray(ends)
    critic, truncated = jnp.zeros_like(reward), jnp.zeros_like(terminated)
    batch = reward, critic, terminated, truncated

    @jax.jit
    def targets(*batch: jax.Array) -> jax.Array:
        of_steps = [n_step_return(*(rows[:n] for rows in batch), discount=1.0, num_steps=n)[0] for n in NUM_STEPS]
        return jnp.stack([*of_steps, reward_to_go(*batch, discount=1.0)[0]])

    return np.asarray(targets(*batch)).reshape(-1, NUM_STATES, NUM_EPISODES)


def compute() -> Numbers:
    """Exact and measured; a measured bias is relieved of what its own error adds to its square."""
    mean, variance = exact_moments()
    targets = sampled_targets()
    measured_variance = targets.var(axis=-1, ddof=1)
    measured_bias_squared = (targets.mean(axis=-1) - true_value()) ** 2 - measured_variance / NUM_EPISODES
    both = (mean - true_value()) ** 2, variance, measured_bias_squared, measured_variance
    return Numbers(*(np.mean(of_states, axis=-1) for of_states in both))


def draw(figure: Figure, numbers: Numbers) -> None:
    """Lines are exact, dots are measured."""
    axes = figure.add_subplot()
    place = np.arange(len(NUM_STEPS) + 1)
    mean_of_several = numbers.bias_squared + numbers.variance / NUM_AVERAGED
    ends = []
    for name, exact, measured, colour in (
        ("variance", numbers.variance, numbers.measured_variance, COLOURS[1]),
        ("squared bias", numbers.bias_squared, numbers.measured_bias_squared, COLOURS[0]),
        (f"squared error of the\nmean of {NUM_AVERAGED} targets", mean_of_several, None, COLOURS[2]),
    ):
        axes.plot(place[:-1], exact[:-1], color=colour, linewidth=2)
        axes.plot(place[-2:], exact[-2:], color=colour, linewidth=1.2, linestyle="dotted")
        if measured is not None:
            axes.plot(place, measured, "o", color=colour, markersize=5, clip_on=False, zorder=3)
        ends.append((float(exact[-1]), name, {"color": colour}))
    best = int(np.argmin(mean_of_several))
    axes.plot(best, mean_of_several[best], "*", color=COLOURS[2], markersize=12)
    axes.set_xticks(place, ["1\nTD(0)", *map(str, NUM_STEPS[1:]), "all\nMonte Carlo"])
    label(axes, "rewards in a target before it leans on the critic", "mean over the states")
    note(axes, (0.03, 0.93), f"lines: exact\ndots: measured in {NUM_EPISODES} episodes from each state")
    write_names(axes, ends)
