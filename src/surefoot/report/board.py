"""MinAtar as pictures: a colour for each channel of the observation, and its name beside the board."""

from __future__ import annotations

from typing import Any

import gymnasium
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..envs.minatar import MinAtar

CELL = 32  # pixels of a cell's side
LEGEND_WIDTH, TEXT = 160, 14  # pixels
BACKGROUND = (24, 24, 24)
FPS = 10


class Board(gymnasium.Env[Any, Any]):
    """What a game shows when its `state` is an observation [10, 10, C]; it plays nothing itself."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, environment: MinAtar):
        self.state = np.zeros(environment.observation_space.shape, bool)
        self.colours = colours(len(environment.game.channels))
        self.legend = legend(environment.game.channels, self.colours)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.state, {}

    def render(self) -> Any:
        """[320, 480, 3] uint8: where several channels meet, the last, as in the authors' package."""
        channels = np.arange(1, self.state.shape[-1] + 1)
        shown = np.array([BACKGROUND, *self.colours], np.uint8)[np.max(self.state * channels, axis=-1)]
        board = shown.repeat(CELL, axis=0).repeat(CELL, axis=1)
        board[::CELL], board[:, ::CELL] = 0, 0
        return np.concatenate([board, self.legend], axis=1)


def colours(count: int) -> np.ndarray[Any, Any]:
    """[count, 3] uint8, at most ten that are easily told apart."""
    assert count <= 10, f"{count} channels, and there are 10 colours"
    return np.round(255 * np.array(matplotlib.colormaps["tab10"].colors[:count])).astype(np.uint8)


def legend(names: tuple[str, ...], shades: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[320, 160, 3] uint8: the name of each channel beside its colour."""
    image = Image.new("RGB", (LEGEND_WIDTH, 10 * CELL))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    for index, (name, shade) in enumerate(zip(names, shades, strict=True)):
        middle = CELL * index + CELL // 2
        pen.rectangle((TEXT, middle - TEXT // 2, 2 * TEXT, middle + TEXT // 2), fill=tuple(shade))
        pen.text((3 * TEXT, middle), name, fill="white", font=font, anchor="lm")
    return np.asarray(image)
