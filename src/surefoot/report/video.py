"""Episodes of a policy as a film: into a .mp4 or .gif, or on the screen.

An environment in JAX is stepped as in training; Gymnasium's environment of the same name draws its states, `board.py` MinAtar. An
Atari game is played twice, once as the policy sees it and once in colour. Every other environment is built with
`render_mode="rgb_array"` and draws itself. The first episodes are those that `evaluate` plays first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv
from PIL import Image

from ..collect import HostCollector, start_stream
from ..envs import IN_JAX, environment_name, is_device, is_vector
from ..envs.atari import AtariEnvironment, is_atari, read_name
from ..envs.boundary import EnvironmentFault, describe
from ..envs.gymnasium import SerialEnvironment, build, maker, quiet
from ..envs.minatar import MinAtar
from ..envs.mujoco import Unlogged
from ..envs.mujoco_tasks import TASKS
from ..training.evaluate import MAX_STEPS, act_of
from ..training.policy import Policy
from ..training.seeding import key_for, seed_for
from ..training.session import whole_number
from ..types import DeviceEnvironment, HostEnvironment, Observation, Step, counted
from .board import Board

Picture = np.ndarray[Any, np.dtype[np.uint8]]  # [height, width, 3]
MODE = "rgb_array"
DEFAULT_FPS = 30.0  # of an environment that does not say
NO_DISPLAY = "There is no display to open a window on; `surefoot record RUN out.mp4` films into a file instead."
END_SECONDS = 0.5  # the end of an episode stands, or one would not see it


class Moment(NamedTuple):
    """How an episode stands when a picture of it can be taken."""

    episode: int  # from 0
    length: int  # steps so far
    episode_return: float  # so far, undiscounted
    ended: bool


def record(policy: Policy, env: Any, out: str | Path, **how: Any) -> list[float]:
    """Film whole episodes into `out`, which is replaced when the film is complete. `how` as for `film`; gives the returns.

    Raises ValueError for another ending than .mp4 or .gif, and for what is missing on this machine.
    """
    out = Path(out)
    if out.suffix.lower() not in WRITERS:
        raise ValueError(f"A film is written to a .mp4 or .gif, got {out.name!r}; choose one of these endings.")
    if not out.parent.is_dir():
        raise ValueError(f"There is no directory {out.parent} to write {out.name} into; make it first.")
    write, max_fps = WRITERS[out.suffix.lower()]
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with film(policy, env, max_fps=max_fps, **how) as (pictures, fps, returns):
            write(temporary, pictures, fps)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return returns


def watch(policy: Policy, env: Any, **how: Any) -> list[float]:
    """Play whole episodes in a window, until they are over or it is closed. `how` as for `film`; gives the returns."""
    if is_headless():
        raise ValueError(NO_DISPLAY)
    with film(policy, env, max_fps=60, **how) as (pictures, fps, returns):
        show(environment_name(env), pictures, fps)
    return returns


@contextlib.contextmanager
def film(
    policy: Policy,
    env: Any,
    *,
    max_fps: float,
    episodes: int = 1,
    deterministic: bool = True,
    seed: int = 0,
    on_moment: Callable[[Moment], None] = lambda moment: None,
) -> Iterator[tuple[Iterator[Picture], float, list[float]]]:
    """(pictures, how many make a second, the returns of the episodes that ended so far), played as pictures are asked for.

    Args:
        max_fps: an environment that moves faster is shown at every second, third, ... step, and at the end of an episode.
        on_moment: called at every step; it may raise.
    """
    whole_number("episodes", episodes, minimum=1)
    name = environment_name(env)
    device = IN_JAX.get(env) if isinstance(env, str) else env if is_device(env) else None
    if device is not None and device is not IN_JAX.get(name):
        raise ValueError(f"{name} is pure functions, which draw nothing; give a Gymnasium environment like it: Run(path, env=...).")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if is_headless():  # SDL would complain on the screen of what it does not find
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    with contextlib.ExitStack() as stack:
        if name.rpartition(":")[2] in TASKS:
            with contextlib.suppress(ImportError):  # there is no MuJoCo, which is told below, or an older one
                stack.enter_context(Unlogged())
        if is_atari(env):
            camera = GameCamera(name)
        elif isinstance(device, MinAtar):
            camera = Camera(Board(device))
        else:
            camera = Camera(drawing_environment(env if device is None else name, name))
        stack.callback(camera.close)
        if isinstance(camera, GameCamera):
            moments = play_host(camera, policy, episodes, deterministic, seed)
        elif device is not None:
            moments = play_device(device, camera, policy, episodes, deterministic, seed)
        else:
            moments = play_host(SerialEnvironment(lambda: camera, 1, name), policy, episodes, deterministic, seed)
        fps = float(camera.metadata.get("render_fps") or DEFAULT_FPS)
        stride = math.ceil(fps / max_fps)
        returns: list[float] = []

        def pictures() -> Iterator[Picture]:
            for moment in moments:
                on_moment(moment)
                if moment.ended:
                    returns.append(moment.episode_return)
                    yield from [draw(camera, name)] * max(1, round(END_SECONDS * fps / stride))
                elif moment.length >= MAX_STEPS:
                    raise ValueError(f"{name}: after {MAX_STEPS:,} steps an episode had still not ended; give it a time limit.")
                elif moment.length % stride == 0:
                    yield draw(camera, name)

        yield pictures(), fps / stride, returns


class Camera(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps the picture of an episode's end from the reset that follows in the same step, and closes once, fault or no fault."""

    def __init__(self, env: gymnasium.Env[Any, Any]):
        super().__init__(env)
        self._end: Any = None
        self._is_closed = False

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        _, _, terminated, truncated, _ = result
        self._end = self.env.render() if terminated or truncated else None
        return result

    def render(self) -> Any:
        end, self._end = self._end, None
        return self.env.render() if end is None else end

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.env.close()


