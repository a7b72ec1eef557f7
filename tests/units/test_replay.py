"""The replay against lists in plain Python: what is in it, what is drawn, and how often."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

import surefoot.replay as replay_module
from surefoot import DQN, SAC, TD3
from surefoot.algorithms import of
from surefoot.replay import (
    BRANCHES,
    NOWHERE,
    check_memory,
    draw_prioritised,
    draw_uniform,
    empty_sums,
    gradient_steps,
    importance_weight,
    insert,
    prioritise,
    replay_bytes,
    sequences,
    set_priorities,
    start_replay,
    transitions,
)
from surefoot.spaces import zero_actions
from surefoot.training.engine import compiler_options
from surefoot.types import EnvironmentSpec, Rollout

STREAMS, STEPS, RING = 3, 5, 17
# What is seen is known by numbers: one, or one for each frame.
SPECS = {
    1: EnvironmentSpec(
        "Tape", Dict({"place": Box(-np.inf, np.inf, (2,)), "count": Discrete(1000)}), Discrete(7), STREAMS, has_action_mask=True
    ),
    4: EnvironmentSpec("Film", Box(0, 255, (4, 2, 3), np.uint8), Discrete(7), STREAMS, has_action_mask=True, frame_stack=4),
}
SPEC = SPECS[1]
put = jax.jit(insert)
look = jax.jit(transitions, static_argnames="n_step")


class Row(NamedTuple):
    """What a stream did, or where an episode ended."""

    acted: bool
    seen: tuple[int, ...]
    action: int = 0
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    older: int = 0  # frames of the same episode that are seen too


class History:
    """All rows of every stream, each with the whole stack of frames that was seen there."""

    def __init__(self, seed: int, *, next_step: bool, stack: int, ring: int = RING):
        self.random, self.next_step, self.stack, self.ring = np.random.default_rng(seed), next_step, stack, ring
        self.rows: list[list[Row]] = [[] for _ in range(STREAMS)]
        self.frames = [[self.number()] for _ in range(STREAMS)]  # of the episode
        self.resets = [False] * STREAMS  # where the next row is spent on a reset
        self.end = 0.15  # probability of a termination, and of a truncation

    def number(self) -> int:
        return int(self.random.integers(1, 1000))

    def seen(self, n: int) -> tuple[int, ...]:
        frames = self.frames[n][-self.stack :]
        return (*[0] * (self.stack - len(frames)), *frames)

    def older(self, n: int) -> int:
        return min(len(self.frames[n]), self.stack) - 1

    def restart(self) -> None:
        """Every stream begins a new episode, as where a run is resumed that cannot go on with the old ones."""
        for n in range(STREAMS):
            if len(self.frames[n]) > 1 and not self.resets[n]:
                self.rows[n][-1] = self.rows[n][-1]._replace(truncated=True)
                self.rows[n].append(Row(False, self.seen(n)))
            self.frames[n], self.resets[n] = [self.number()], False

    def rollout(self) -> Rollout:
        """Random actions, ends and rewards."""
        columns: dict[str, Any] = {name: np.zeros((STEPS, STREAMS)) for name in ("action", "reward", "terminated", "truncated", "time")}
        columns |= {name: np.zeros((STEPS, STREAMS, self.stack), int) for name in ("obs", "final_obs")}
        columns["valid"] = np.zeros((STEPS, STREAMS), bool)
        for t in range(STEPS):
            for n in range(STREAMS):
                row = {"obs": self.seen(n), "valid": not self.resets[n], "time": len(self.frames[n]) - 1}
                if self.resets[n]:
                    self.frames[n], self.resets[n], row["time"] = [self.number()], False, 0
                else:
                    row |= {"action": int(self.random.integers(7)), "reward": float(self.random.normal())}
                    row |= {"terminated": self.random.random() < self.end, "truncated": self.random.random() < self.end}
                    done = row["action"], row["reward"], row["terminated"], row["truncated"]
                    self.rows[n].append(Row(True, row["obs"], *done, self.older(n)))
                    self.frames[n].append(self.number())
                    if row["terminated"] or row["truncated"]:
                        row["final_obs"] = self.seen(n)
                        self.rows[n].append(Row(False, row["final_obs"]))
                        self.resets[n] = self.next_step
                        if not self.next_step:
                            self.frames[n] = [self.number()]
                for name, value in row.items():
                    columns[name][t, n] = value
        obs, final_obs = columns.pop("obs"), columns.pop("final_obs")
        last = np.array([self.seen(n) for n in range(STREAMS)])
        kinds = {"action": np.int32, "reward": np.float32, "terminated": bool, "truncated": bool, "time": np.int32, "valid": bool}
        return Rollout(
            **{name: columns[name].astype(kind) for name, kind in kinds.items()},
            obs=observation(obs),
            final_obs=observation(final_obs),
            last_obs=observation(last),
            progress=np.float32(0),
            action_mask=mask(obs),
            final_action_mask=mask(final_obs),
            last_action_mask=mask(last),
        )

    def expected(self, n: int, number: int, n_step: int, discount: float) -> tuple[Row, float, tuple[int, ...], float]:
        """(first row, reward, what is seen next, discount) of the `number`-th transition of stream n."""
        rows = [*self.rows[n], Row(False, self.seen(n))]
        first = row = [i for i, each in enumerate(rows) if each.acted][number]
        reward, weight = 0.0, 1.0
        for _ in range(n_step):
            reward, weight = reward + weight * rows[row].reward, weight * discount
            if rows[row].terminated or rows[row].truncated or not rows[row + 1].acted:
                break
            row += 1
        else:
            row -= 1
        return rows[first], reward, rows[row + 1].seen, 0.0 if rows[row].terminated else weight

    def available(self, n: int) -> list[int]:
        """The numbers of the transitions that fit with all their frames: one place is for what comes next."""
        rows = self.rows[n]
        oldest = max(len(rows) - (self.ring - 1), 0)
        numbers = np.cumsum([row.acted for row in rows]) - 1
        return [int(numbers[i]) for i, row in enumerate(rows) if row.acted and i - row.older >= oldest]


def observation(numbers: np.ndarray[Any, Any]) -> Any:
    """Numbers [..., K] as an observation that gives them away; a number of 0 as zeros."""
    if numbers.shape[-1] == 1:
        number = numbers[..., 0]
        return {"place": np.stack([number, -number], axis=-1).astype(np.float32), "count": number.astype(np.int32)}
    pixels = np.stack([numbers % 256, numbers // 256, numbers * 3 % 256, *[numbers * 5 % 256] * 3], axis=-1)
    return pixels.reshape(*numbers.shape, 2, 3).astype(np.uint8)


def mask(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A mask of seven actions for the newest of numbers [..., K]."""
    return (numbers[..., -1:] >> np.arange(7)) % 2 == 1


