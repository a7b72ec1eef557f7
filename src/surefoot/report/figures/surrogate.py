"""The clipped surrogate of PPO. Schulman et al. 2017, arXiv:1707.06347, eq. 7 and figure 1; Ye et al. 2020, arXiv:1912.09729, eq. 5."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ...math.policy_gradient import clipped_surrogate_loss, surrogate_loss
from ..curves import COLOURS, INK, Vector
from .drawing import FAINT, label, note

SENTENCE = (
    "Clipped, the objective gains nothing beyond 1 ± ε on the side that the advantage favours; on the other side it still pulls back."
)
CLIP, DUAL_CLIP = 0.2, 2.0


class Numbers(NamedTuple):
    """Objectives, which are maximised, at advantage 1 and -1."""

    ratio: Vector  # [R]
    unclipped: Vector  # [2, R]
    clipped: Vector  # [2, R]
    dual_clipped: Vector  # [2, R]


def compute() -> Numbers:
    """Minus the losses that are minimised."""
    ratio = jnp.linspace(0.0, 3.0, 301)
    advantages = [jnp.full_like(ratio, sign) for sign in (1.0, -1.0)]
    return Numbers(
        np.asarray(ratio),
        -np.stack([surrogate_loss(ratio, advantage) for advantage in advantages]),
        -np.stack([clipped_surrogate_loss(ratio, advantage, clip=CLIP) for advantage in advantages]),
        -np.stack([clipped_surrogate_loss(ratio, advantage, clip=CLIP, dual_clip=DUAL_CLIP) for advantage in advantages]),
    )


def draw(figure: Figure, numbers: Numbers) -> None:
    """A panel for good actions and one for bad ones."""
    panels = figure.subplots(1, 2)
    titles = "A > 0: more of this action", "A < 0: less of this action"
    for panel, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.axvspan(1 - CLIP, 1 + CLIP, color="#f0f0f0", linewidth=0)
        axes.plot(numbers.ratio, numbers.unclipped[panel], color=FAINT, linestyle="dashed", linewidth=1.2)
        axes.plot(numbers.ratio, numbers.clipped[panel], color=COLOURS[panel], linewidth=2)
        axes.plot(1, numbers.unclipped[panel][numbers.ratio == 1], "o", color=INK, markersize=5, zorder=3)
        label(axes, r"ratio $\rho=\pi(a|s)\,/\,\pi_{\mathrm{old}}(a|s)$", "" if panel else "objective, in units of |A|", title)
        note(axes, (1 / 3, 0.04), "1 ± ε", ha="center")
    good, bad = panels
    apart = numbers.ratio >= DUAL_CLIP
    bad.plot(numbers.ratio[apart], numbers.dual_clipped[1, apart], color=COLOURS[1], linestyle="dashed", linewidth=2)
    good.set(ylim=(0, 3), xticks=range(4), yticks=range(4))
    bad.set(ylim=(-3, 0), xticks=range(4), yticks=range(-3, 1))
    note(good, (0.55, 0.64), r"$\rho A$", FAINT)
    note(good, (0.6, 0.35), "clipped", COLOURS[0])
    note(bad, (0.08, 0.96), r"$\rho A$", FAINT)
    note(bad, (0.02, 0.69), "clipped", COLOURS[1])
    note(bad, (0.75, 0.38), "dual clip", COLOURS[1])
