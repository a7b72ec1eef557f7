"""Distance in parameters against distance in behaviour: normal policies before and after the same step of their mean."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from ...math.divergences import gaussian_kl
from ..curves import COLOURS, INK, Vector
from .drawing import few_powers, label, note

SENTENCE = "The same step in parameters takes a narrow policy a hundred times as far in behaviour as a policy ten times as wide."
STEP = 0.5
STDS = 1.0, 0.1


class Numbers(NamedTuple):
    """KL(old || new) of the step by standard deviation: of many policies, and of the two whose densities are drawn."""

    std: Vector  # [S]
    kl: Vector  # [S]
    drawn_kl: Vector  # [2], for STDS


def compute() -> Numbers:
    """KL of a step of the mean by STEP."""

    def kl(std: Vector) -> Vector:
        log_std, mean = jnp.log(jnp.asarray(std)), jnp.zeros(len(std))
        return np.asarray(gaussian_kl(mean, log_std, mean + STEP, log_std))

    std = np.geomspace(0.05, 2.0, 21)
    return Numbers(std, kl(std), kl(np.array(STDS)))


def draw(figure: Figure, numbers: Numbers) -> None:
    """The two policies before and after on the left, the KL of the step for every width on the right."""
    panels = figure.subplot_mosaic([["0", "kl"], ["1", "kl"]], width_ratios=(3, 2))
    panels["kl"].loglog(numbers.std, numbers.kl, color=INK, linewidth=1.5, zorder=1)
    for panel, (std, kl) in enumerate(zip(STDS, numbers.drawn_kl, strict=True)):
        axes, colour = panels[str(panel)], COLOURS[panel]
        action = std * np.linspace(-3.7, 3.7, 51)
        axes.fill_between(action + STEP, norm.pdf(action, scale=std), color=colour, alpha=0.35, linewidth=0)
        axes.plot(action, norm.pdf(action, scale=std), color=colour, linestyle="dashed", linewidth=1.5)
        label(axes, "action" if panel else "", "density", f"standard deviation {std:g}: KL = {kl:.3g}")
        axes.set(xlim=(-2.5, 3), ylim=(0, None))
        axes.tick_params(labelbottom=panel == 1)
        axes.yaxis.get_major_locator().set_params(nbins=3)
        panels["kl"].plot(std, kl, "o", color=colour, markersize=8)
    figure.align_ylabels([panels["0"], panels["1"]])
    note(panels["1"], (0.4, 0.85), "dashed:\nbefore the step", ha="right")
    note(panels["1"], (0.6, 0.85), f"filled:\nmean moved by {STEP}")
    few_powers(panels["kl"].xaxis, 0.1, 1)
    few_powers(panels["kl"].yaxis, 0.1, 1, 10)
    label(panels["kl"], "standard deviation", "KL(old || new)", "the same step, for every width")