def row_of(replay: Any, n: int, number: int) -> int:
    """Where the `number`-th transition of stream n stands."""
    ring = len(replay.order) // STREAMS
    return ring * n + int(np.asarray(replay.order)[ring * n + number % ring]) % ring


def start(stack: int, ring: int = RING, **options: Any) -> Any:
    return start_replay(SPECS[stack], capacity=ring * STREAMS + 2, num_steps=STEPS, **options)


def assert_holds(replay: Any, history: History, n_step: int) -> None:
    """Every transition that can be drawn is what the list of all rows says, and every other has expired."""
    for n in range(STREAMS):
        numbers = history.available(n)
        count = len(numbers)
        assert int(replay.written[n]) == sum(row.acted for row in history.rows[n])
        assert list(range(int(replay.expired[n]), int(replay.written[n]))) == numbers
        # Always as many, so that one program serves.
        index = np.resize([row_of(replay, n, number) for number in numbers], history.ring)
        got = look(replay, jnp.asarray(index), n_step=n_step, discount=0.9)
        wanted = [history.expected(n, number, n_step, 0.9) for number in numbers]
        rows, rewards, successors, discounts = zip(*wanted, strict=True)
        now, after = np.array([row.seen for row in rows]), np.array(successors)
        for ours, theirs in (
            (got.obs, observation(now)),
            (got.next_obs, observation(after)),
            (got.action_mask, mask(now)),
            (got.next_action_mask, mask(after)),
            (got.action, np.array([row.action for row in rows])),
            (np.asarray(replay.rows.terminated)[index], np.array([row.terminated for row in rows])),
            (np.asarray(replay.rows.truncated)[index], np.array([row.truncated for row in rows])),
        ):
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, count=count: x[:count], ours), theirs)
        np.testing.assert_allclose(got.reward[:count], rewards, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.discount[:count], discounts, rtol=1e-5)


