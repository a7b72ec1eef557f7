"""The performance-difference identity on the ridge, and the surrogate that takes the old policy's states for the new one's.

Kakade & Langford 2002, "Approximately Optimal Approximate Reinforcement Learning", lemma 6.1; Schulman et al. 2015, arXiv:1502.05477,
eqs. 2 and 3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ...math.policy_gradient import importance_ratio, surrogate_loss
from ..curves import COLOURS, INK, Vector
from .drawing import few_powers, label, note
from .ridge import TIMID, expected_kl, expected_return, log_policy, state_distribution, values

SENTENCE = "The gap between what the surrogate promises and what the step delivers shrinks with the KL, and faster than the promise."


class Numbers(NamedTuple):
    """Improvement of steps along the gradient, from near to far."""

    step_size: Vector  # [S]
    kl: Vector  # [S] KL(old || new)
    realised: Vector  # [S] J(new) - J(old)
    identity: Vector  # [S] advantages of the old policy, actions and states of the new one
    surrogate: Vector  # [S] advantages of the old policy, actions of the new one, states of the old one


def compute() -> Numbers:
    """All of them exact."""
    old = jnp.asarray(TIMID)
    start, gradient = jax.jit(jax.value_and_grad(expected_return))(old)

    def promised(new: jax.Array, distribution: jax.Array) -> jax.Array:
        value, action_value = values(old)
        advantage = action_value - value[..., None]
        ratio = jnp.broadcast_to(importance_ratio(log_policy(new), log_policy(old)), advantage.shape)
        prob = distribution[..., None] * jnp.exp(log_policy(old))
        return -jnp.sum(prob * surrogate_loss(ratio, advantage))

    def outcome(size: jax.Array) -> tuple[jax.Array, ...]:
        new = old + size * gradient
        improvements = expected_return(new) - start, promised(new, state_distribution(new)), promised(new, state_distribution(old))
        return expected_kl(old, new), *improvements

    step_size = np.geomspace(0.013, 1.4, 49)
    return Numbers(step_size, *(np.asarray(number) for number in jax.jit(jax.vmap(outcome))(step_size)))


def draw(figure: Figure, numbers: Numbers) -> None:
    """The improvement on the left, how much of it the surrogate gets wrong on the right."""
    left, right = figure.subplots(1, 2)
    left.plot(numbers.kl, numbers.surrogate, color=COLOURS[0], linewidth=2)
    left.plot(numbers.kl, numbers.realised, color=COLOURS[1], linewidth=2)
    left.plot(numbers.kl[::4], numbers.identity[::4], "o", color=COLOURS[1], markersize=5, clip_on=False, zorder=3)
    right.plot(numbers.kl, numbers.surrogate, color=COLOURS[0], linewidth=2)
    right.plot(numbers.kl, np.abs(numbers.surrogate - numbers.realised), color=INK, linewidth=2)
    label(left, "KL(old || new)", "improvement of the return", "promised and delivered")
    label(right, "KL(old || new)", "", "the promise and its gap")
    right.set_yscale("log")
    few_powers(right.yaxis, 1e-4, 1e-2, 1)
    for axes in (left, right):
        axes.set_xscale("log")
        few_powers(axes.xaxis, 1e-4, 1e-2, 1)
    note(left, (0.73, 0.66), "surrogate: advantages\nin states of the old policy", COLOURS[0], ha="right")
    note(left, (0.73, 0.185), "dots: advantages\nin states of the new policy", COLOURS[1], ha="right")
    note(left, (0.73, 0.055), "line: J(new) - J(old)", COLOURS[1], ha="right")
    note(right, (0.06, 0.82), "promised, " + r"$\propto\sqrt{\mathrm{KL}}$", COLOURS[0])
    note(right, (0.55, 0.4), "promised less\ndelivered, " + r"$\propto\mathrm{KL}$")
