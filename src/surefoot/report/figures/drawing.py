"""What the figures share: axes with labels, and what is written on them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import NullLocator

from ..curves import INK, tidy

FAINT = "#a0a0a0"


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Axis labels, a title where there are several panels, and no more lines than are needed."""
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.margins(x=0)
    tidy(axes)


def note(axes: Axes, place: tuple[float, float], text: str, colour: str = INK, ha: str = "left") -> None:
    """Write `text` at a place given as fractions of the axes."""
    axes.text(*place, text, color=colour, fontsize=9, ha=ha, va="center", transform=axes.transAxes)


def few_powers(axis: Axis, *ticks: float) -> None:
    """On a logarithmic axis, these ticks and no others, as plain numbers."""
    axis.set_ticks(ticks)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
