"""The clip function of PPO. Schulman et al. 2017, arXiv:1707.06347, eq. 7."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ...math.policy_gradient import clipped_surrogate_loss
from ..curves import COLOURS, INK, Vector, write_names
from .drawing import FAINT, label

SENTENCE = "Clipping holds the ratio of new to old probability within 1 ± ε; where it is flat, no gradient pushes the policy further."
CLIPS = 0.1, 0.2, 0.3


class Numbers(NamedTuple):
    """The clip function for each of CLIPS."""

    ratio: Vector  # [R]
    clipped: Vector  # [C, R]


def compute() -> Numbers:
    """min(ratio, clipped) is the objective at advantage 1, -max(ratio, clipped) that at -1; the two add up to ratio + clipped."""
    ratio = jnp.linspace(0.5, 1.5, 201)
    both = [[clipped_surrogate_loss(ratio, jnp.full_like(ratio, sign), clip=clip) for sign in (1.0, -1.0)] for clip in CLIPS]
    return Numbers(np.asarray(ratio), np.stack([np.asarray(bad - good - ratio) for good, bad in both]))


def draw(figure: Figure, numbers: Numbers) -> None:
    """One line for each clip range over the ratio itself."""
    axes = figure.add_subplot()
    axes.plot(numbers.ratio, numbers.ratio, color=FAINT, linestyle="dashed", linewidth=1.2)
    axes.plot(1, 1, "o", color=INK, markersize=5, zorder=3)
    axes.annotate("old policy", (1, 1), (8, -14), textcoords="offset points", color=INK, fontsize=9)
    ends = [(1.5, "ratio itself", {"color": FAINT, "linestyle": "dashed"})]
    for clip, clipped, colour in zip(CLIPS, numbers.clipped, COLOURS, strict=False):
        axes.plot(numbers.ratio, clipped, color=colour, linewidth=2)
        ends.append((float(clipped[-1]), f"ε = {clip}", {"color": colour}))
    label(axes, r"ratio $\rho=\pi(a|s)\,/\,\pi_{\mathrm{old}}(a|s)$", r"clip$(\rho,\;1-\varepsilon,\;1+\varepsilon)$")
    axes.set_ylim(0.5, 1.5)
    write_names(axes, ends, gap=0.06)
