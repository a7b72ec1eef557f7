"""Figures that explain: each is computed by the functions that training calls, in 64-bit floats, and shows one sentence.

A module has `SENTENCE`, `compute()`, which gives the numbers, and `draw(figure, numbers)`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import jax
import matplotlib
from matplotlib.figure import Figure

from ...config import nearest
from . import bias_variance, cliff, clip, distance, gap, importance, surrogate, variance

FIGURES = {
    "cliff": cliff,
    "importance": importance,
    "clip": clip,
    "surrogate": surrogate,
    "distance": distance,
    "variance": variance,
    "bias-variance": bias_variance,
    "gap": gap,
}
ENDINGS = ".png", ".svg"


def sentence(name: str) -> str:
    """What the figure shows. Raises ValueError for a figure that there is not."""
    if name not in FIGURES:
        raise ValueError(f"There is no figure {name!r}{nearest(name, FIGURES)} Figures: {', '.join(FIGURES)}.")
    return FIGURES[name].SENTENCE


def write(name: str, out: str | Path) -> None:
    """Draw a figure, its sentence above it, into `out`, whose ending chooses PNG or SVG; the same bytes at every call.

    Raises ValueError for a figure that there is not, another ending, or a directory that is not there.
    """
    out, title = Path(out), sentence(name)
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"A figure is written to a .png or .svg, got {out.name!r}; choose one of these endings.")
    if not out.parent.is_dir():
        raise ValueError(f"There is no directory {out.parent} to write {out.name} into; make it first.")
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    with jax.enable_x64(True):
        FIGURES[name].draw(figure, FIGURES[name].compute())
    figure.suptitle(textwrap.fill(title, 92), x=0.01, ha="left", fontsize=11.5)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, dpi=160, metadata={"Date": None} if out.suffix.lower() == ".svg" else {})