@pytest.mark.parametrize("next_step", [False, True], ids=["same step", "next step"])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("stack", SPECS)
def test_every_transition_is_what_a_list_of_all_rows_says(stack: int, n_step: int, next_step: bool) -> None:
    history, replay = History(0, next_step=next_step, stack=stack), start(stack)
    for i in range(30):
        if i % 7 == 6:
            history.restart()
        replay = put(replay, history.rollout())
        assert_holds(replay, history, n_step)
    assert int(replay.size) == sum(len(history.available(n)) for n in range(STREAMS))


@pytest.mark.parametrize("ring", [2 * STEPS + 5, 2 * STEPS + 6])
def test_a_ring_as_small_as_a_rollout_and_a_stack(ring: int) -> None:
    """With one row more, a rollout that is all ends writes over thirteen transitions at once, from the first of an episode on."""
    history, replay = History(2, next_step=False, stack=4, ring=ring), start(4, ring)
    for i in range(20):
        history.end = float(i % 4 == 0)
        replay = put(replay, history.rollout())
        assert_holds(replay, history, 1)
        assert (replay.written > replay.expired).all()


@pytest.mark.parametrize("next_step", [False, True], ids=["same step", "next step"])
@pytest.mark.parametrize("stack", SPECS)
def test_every_sequence_is_the_part_of_that_list_that_begins_with_its_transition(stack: int, next_step: bool) -> None:
    """Over the ends of episodes, up to the newest row and never over it into the oldest; with the log-probability of each action."""
    history, replay = History(2, next_step=next_step, stack=stack), start(stack, keeps_log_prob=True)
    sequence = jax.jit(lambda replay, index: sequences(replay, index, length=4))
    cut = 0
    for i in range(20):
        if i % 7 == 6:
            history.restart()
        rollout = history.rollout()
        replay = put(replay, rollout, -0.5 * rollout.action)
        for n in range(STREAMS):
            numbers = history.available(n)
            got = sequence(replay, jnp.asarray(np.resize([row_of(replay, n, number) for number in numbers], RING)))
            rows = [*history.rows[n], Row(False, history.seen(n))]
            begins = np.flatnonzero([row.acted for row in rows])[numbers]
            for (k, later), valid in np.ndenumerate(np.asarray(got.valid).T[: len(begins)]):
                if begins[k] + later >= len(rows) - 1:
                    assert not valid
                    continue
                row, after = rows[begins[k] + later : begins[k] + later + 2]
                is_last = begins[k] + later + 2 == len(rows)
                cut += is_last and row.acted
                at = later, k
                assert (bool(valid), int(got.action[at])) == (row.acted, row.action)
                assert (bool(got.terminated[at]), bool(got.truncated[at])) == (row.terminated, row.truncated or is_last)
                np.testing.assert_allclose(got.reward[at], row.reward, rtol=1e-6)
                assert got.old_log_prob is not None
                assert float(got.old_log_prob[at]) == -0.5 * row.action
                for place, seen in ((at, row.seen), ((later + 1, k), after.seen))[: 1 + row.acted]:
                    there = jax.tree.map(lambda x, place=place: x[place], got.obs)
                    jax.tree.map(np.testing.assert_array_equal, there, observation(np.array(seen)))
                    np.testing.assert_array_equal(got.action_mask[place], mask(np.array(seen)))
    assert cut > 100


def filled(stack: int = 1, prioritised: bool = False) -> tuple[History, Any]:
    history, replay = History(1, next_step=True, stack=stack), start(stack, prioritised=prioritised)
    for _ in range(12):
        replay = put(replay, history.rollout())
    return history, replay


def rows_of(history: History, replay: Any) -> set[int]:
    return {row_of(replay, n, number) for n in range(STREAMS) for number in history.available(n)}


