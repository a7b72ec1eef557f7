"""Atari games through ALE's vector environment as a `HostEnvironment`: N games stepped at once on threads.

`ALE/Pong-v5` is played by the protocol of Machado et al. 2018 (arXiv:1709.06009) as that id has it, `PongNoFrameskip-v4` by that of
Mnih et al. 2015 (Nature 518). `ALE/Pong-v5?frame_skip=5` sets something else; the settings are those of `Atari`. ALE emulates,
skips, pools, scales and stacks frames. Clipped rewards, lives and the limit of a game are kept here: the score of the whole game
stays known, and a game that is cut shows its last frame, which ALE's own limit leaves out. Where a game is over, ALE shows what
was there before the last emulated frame; nothing is valued there.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from ..config import check_bounds, configuration, nearest
from ..types import EnvironmentSpec, HostEnvironment, Observation, Step
from .boundary import Boundary, stream_seeds
from .mujoco import num_processors

ALE_LIMIT = 10**9  # frames, never reached
OLDEST = 0, 12, 1  # of ale-py: before it, a reset of some of the streams waits for ever


@configuration
class Atari:
    """How a game is played, seen and learned from."""

    repeat_action_probability: float
    """Probability at each emulated frame that the action before is repeated in place of the one chosen: sticky actions."""
    noop_max: int
    """A game begins with 0 to this many emulated frames without action, all equally likely."""
    fire_on_reset: bool
    """Press FIRE in the first of these frames, or in one more where there are none, if the game has that button."""
    end_on_life_loss: bool
    """Let an episode of the learner end where a life is lost, while the game goes on."""
    clip_reward: bool
    """Learn from rewards of -1, 0 and 1; results count the game's own."""
    frame_skip: int = 4
    """Emulated frames that an action is held for."""
    frame_pool: bool = True
    """Let a picture be the maximum of the last two of them: some games draw an object in every second frame only."""
    frame_stack: int = 4
    """Pictures in an observation."""
    height: int = 84
    """Rows of a picture."""
    width: int = 84
    """Columns of a picture."""
    grayscale: bool = True
    """Show brightness; otherwise red, green and blue along a last axis."""
    full_action_space: bool = False
    """Give all 18 actions; otherwise those that the game reads."""
    max_frames: int = 108_000
    """Emulated frames after which a game is cut: half an hour."""

    def __post_init__(self) -> None:
        check_bounds(self, repeat_action_probability="[0, 1]", noop_max="[0, inf)", frame_skip="[1, inf)", frame_stack="[1, inf)")
        check_bounds(self, height="[1, inf)", width="[1, inf)", max_frames="[1, inf)")


MACHADO_2018 = {"repeat_action_probability": 0.25, "noop_max": 0, "fire_on_reset": False, "end_on_life_loss": False, "clip_reward": False}
MNIH_2015 = {"repeat_action_probability": 0.0, "noop_max": 30, "fire_on_reset": True, "end_on_life_loss": True, "clip_reward": True}
# What an id begins and ends with, and the protocol that it stands for.
PROTOCOLS = {("ALE/", "-v5"): MACHADO_2018, ("", "NoFrameskip-v4"): MNIH_2015}
WITHOUT_ONE_PLAYER = {"combat", "joust", "maze_craze", "warlords"}


def is_atari(env: Any) -> bool:
    """Whether `env` names an Atari game, or means to."""
    return isinstance(env, str) and (env.startswith("ALE/") or "NoFrameskip-v" in env)


def atari_games() -> dict[str, str]:
    """The games by the names that their ids have, such as {"MsPacman": "ms_pacman"}; none where ALE is not installed."""
    if importlib.util.find_spec("ale_py") is None:
        return {}
    from ale_py import roms

    return {rom.title().replace("_", ""): rom for rom in sorted(roms.get_all_rom_ids()) if rom not in WITHOUT_ONE_PLAYER}


