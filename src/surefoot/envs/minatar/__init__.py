"""MinAtar (Young & Tian 2019, arXiv:1903.03176): five Atari games on a board of 10 x 10, stepped inside the compiled program.

One file for each game, written from how version 1.0.15 of the authors' package plays; `tests/envs/test_minatar.py` holds every step to
it. As in its defaults an action is replaced by the one before with a probability of 0.1, and games that can grow harder do. Ids are
the package's: v0 has all six actions, v1 those that do something in the game. Two things differ: an episode's first action has only
"do nothing" before it, where the package remembers the last of the episode before; and there is a time limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete

from .asterix import ASTERIX
from .breakout import BREAKOUT
from .freeway import FREEWAY
from .game import NOTHING, NUM_ACTIONS, SIZE, Game
from .seaquest import SEAQUEST
from .space_invaders import SPACE_INVADERS

GAMES = {"Asterix": ASTERIX, "Breakout": BREAKOUT, "Freeway": FREEWAY, "Seaquest": SEAQUEST, "SpaceInvaders": SPACE_INVADERS}
STICKINESS = 0.1  # the probability that the last action is taken again
# The original has none. An evaluation must end, though, also that of a paddle which never misses: four times as long as Freeway, whose
# own end at 2,501 steps is a termination, and longer than nearly all episodes of published agents. The learner bootstraps there.
MAX_EPISODE_STEPS = 10_000


class State(NamedTuple):
    """A game that is being played."""

    game: Any
    last_action: jax.Array  # [] int32, one of all six
    key: jax.Array


@jax.tree_util.register_static  # an environment may be an argument of a jitted function
@dataclass(frozen=True, eq=False)  # spaces cannot be hashed; identity can, and jit needs a hash
class MinAtar:
    """A `DeviceEnvironment`: a game with sticky actions, and the actions that it is played with."""

    name: str
    game: Game
    actions: tuple[int, ...]
    max_episode_steps: int = MAX_EPISODE_STEPS

    @property
    def observation_space(self) -> Box:
        """One bit for each cell and channel, which a network sees as 0 or 1."""
        return Box(0, 1, (SIZE, SIZE, len(self.game.channels)), np.bool_)

    @property
    def action_space(self) -> Discrete:
        return Discrete(len(self.actions))

    def reset(self, key: jax.Array) -> tuple[State, jax.Array]:
        """Begin an episode."""
        key, draw_key = jax.random.split(key)
        state = self.game.reset(jax.random.uniform(draw_key, (self.game.num_draws,)))
        return State(state, jnp.int32(NOTHING), key), self.game.observe(state)

    def step(self, state: State, action: jax.Array) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """Take `action`, or now and then the last one again."""
        key, draw_key = jax.random.split(state.key)
        draws = jax.random.uniform(draw_key, (1 + self.game.num_draws,))
        return self.step_with(state._replace(key=key), action, draws)

    def step_with(self, state: State, action: jax.Array, draws: jax.Array) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """The step that these numbers in [0, 1) lead to: one for stickiness, the others for the game."""
        action = jnp.where(draws[0] < STICKINESS, state.last_action, jnp.asarray(self.actions, jnp.int32)[action])
        game, reward, terminated = self.game.advance(state.game, action, draws[1:])
        return State(game, action, state.key), self.game.observe(game), reward, terminated


MINATAR: dict[str, MinAtar] = {
    environment.name: environment
    for name, game in GAMES.items()
    for environment in (
        MinAtar(f"MinAtar/{name}-v0", game, tuple(range(NUM_ACTIONS))),
        MinAtar(f"MinAtar/{name}-v1", game, game.actions),
    )
}
