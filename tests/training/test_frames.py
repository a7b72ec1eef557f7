"""A run that learns from stacked frames, each of which its replay and its checkpoints hold once."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

import surefoot as sf
from surefoot.replay import draw_uniform, transitions
from surefoot.training import checkpoint
from surefoot.training.cache import use_compilation_cache
from surefoot.training.checkpoint import Checkpoint, newest, save
from surefoot.training.engine import HostEngine
from surefoot.types import EnvironmentSpec, Step

NUM_ENVS, STACK = 2, 3
CONFIG = sf.DQN(num_steps=4, hidden=(8,), minibatch_size=8, update_to_data=0.125, replay_size=200, learning_starts=32, prioritised=True)


class Film:
    """Frames [2, 2] that say which episode of their stream it is, and how many frames of it were seen; episodes of 1 to 9 steps."""

    def __init__(self, resume: str = "exact"):
        space = Box(0, 255, (STACK, 2, 2), np.uint8)
        self.spec = EnvironmentSpec("film", space, Discrete(3), NUM_ENVS, resume=resume, frame_stack=STACK)
        self.random = np.random.default_rng(0)
        self.episode, self.seen = np.zeros(NUM_ENVS, int), np.zeros(NUM_ENVS, int)
        self.obs = np.zeros((NUM_ENVS, *space.shape), np.uint8)

    def show(self, rows: np.ndarray) -> None:
        self.obs[rows] = np.roll(self.obs[rows], -1, axis=1)
        self.seen[rows] += 1
        self.obs[rows, -1] = np.stack([self.episode, self.seen], axis=-1)[rows, None]

    def begin(self, rows: np.ndarray) -> None:
        self.obs[rows], self.seen[rows] = 0, 0
        self.episode[rows] += 1
        self.show(rows)

    def reset(self, seed: int) -> Any:
        self.begin(np.ones(NUM_ENVS, bool))
        return self.obs, None

    def step(self, action: np.ndarray) -> Step:
        self.show(np.ones(NUM_ENVS, bool))
        final, ended = self.obs.copy(), (self.random.random(NUM_ENVS) < 0.15) | (self.seen == 10)
        self.begin(ended)
        return Step(self.obs, np.float32(action), ended & (action == 0), ended & (action != 0), final, np.ones(NUM_ENVS, bool))

    def get_state(self) -> Any:
        if self.spec.resume != "exact":
            return None
        return {"episode": self.episode, "seen": self.seen, "film": self.obs}, self.random.bit_generator.state

    def set_state(self, arrays: Any, info: Any) -> None:
        self.episode, self.seen, self.obs[...] = arrays["episode"].copy(), arrays["seen"].copy(), arrays["film"]
        self.random.bit_generator.state = info

    def close(self) -> None: ...


def engine(film: Film) -> HostEngine:
    return HostEngine(CONFIG, film, film.spec, seed=0, total_steps=2000)


def advance(running: HostEngine, calls: int) -> None:
    for _ in range(calls):
        running.advance()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_compilation_cache()
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 256)


def opened(directory: Path) -> Checkpoint:
    found = newest(directory)
    assert found is not None
    return found


def test_a_run_on_frames_is_resumed_in_the_bits_of_one_process(tmp_path: Path) -> None:
    whole, resumed = engine(Film()), engine(Film())
    advance(whole, 3)
    path = save(tmp_path, whole.step, *whole.snapshot())
    assert len(list(path.glob("learner.*.safetensors"))) > 10
    advance(whole, 2)
    resumed.restore(opened(tmp_path))
    advance(resumed, 2)
    assert (resumed.learner.replay.expired > 0).all()
    ours, theirs = jax.tree.leaves(resumed.learner), jax.tree.leaves(whole.learner)
    assert [x.tobytes() for x in map(np.asarray, ours)] == [x.tobytes() for x in map(np.asarray, theirs)]


def test_two_replays_are_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = engine(Film())
    save(tmp_path, running.step, *running.snapshot())
    frames, restore = weakref.ref(running.learner.replay.rows.obs), Checkpoint.restore

    def restore_alone(*arguments: Any) -> Any:
        assert frames() is None
        return restore(*arguments)

    monkeypatch.setattr(Checkpoint, "restore", restore_alone)
    running.restore(opened(tmp_path))


def test_where_a_resumed_run_starts_its_episodes_anew_no_stack_reaches_over(tmp_path: Path) -> None:
    """Nor does a successor: the episode that was left ends with what was seen last."""
    stopped, film = engine(Film("episodes restart")), Film("episodes restart")
    advance(stopped, 1)
    left = np.array(stopped.collector.obs)
    assert (left[:, 0] != 0).any(), "an episode is under way"
    save(tmp_path, stopped.step, *stopped.snapshot())
    film.episode += 100
    resumed = engine(film)
    resumed.restore(opened(tmp_path))
    advance(resumed, 1)
    replay = resumed.learner.replay
    batch = transitions(replay, draw_uniform(replay, jax.random.key(0), (500,)), n_step=2, discount=0.5)
    for obs, next_obs in zip(np.asarray(batch.obs), np.asarray(batch.next_obs), strict=True):
        assert len({frame[0, 0] for frame in (*obs, *next_obs) if frame[0, 0]}) == 1
        for stack in (obs, next_obs):
            newest_seen = int(stack[-1, 0, 1])
            assert stack[:, 0, 1].tolist() == [max(newest_seen - back, 0) for back in range(STACK - 1, -1, -1)]
    for stack in left[left[:, 0, 0, 0] > 0]:
        assert (batch.next_obs == stack).all(axis=(1, 2, 3)).any()
    assert len(np.unique(jnp.asarray(batch.obs)[:, -1, 0, 0] > 100)) == 2