@pytest.mark.parametrize("stack", SPECS)
def test_uniform_draws_are_equally_likely(stack: int) -> None:
    history, replay = filled(stack)
    drawn = np.asarray(jax.jit(lambda key: draw_uniform(replay, key, (400, 500)))(jax.random.key(0)))
    rows, counts = np.unique(drawn, return_counts=True)
    assert set(rows.tolist()) == rows_of(history, replay)
    expected = drawn.size / len(rows)
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    assert chi_squared < len(rows) + 5 * np.sqrt(2 * len(rows))


@pytest.mark.parametrize("stack", SPECS)
def test_new_transitions_have_the_largest_priority_and_nothing_else_is_drawn(stack: int) -> None:
    history, replay = filled(stack, prioritised=True)
    priorities = np.asarray(replay.sums[0])
    assert set(np.flatnonzero(priorities).tolist()) == rows_of(history, replay)
    assert set(priorities[priorities > 0].tolist()) == {1.0}
    replay = prioritise(replay, jnp.asarray(sorted(rows_of(history, replay))[:2]), jnp.asarray([3.0, 0.5]))
    for _ in range(8):
        replay = put(replay, history.rollout())
        assert set(np.flatnonzero(np.asarray(replay.sums[0])).tolist()) == rows_of(history, replay)
        newest = row_of(replay, 0, int(replay.written[0]) - 1)
        assert float(replay.sums[0][newest]) == float(replay.max_priority) == 3.0
        for children, parents in pairwise(replay.sums):
            np.testing.assert_allclose(parents[: len(children) // BRANCHES], np.reshape(children, (-1, BRANCHES)).sum(axis=1), rtol=1e-6)
    same = prioritise(replay, jnp.asarray([newest]), jnp.asarray([9.0]), where=jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, same, replay)


def test_prioritised_draws_are_as_likely_as_their_priorities_say() -> None:
    history, replay = filled(prioritised=True)
    rows = np.array(sorted(rows_of(history, replay)))
    priority = np.random.default_rng(0).exponential(size=len(rows)).astype(np.float32)
    replay = prioritise(replay, jnp.asarray(rows), jnp.asarray(priority))
    drawn, probability = jax.jit(lambda key: draw_prioritised(replay, key, (400, 500)))(jax.random.key(0))
    wanted = priority.astype(np.float64) / priority.sum(dtype=np.float64)
    counts = np.array([np.sum(np.asarray(drawn) == row) for row in rows])
    assert counts.sum() == drawn.size
    chi_squared = np.sum((counts - wanted * drawn.size) ** 2 / (wanted * drawn.size))
    assert chi_squared < len(rows) + 5 * np.sqrt(2 * len(rows))
    np.testing.assert_allclose(np.asarray(probability), wanted[np.searchsorted(rows, np.asarray(drawn))], rtol=1e-5)


def test_importance_weights_undo_the_priorities() -> None:
    _, replay = filled(prioritised=True)
    probability = jnp.asarray([[0.1, 0.2], [0.05, 0.05]])
    weight = importance_weight(replay, probability, exponent=0.5)
    np.testing.assert_allclose(weight, [[1.0, np.sqrt(0.5)], [1.0, 1.0]], rtol=1e-6)
    full = importance_weight(replay, probability, exponent=1.0)
    np.testing.assert_allclose(full[0, 0] * 0.1, full[0, 1] * 0.2, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 256, 1000, 4097, 40_000])
def test_sums_do_not_drift(size: int) -> None:
    """Ten thousand changes later every parent is the sum of its children, and the whole what float64 makes of it."""
    random = np.random.default_rng(size)
    sums = empty_sums(size)
    reference = np.zeros(len(sums[0]))
    change = jax.jit(set_priorities)
    for _ in range(100):
        index = random.choice(size, size=min(size, 100), replace=False)
        priority = random.exponential(size=len(index)).astype(np.float32) * 10.0 ** random.integers(-4, 4)
        index[0] = NOWHERE if random.random() < 0.3 else index[0]
        kept = index != NOWHERE
        sums = change(sums, jnp.asarray(index, jnp.int32), jnp.asarray(priority))
        reference[index[kept]] = priority[kept]
    np.testing.assert_array_equal(sums[0], reference.astype(np.float32))
    for children, parents in pairwise(sums):
        np.testing.assert_allclose(parents[: len(children) // BRANCHES], np.asarray(children).reshape(-1, BRANCHES).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(np.sum(sums[-1]), reference.sum(), rtol=1e-6)


def test_it_is_written_in_place() -> None:
    """A donated replay keeps its memory."""
    spec = EnvironmentSpec("Tape", Box(-1.0, 1.0, (4,)), Discrete(7), 1)
    replay = jax.jit(lambda: start_replay(spec, capacity=100_000, num_steps=1))()
    rollout = Rollout(
        obs=np.zeros((1, 1, 4), np.float32),
        action=np.zeros((1, 1), np.int32),
        reward=np.zeros((1, 1), np.float32),
        terminated=np.zeros((1, 1), bool),
        truncated=np.zeros((1, 1), bool),
        final_obs=np.zeros((1, 1, 4), np.float32),
        valid=np.ones((1, 1), bool),
        time=np.zeros((1, 1), np.int32),
        last_obs=np.zeros((1, 4), np.float32),
        progress=np.float32(0),
    )
    before = replay.rows.obs.unsafe_buffer_pointer()
    put = jax.jit(insert, donate_argnums=0)
    for _ in range(3):
        replay = put(replay, rollout)
    assert replay.rows.obs.unsafe_buffer_pointer() == before


ATARI = EnvironmentSpec("Atari", Box(0, 255, (4, 84, 84), np.uint8), Discrete(18), 8, frame_stack=4)


def test_a_million_frames_of_atari_take_less_than_eight_gigabytes() -> None:
    replay = jax.eval_shape(lambda: start_replay(ATARI, capacity=1_000_000, num_steps=4, prioritised=True))
    assert replay.rows.obs.shape == (1_000_000, 84, 84)
    assert replay_bytes(SimpleNamespace(replay=replay)) / 1_000_000 < 84 * 84 + 25


def temporary_bytes(config: Any, spec: EnvironmentSpec) -> tuple[int, Any]:
    """What a program takes besides its arguments that learns several times, as a fused loop does; and the shapes of its replay."""
    algorithm = of(config)
    state = jax.eval_shape(partial(algorithm.init, config, spec), jax.random.key(0))
    rollout = jax.eval_shape(lambda: film(spec, config.num_steps))

    def iterations(acting: Any, others: Any, rollout: Any, key: jax.Array, count: jax.Array) -> Any:
        def iteration(i: jax.Array, state: Any) -> Any:
            return algorithm.update(config, state, rollout, None, jax.random.fold_in(key, i))[0]

        return jax.lax.fori_loop(0, count, iteration, others._replace(acting=acting))

    arguments = state.acting, state._replace(acting=None), rollout, jax.random.key(0), jnp.int32(3)
    program = jax.jit(iterations, donate_argnums=1, compiler_options=compiler_options(config)).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes, state.replay


def test_a_program_that_learns_from_frames_has_no_second_copy_of_them() -> None:
    config = DQN(hidden=(4,), num_steps=2, minibatch_size=4, update_to_data=0.5, replay_size=50_000, n_step=2, prioritised=True)
    spec = dataclasses.replace(ATARI, observation_space=Box(0, 255, (4, 8, 8), np.uint8), num_envs=2)
    temporary, replay = temporary_bytes(config, spec)
    assert temporary < replay.rows.obs.size / 20


@pytest.mark.parametrize("config", [SAC(replay_size=200_000), TD3(replay_size=200_000)], ids=["sac", "td3"])
def test_operations_that_run_at_once_share_one_copy_of_the_replay(config: Any) -> None:
    assert compiler_options(config) != compiler_options(dataclasses.replace(config, hidden=(64, 256))) == compiler_options()
    spec = EnvironmentSpec("Numbers", Box(-1, 1, (17,), np.float32), Box(-1, 1, (6,), np.float32), 2)
    temporary, replay = temporary_bytes(config, spec)
    assert temporary < 4 * replay.rows.obs.size


def film(spec: EnvironmentSpec, num_steps: int) -> Rollout:
    """A rollout of zeros without an end: of frames they are black."""
    shape = num_steps, spec.num_envs
    obs = jnp.zeros((*shape, *(spec.observation_space.shape or ())), spec.observation_space.dtype)
    never = jnp.zeros(shape, bool)
    return Rollout(
        obs=obs,
        action=jnp.stack([zero_actions(spec.action_space, spec.num_envs)] * num_steps),
        reward=jnp.zeros(shape),
        terminated=never,
        truncated=never,
        final_obs=obs,
        valid=~never,
        time=jnp.zeros(shape, jnp.int32),
        last_obs=obs[0],
        progress=jnp.zeros(()),
    )


def test_priorities_are_written_in_place_though_probabilities_are_used_later() -> None:
    size = 50_000
    replay = jax.eval_shape(lambda: start_replay(ATARI, capacity=size, num_steps=2, prioritised=True))

    def draw_and_prioritise(sums: Any, others: Any, key: jax.Array) -> Any:
        replay = others._replace(sums=sums)
        index, probability = draw_prioritised(replay, key, (4,))
        return prioritise(replay, index, jnp.ones(4)).sums, importance_weight(replay, probability, exponent=0.5)

    arguments = replay.sums, replay._replace(sums=()), jax.random.key(0)
    program = jax.jit(draw_and_prioritise, donate_argnums=0, compiler_options=compiler_options()).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < size


def test_a_replay_too_small_for_a_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"replay of 30 for 3 environments has 10 rows for each.*set replay_size to at least 36"):
        start_replay(SPEC, capacity=30, num_steps=5)
    start_replay(SPEC, capacity=36, num_steps=5)
    with pytest.raises(ValueError, match=r"has 14 rows .* can write 11 behind the 3 older frames of a stack; .* at least 45"):
        start_replay(SPECS[4], capacity=44, num_steps=5)


def test_a_replay_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = SimpleNamespace(replay=jax.eval_shape(lambda: start_replay(SPEC, capacity=51_000, num_steps=5)))
    needed = replay_bytes(learner)
    assert needed == 51_000 * (8 + 4 + 4 + 4 + 3 + 7 + 4) + 4 * STREAMS * 4 + 4
    with_log_prob = jax.eval_shape(lambda: start_replay(SPEC, capacity=51_000, num_steps=5, keeps_log_prob=True))
    assert replay_bytes(SimpleNamespace(replay=with_log_prob)) == needed + 51_000 * 4
    config = SimpleNamespace(replay_size=51_000)
    check_memory(config, learner)
    monkeypatch.setattr(replay_module, "free_memory", lambda: needed // 2)
    with pytest.raises(ValueError, match=r"A replay of 51,000 needs 0.0 GB, and 0.0 GB are free; set replay_size to at most 22,9\d\d"):
        check_memory(config, learner)
    check_memory(config, SimpleNamespace())


def test_gradient_steps_are_whole() -> None:
    def config(**settings: Any) -> Any:
        return SimpleNamespace(**{"update_to_data": 0.25, "num_steps": 4, "learning_starts": 10, "replay_size": 100} | settings)

    assert gradient_steps(config(), 8) == 8
    assert gradient_steps(config(update_to_data=0.1, num_steps=5), 2) == 1
    for wrong in (config(num_steps=1), config(update_to_data=0.3)):
        with pytest.raises(ValueError, match="gradient steps; choose num_steps or update_to_data"):
            gradient_steps(wrong, 1)
    with pytest.raises(ValueError, match=r"learning_starts=85 transitions are never there: a replay_size of 100 holds 84 at most"):
        gradient_steps(config(learning_starts=85), 8)


@pytest.mark.parametrize("factor", [1.0, 1.01, 0.99])
def test_what_has_no_priority_is_never_drawn_by_rounding(factor: float) -> None:
    """Of a tree of which most leaves are 0; sums that are wrong by a hundredth stand for what rounding does once in millions of draws."""
    random, size = np.random.default_rng(0), 40_000
    priority = (random.exponential(size=size) * (random.random(size) < 0.3)).astype(np.float32)
    leaves, *above = set_priorities(empty_sums(size), jnp.arange(size), jnp.asarray(priority))
    tree: Any = SimpleNamespace(sums=(leaves, *(level * factor ** (i + 1) for i, level in enumerate(above))))
    index, probability = jax.jit(lambda key: draw_prioritised(tree, key, (200_000,)))(jax.random.key(0))
    assert float(jnp.min(probability)) > 0
    assert (priority[np.asarray(index)] > 0).all()
