"""A film shows every state of the episodes that are evaluated, at the right speed, and is whole or not there."""

import contextlib
import dataclasses
import itertools
import subprocess
import sys
from functools import cache, partial

import gymnasium
import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

import surefoot as sf
from surefoot.algorithms import of
from surefoot.collect import start_stream
from surefoot.envs import make
from surefoot.envs.classic import CLASSIC
from surefoot.report import video
from surefoot.report.video import film, record, watch
from surefoot.training.evaluate import evaluate
from surefoot.training.policy import Policy
from surefoot.training.seeding import key_for

pytest.importorskip("pygame")


class Steps(gymnasium.Env):
    """Paints the number of its steps in grey. Episodes last 3 to 8 steps, and the reward is random."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012
    size = 48, 64

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, self.np_random.integers(3, 9)
        return self.np_random.random(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.random(1, np.float32), self.np_random.random(), False, bool(self.steps == self.length), {}

    def render(self):
        return np.full((*self.size, 3), 20 * self.steps, np.uint8)


class Fast(Steps):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 125}  # noqa: RUF012


class Odd(Steps):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    size = 49, 65


@cache
def policy_for(env):
    _, spec = make(env, 1)
    config = sf.PPO()
    return Policy(config, spec, jax.jit(partial(of(config).init, config, spec))(jax.random.key(0)).acting)


def shown(env, max_fps=50, **how):
    """(the number in each picture, pictures per second, returns)"""
    with film(policy_for(env), env, max_fps=max_fps, **how) as (pictures, fps, returns):
        return [int(picture[0, 0, 0]) // 20 for picture in pictures], fps, returns


def test_every_state_is_shown_from_the_first_to_the_last_of_the_episodes_that_evaluate_plays_first():
    lengths = []
    numbers, fps, returns = shown(Steps, episodes=3, on_moment=lambda moment: moment.ended and lengths.append(moment.length))
    assert numbers == [number for length in lengths for number in range(length + 1)]
    assert len(set(lengths)) > 1
    assert fps == 2
    np.testing.assert_array_equal(returns, evaluate(policy_for(Steps), Steps, episodes=34)[:3])  # 17 in each of two environments


def test_a_fast_environment_is_shown_at_every_third_step_and_its_end_stands():
    numbers, fps, _ = shown(Fast)
    length = numbers[-1]
    assert fps == 125 / 3
    assert numbers == [*range(0, length, 3), *[length] * 21]


def test_the_seed_decides_and_so_does_stochastic():
    assert shown(Steps)[2] != shown(Steps, seed=1)[2]
    returns = []
    for deterministic in (True, False):
        with film(policy_for("CartPole-v1"), "CartPole-v1", max_fps=1, deterministic=deterministic) as (pictures, _, ended):
            assert list(pictures)
            returns += ended
    assert returns[0] != returns[1]


def test_a_gif_keeps_the_time_and_repeats(tmp_path):
    (episode_return,) = record(policy_for(Odd), Odd, tmp_path / "film.GIF")
    with Image.open(tmp_path / "film.GIF") as image:
        assert image.info["loop"] == 0
        frames = [(int(np.asarray(frame.convert("RGB"))[0, 0, 0]), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    colours, durations = zip(*frames, strict=True)
    length = len(frames) - 1
    np.testing.assert_allclose(colours, 20 * np.arange(length + 1), atol=8)
    assert set(durations[:-1]) <= {30, 40}
    assert sum(durations) == 10 * round(100 * (length + 15) / 30)
    assert episode_return > 0


def test_an_mp4_has_even_sides_the_frame_rate_and_every_picture(tmp_path):
    av = pytest.importorskip("av")
    record(policy_for(Odd), Odd, tmp_path / "film.mp4")
    with av.open(tmp_path / "film.mp4") as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate, stream.codec_context.pix_fmt) == (64, 48, 30, "yuv420p")
        colours = [frame.to_ndarray(format="rgb24").mean() for frame in file.decode(stream)]
    length = len(colours) - 15
    np.testing.assert_allclose(colours, 20 * np.minimum(np.arange(len(colours)), length), atol=4)


@pytest.mark.parametrize("name", CLASSIC)
def test_states_from_jax_are_drawn_as_gymnasium_draws_its_own(name):
    policy, environment, twin = policy_for(name), CLASSIC[name], gymnasium.make(name, render_mode="rgb_array")
    with film(fresh(policy), name, max_fps=50, deterministic=False) as (pictures, fps, _):  # drawn torques show in Pendulum's arrow
        drawn = list(itertools.islice(pictures, 6))
    assert fps == twin.metadata["render_fps"]
    start, policy = start_stream(environment, 1, key_for(0, "evaluation")), fresh(policy)
    twin.reset()
    twin.unwrapped.state, obs = np.asarray(start.state[0], np.float64), np.asarray(start.obs[0])
    expected = [twin.render()]
    for _ in drawn[1:]:
        obs, *_ = twin.step(policy.act(obs, deterministic=False))
        expected.append(twin.render())
    twin.close()
    differing = (np.asarray(drawn) != np.asarray(expected)).any(axis=-1).mean(axis=(1, 2))
    assert differing.max() < 2e-4, "of the pixels, where an edge falls between two"
    assert (drawn[0] != drawn[-1]).any()


def fresh(policy):
    """The same policy, whose generator stands at its beginning."""
    return Policy(policy.config, policy.spec, policy.acting)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_in_jax_too_the_first_episodes_are_those_of_evaluate(name):
    policy = policy_for(name)
    with film(policy, name, max_fps=0.1, episodes=2) as (pictures, _, returns):
        list(pictures)
    np.testing.assert_allclose(returns, evaluate(policy, name, episodes=3)[:2], rtol=1e-4)


def test_mujoco_draws_what_its_threads_play():
    pytest.importorskip("mujoco")
    with contextlib.suppress(ValueError):
        if video.windowless_backend():
            policy = policy_for("Reacher-v5")
            with film(policy, "Reacher-v5", max_fps=1) as (pictures, _, returns):
                first, *_, last = pictures
            assert first.shape == (480, 480, 3)
            assert (first != last).any()
            np.testing.assert_array_equal(returns, evaluate(policy, "Reacher-v5", episodes=1))
            return
    pytest.skip("this machine has neither EGL nor OSMesa")


def test_a_film_that_was_stopped_leaves_what_was_there(tmp_path):
    out = tmp_path / "film.gif"
    out.write_bytes(b"old")

    def stop(moment):
        if moment.length == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(policy_for(Steps), Steps, out, on_moment=stop)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]
    record(policy_for(Steps), Steps, out)
    assert out.read_bytes()[:3] == b"GIF"
    assert list(tmp_path.iterdir()) == [out]


def test_an_environment_that_chose_to_draw_needs_no_argument():
    numbers, *_ = shown(lambda: Steps(render_mode="rgb_array"))
    assert numbers[0] == 0


class Blank(Steps):
    def render(self):
        return None


class Breaks(Steps):
    def step(self, action):
        raise RuntimeError("out of order")

    def close(self):
        assert not hasattr(self, "closed")
        self.closed = True


def test_a_fault_is_the_environment_s_own_and_it_is_closed_once(tmp_path):
    with pytest.raises(ValueError, match="out of order"):
        record(policy_for(Steps), Breaks, tmp_path / "film.gif")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda: Steps(), r"render_mode is None. Let what builds it take render_mode='rgb_array'"),
        (Blank, r"render\(\) returned None where an array"),
        (lambda render_mode: gymnasium.make_vec("CartPole-v1", 2), "several environments at once"),
        (dataclasses.replace(CLASSIC["CartPole-v1"]), "pure functions"),
        ("CartPoll-v1", "CartPole-v1"),
    ],
    ids=["no argument", "no picture", "vector", "device", "misspelt"],
)
def test_what_cannot_be_drawn_is_told(env, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        record(policy_for(Steps), env, tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_written_is_told(tmp_path):
    for name, message in {"film.avi": r"\.mp4 or \.gif", "film": r"\.mp4 or \.gif", "none/film.gif": "no directory"}.items():
        with pytest.raises(ValueError, match=message):
            record(policy_for(Steps), Steps, tmp_path / name)


def test_what_is_missing_on_the_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r'PyAV.*pip install "surefoot\[render\]"'):
        record(policy_for(Steps), Steps, tmp_path / "film.mp4")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match=r"no display.*surefoot record"):
        watch(policy_for(Steps), Steps)
    works = ["osmesa"]

    def attempt(command, **options):
        return subprocess.CompletedProcess(command, returncode=0 if any(name in command[-1] for name in works) else 1)

    monkeypatch.setattr(subprocess, "run", attempt)
    assert video.windowless_backend() == {"MUJOCO_GL": "osmesa"}
    works.clear()
    with pytest.raises(ValueError, match=r"apt install libegl1 .* libosmesa6"):
        video.windowless_backend()
    monkeypatch.setenv("DISPLAY", ":0")
    assert video.windowless_backend() == {}


def test_a_window_shows_the_pictures_until_it_is_closed(monkeypatch):
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("DISPLAY", ":0")
    watched = []
    assert len(watch(policy_for(Fast), Fast, episodes=2, on_moment=watched.append)) == 2
    number = watched[-1].length
    assert pygame.display.get_surface().get_size() == (64, 48)
    assert pygame.display.get_surface().get_at((63, 47))[:3] == (20 * number,) * 3

    def close(moment):
        if moment.length == 2:
            pygame.event.post(pygame.event.Event(pygame.QUIT))

    assert watch(policy_for(Steps), Steps, on_moment=close) == []
    pygame.quit()


def test_from_the_command_line(surefoot, tmp_path):
    run = sf.train(sf.PPO(num_steps=16, epochs=1, minibatch_size=64), "CartPole-v1", steps=128, out=tmp_path / "run", progress=False)
    said = surefoot("record", "run", "film.gif", "--episodes", 2)
    first, second = run.record(tmp_path / "again.gif", 2)
    assert f"episode 1  return {first:.1f}, {first:.0f} steps\nepisode 2  return {second:.1f}, {second:.0f} steps\n" in said.stdout
    assert said.stderr == ""
    assert (tmp_path / "film.gif").read_bytes() == (tmp_path / "again.gif").read_bytes()