def read_name(name: str) -> tuple[str, Atari]:
    """The game that `name` stands for, in ALE's own spelling, and how it is played.

    Raises ValueError, with the nearest name, where there is no such game or setting, and where ALE is missing or too old.
    """
    games = atari_games()
    if not games:
        raise ValueError(f'{name} needs ALE, which is not installed: pip install "surefoot[atari]".')
    if tuple(map(int, re.findall(r"\d+", installed := metadata.version("ale-py"))[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ValueError(f'{name} needs ale-py {oldest} or newer, and {installed} is installed: pip install --upgrade "surefoot[atari]".')
    plain, _, query = name.partition("?")
    known = {f"{begin}{game}{end}": (rom, protocol) for (begin, end), protocol in PROTOCOLS.items() for game, rom in games.items()}
    if plain not in known:
        raise ValueError(f"There is no Atari game {plain!r}{nearest(plain, known)} `surefoot list envs` lists them.")
    rom, protocol = known[plain]
    try:
        given = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
        if len(given) > len(dict(given)):
            raise ValueError("a setting is given twice.")
        return rom, Atari(**{**protocol, **{setting: parsed(value) for setting, value in given}})
    except ValueError as error:
        sentence = str(error).rstrip(".")
        raise ValueError(f"{name}: {sentence}. Settings are given as in {plain}?frame_skip=4&clip_reward=true.") from error


def parsed(value: str) -> Any:
    """A setting's number or truth value; what is neither stays as it is, to be refused with its name."""
    try:
        return json.loads(value.lower())
    except ValueError:
        return value


def atari_environment(name: str, num_envs: int) -> HostEnvironment:
    """N streams of the game that `name` stands for; ValueError as for `read_name`."""
    return AtariEnvironment(name, *read_name(name), num_envs)


class AtariEnvironment:
    """N streams of one game, each reset in the step that ends it."""

    def __init__(self, name: str, rom: str, settings: Atari, num_envs: int):
        from ale_py.vector_env import AtariVectorEnv

        self._settings = settings
        self._games = AtariVectorEnv(
            rom,
            num_envs,
            batch_size=0,
            num_threads=min(num_processors(), num_envs),
            thread_affinity_offset=-1,
            max_num_frames_per_episode=ALE_LIMIT,
            repeat_action_probability=settings.repeat_action_probability,
            full_action_space=settings.full_action_space,
            continuous=False,
            continuous_action_threshold=0.5,  # of no effect
            autoreset_mode="NextStep",  # of no effect: what is over is reset here, in the same step
            img_height=settings.height,
            img_width=settings.width,
            grayscale=settings.grayscale,
            stack_num=settings.frame_stack,
            frameskip=settings.frame_skip,
            maxpool=settings.frame_pool,
            noop_max=settings.noop_max + 1,  # ALE stays below it
            episodic_life=False,
            life_loss_info=False,
            reward_clipping=False,
            use_fire_reset=settings.fire_on_reset,
        )
        spaces = self._games.single_observation_space, self._games.single_action_space
        boundary = self._boundary = Boundary(name, *spaces, num_envs, has_action_mask=False, close=self.close)
        # What results count: the same arrays where it is what is learned from.
        self._score = np.zeros_like(boundary.reward) if settings.clip_reward else boundary.reward
        self._over = np.zeros(num_envs, bool)
        self._step = boundary.step._replace(
            score=self._score if settings.clip_reward else None, game_over=self._over if settings.end_on_life_loss else None
        )
        self._elapsed = np.zeros(num_envs, np.int64)  # emulated frames since the game began
        self._lives = np.zeros(num_envs, np.int32)
        self._num_seen = np.ones(num_envs, np.int64)  # pictures of the learner's episode
        self.spec: EnvironmentSpec = replace(boundary.spec("episodes restart"), frame_stack=settings.frame_stack, settings=asdict(settings))

    def reset(self, seed: int) -> tuple[Observation, None]:
        """Begin every game anew: (observation [N, K, H, W], no mask). Later games of a stream go on with its generators."""
        boundary = self._boundary
        boundary.begin([number % 2**31 for number in stream_seeds(seed, boundary.num_envs)])  # ALE's are positive int32
        obs, infos = self._games.reset(seed=np.array(boundary.seeds))
        boundary.obs.write_all(obs)
        self._lives = infos["lives"]
        self._elapsed[:], self._num_seen[:] = 0, 1
        return boundary.obs.arrays, None

    def step(self, action: np.ndarray[Any, Any]) -> Step:
        """Take `action` [N]. Rows that ended hold the next episode's first observation; `valid` is true in all."""
        boundary, settings = self._boundary, self._settings
        boundary.num_steps += 1
        try:
            obs, score, is_lost, _, infos = self._games.step(boundary.actions(action))
            boundary.obs.write_all(obs)
        except Exception as error:
            boundary.fail_with(None, error)
        self._score[:] = score
        if settings.clip_reward:
            np.clip(self._score, -1.0, 1.0, out=boundary.reward)
        self._elapsed += settings.frame_skip
        truncated = np.greater_equal(self._elapsed, settings.max_frames, out=boundary.truncated)
        over = np.logical_or(is_lost, truncated, out=self._over)
        lost_life = (infos["lives"] < self._lives) & (infos["lives"] > 0) if settings.end_on_life_loss else False
        terminated = np.logical_or(is_lost, lost_life, out=boundary.terminated)
        ended = terminated | truncated
        self._num_seen += 1
        self._show_episode_only()
        self._lives = infos["lives"]
        if np.count_nonzero(ended):
            boundary.keep_final(ended)
            self._num_seen[ended] = 1
            if np.count_nonzero(over):
                self._begin(over)
            self._show_episode_only()
        return self._step

    def _begin(self, over: np.ndarray[Any, Any]) -> None:
        """Begin the next game in the rows `over` [N] bool."""
        obs, infos = self._games.reset(options={"reset_mask": over.copy()})
        self._boundary.obs.arrays[over] = obs[over]
        self._lives, self._elapsed[over] = infos["lives"], 0

    def _show_episode_only(self) -> None:
        """Blank the pictures from before the learner's episode: ALE does so at a game's beginning, not where a life is lost."""
        for index in np.flatnonzero(self._num_seen < self.spec.frame_stack).tolist():
            self._boundary.obs.arrays[index, : -self._num_seen[index]] = 0

    def get_state(self) -> None:
        """None: ALE's vector cannot give the state of its games."""

    def set_state(self, arrays: dict[str, np.ndarray[Any, Any]], info: dict[str, Any]) -> None:
        """There is nothing that it could be called with."""
        raise ValueError(f"{self.spec.name} cannot be set to a state; its episodes restart.")

    def close(self) -> None:
        """End the threads, which go with the object."""
        self._games = None