class GameCamera(AtariEnvironment):
    """One Atari game, and beside it the same in colour: with one seed and the same actions no frame differs."""

    def __init__(self, name: str):
        rom, settings = read_name(name)
        super().__init__(name, rom, settings, 1)
        in_colour = dataclasses.replace(settings, grayscale=False, height=210, width=160, frame_stack=1)
        self._twin = AtariEnvironment(name, rom, in_colour, 1)
        self.metadata = {"render_fps": 60.0 / settings.frame_skip}
        self._pictures: list[Picture] = []  # to be drawn; the last one stands

    def reset(self, seed: int) -> tuple[Observation, None]:
        self._pictures = [self._twin.reset(seed)[0][0, 0]]
        return super().reset(seed)

    def step(self, action: np.ndarray[Any, Any]) -> Step:
        twin, step = self._twin.step(action), super().step(action)
        is_over = int(counted(step)[1][0])
        self._pictures = [twin.final_obs[0, 0].copy()] * is_over + [twin.obs[0, 0]]
        return step

    def render(self) -> Picture:
        """Twice as large as on an Atari's screen; where a game is over, first its end and then the next one's beginning."""
        picture = self._pictures.pop(0) if len(self._pictures) > 1 else self._pictures[0]
        return picture.repeat(2, axis=0).repeat(2, axis=1)

    def close(self) -> None:
        super().close()
        self._twin.close()


def drawing_environment(env: Any, name: str) -> gymnasium.Env[Any, Any]:
    """`env`, built so that its `render` gives pictures; ValueError where it cannot."""
    if isinstance(env, gymnasium.Env) or is_vector(env):
        built = env
    else:
        make = maker(env) if isinstance(env, str) else env
        with quiet():
            try:
                built = build(partial(make, render_mode=MODE), name)
            except EnvironmentFault as fault:
                if "render_mode" not in str(fault.__cause__):
                    raise
                built = build(make, name)  # it does not take the argument, but may have chosen on its own
    if is_vector(built):
        raise ValueError(f"{name} is several environments at once; film a single one like them: Run(path, env=...).")
    if built.render_mode != MODE:
        built.close()
        raise ValueError(
            f"{name} does not draw pictures: its render_mode is {built.render_mode!r}. Let what builds it take render_mode={MODE!r} and "
            "pass it on to the environment, whose render() then returns an array [height, width, 3] of uint8."
        )
    if hasattr(built.unwrapped, "mujoco_renderer") and "MUJOCO_GL" not in os.environ and sys.platform == "linux":
        os.environ |= windowless_backend()
    return built


def is_headless() -> bool:
    """Whether no window can be opened."""
    return sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def windowless_backend() -> dict[str, str]:
    """The setting with which MuJoCo needs no display, if any works here. A failed attempt spoils its process, so others make them."""
    for backend in ("egl", "osmesa"):
        attempt = f"from mujoco.{backend} import GLContext; GLContext(8, 8).make_current()"
        if subprocess.run([sys.executable, "-P", "-c", attempt], capture_output=True, check=False).returncode == 0:
            return {"MUJOCO_GL": backend}
    if is_headless():
        raise ValueError(
            "There is no display, and without one MuJoCo draws through EGL or OSMesa, neither of which works here: "
            "apt install libegl1 libgl1-mesa-dri, or libosmesa6."
        )
    return {}


