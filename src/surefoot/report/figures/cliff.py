"""One policy-gradient step of growing size, with and without a trust region, on the ridge."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...math.trust_region import backtracking_line_search
from ..curves import COLOURS, INK, Vector, write_names
from .drawing import FAINT, few_powers, label
from .ridge import ALTITUDE, CLIFF, TIMID, expected_kl, expected_return

SENTENCE = "Followed too far, the gradient that leads up the ridge leads over the cliff; held to a small KL, the step stays on the ridge."
MAX_KL = 0.01


class Numbers(NamedTuple):
    """What steps of each size lead to: as they are, and held within the trust region."""

    step_size: Vector  # [S]
    start_return: float
    returns: Vector  # [S]
    kl: Vector  # [S]
    held_returns: Vector  # [S]
    held_kl: Vector  # [S]


def compute() -> Numbers:
    """Exact gradient, returns and KL. The trust region ends, to 0.1 %, where the KL along the gradient reaches MAX_KL."""
    theta = jnp.asarray(TIMID)
    start, gradient = jax.jit(jax.value_and_grad(expected_return))(theta)
    step_size = np.geomspace(0.01, 5.0, 101)

    def is_within(part: jax.Array) -> jax.Array:
        return expected_kl(theta, theta + part * step_size[-1] * gradient) <= MAX_KL

    @jax.jit
    @jax.vmap
    def outcome(size: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = theta + size * gradient
        return expected_return(new), expected_kl(theta, new)

    part, _ = jax.jit(lambda: backtracking_line_search(is_within, factor=0.999, num_tries=10_000, dtype=gradient.dtype))()
    both = *outcome(step_size), *outcome(np.minimum(step_size, part * step_size[-1]))
    return Numbers(step_size, float(start), *(np.asarray(number) for number in both))


def draw(figure: Figure, numbers: Numbers) -> None:
    """Returns above, KL below, and what the ridge looks like."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    free, held, start = {"color": COLOURS[1]}, {"color": COLOURS[0]}, {"color": INK, "linestyle": "dotted"}
    above.axhline(numbers.start_return, **start, linewidth=1.2)
    for axes, lines in ((above, (numbers.returns, numbers.held_returns)), (below, (numbers.kl, numbers.held_kl))):
        for line, style in zip(lines, (free, held), strict=True):
            axes.plot(numbers.step_size, line, **style, linewidth=2)
    below.set(xscale="log", yscale="log")
    few_powers(below.xaxis, 0.01, 0.1, 1)
    few_powers(below.yaxis, 1e-4, 1e-2, 1)
    label(above, "", "expected return after the step")
    label(below, "step size", "KL(old || new)")
    figure.align_ylabels()
    draw_ridge(above.inset_axes((0.05, 0.07, 0.34, 0.46)))
    names = ("the step taken whole", free), (f"the step held\nto KL ≤ {MAX_KL}", held), ("before the step", start)
    heights = numbers.returns[-1], numbers.held_returns[-1], numbers.start_return
    write_names(above, [(float(height), *name) for height, name in zip(heights, names, strict=True)], gap=0.12)


def draw_ridge(axes: Axes) -> None:
    """Its profile, the fall cut short."""
    axes.stairs(np.append(ALTITUDE[:CLIFF], -2.5), baseline=-2.5, fill=True, color="#ececec")
    axes.stairs(np.append(ALTITUDE[:CLIFF], -2.5), baseline=None, color=FAINT, linewidth=1.5)
    axes.plot(0.5, 0.35, "o", color=INK, markersize=5)
    axes.text(0.2, 4.6, "each step pays the altitude", fontsize=8, color=INK)
    axes.text(CLIFF + 0.12, -2.2, f"the fall\ncosts {-ALTITUDE[-1]:.0f}", fontsize=8, color=INK)
    axes.set(xlim=(0, 6.7), ylim=(-2.5, 5.6))
    axes.axis("off")