def play_device(
    environment: DeviceEnvironment, camera: Camera, policy: Policy, episodes: int, deterministic: bool, seed: int
) -> Iterator[Moment]:
    """Play in JAX, and put each state where `camera` draws it from."""
    step, canvas = jax.jit(environment.step), camera.unwrapped
    start = start_stream(environment, episodes, key_for(seed, "evaluation"))
    camera.reset()
    for episode in range(episodes):
        policy.reset()
        state, obs = jax.tree.map(lambda rows, episode=episode: rows[episode], (start.state, start.obs))
        action, moment = None, Moment(episode, 0, 0.0, False)
        while True:
            canvas.state = np.asarray(obs) if isinstance(canvas, Board) else np.asarray(state, np.float64)
            if isinstance(canvas, PendulumEnv):
                canvas.last_u = None if action is None else action[0]
            yield moment
            if moment.ended:
                break
            action, length = policy.act(obs, deterministic), moment.length + 1
            state, obs, reward, terminated = step(state, action)
            ended = bool(terminated) or length >= environment.max_episode_steps
            moment = Moment(episode, length, moment.episode_return + float(reward), ended)


def play_host(environment: HostEnvironment, policy: Policy, episodes: int, deterministic: bool, seed: int) -> Iterator[Moment]:
    """Play in an environment of one stream, as an evaluation does."""
    collector = HostCollector(environment, act_of(policy, deterministic), 1, seed_for(seed, "evaluation"))
    keys, index = key_for(seed, "evaluation actions"), 0
    for episode in range(episodes):
        moment = Moment(episode, 0, 0.0, False)
        yield moment
        while not moment.ended:
            row, index = collector.collect(policy.acting, 1.0, jax.random.fold_in(keys, index)), index + 1
            reward, ended = counted(row)
            moment = Moment(episode, moment.length + 1, moment.episode_return + float(reward[0, 0]), bool(ended[0, 0]))
            yield moment


def draw(camera: Camera | GameCamera, name: str) -> Picture:
    """What `camera` sees; ValueError where something is missing or it is no picture."""
    try:
        picture = camera.render()
    except Exception as error:  # each graphics library has its own
        raise ValueError(f"{name} cannot be drawn: {error}") from error
    if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3):
        raise ValueError(f"{name}: render() returned {describe(picture)} where an array [height, width, 3] of uint8 was expected.")
    return picture


def write_gif(path: Path, pictures: Iterator[Picture], fps: float) -> None:
    """A GIF that repeats for ever. It counts in hundredths of a second, so pictures take turns in how long they stand."""

    def images() -> Iterator[Image.Image]:
        for index, picture in enumerate(pictures):
            image = Image.fromarray(picture).quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            image.info["duration"] = 10 * (round(100 * (index + 1) / fps) - round(100 * index / fps))  # ms
            yield image

    rest = images()
    next(rest).save(path, format="GIF", save_all=True, append_images=rest, loop=0)


def write_mp4(path: Path, pictures: Iterator[Picture], fps: float) -> None:
    """H.264 that every player takes, for which an odd last row or column of pixels is left out."""
    try:
        import av
    except ImportError:
        raise ValueError('Writing .mp4 needs PyAV, which is not installed: pip install "surefoot[render]". A .gif does without.') from None
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as video:
        stream: Any = None
        for picture in pictures:
            height, width = (size // 2 * 2 for size in picture.shape[:2])
            if stream is None:
                stream = video.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "20"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")))
        video.mux(stream.encode(None))


# What writes a film, and how many pictures a second it can hold: a GIF's shortest time that browsers keep is 2/100 s.
WRITERS: dict[str, tuple[Callable[[Path, Iterator[Picture], float], None], float]] = {".gif": (write_gif, 50), ".mp4": (write_mp4, 60)}


def show(title: str, pictures: Iterator[Picture], fps: float) -> None:
    """Play in a window until it is closed."""
    try:
        import pygame
    except ImportError:
        raise ValueError('A window needs pygame, which is not installed: pip install "surefoot[render]".') from None
    clock, window = pygame.time.Clock(), None
    for picture in pictures:
        if window is None:
            pygame.display.init()
            if pygame.display.get_driver() == "offscreen" and "SDL_VIDEODRIVER" not in os.environ:  # SDL found nothing better
                raise ValueError(NO_DISPLAY)
            window = pygame.display.set_mode(picture.shape[1::-1])
            pygame.display.set_caption(title)
        pygame.surfarray.blit_array(window, picture.swapaxes(0, 1))
        pygame.display.flip()
        clock.tick(fps)
        if any(event.type == pygame.QUIT for event in pygame.event.get()):
            break
