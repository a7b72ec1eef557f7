"""The replay against lists in plain Python: what is in it, what is drawn, and how often."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

import surefoot.replay as replay_module
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
from surefoot.types import EnvironmentSpec, Rollout

STREAMS, STEPS, RING = 3, 5, 17
SPEC = EnvironmentSpec(
    "Tape", Dict({"place": Box(-np.inf, np.inf, (2,)), "count": Discrete(1000)}), Discrete(7), STREAMS, has_action_mask=True
)


class History:
    """All rows of every stream: (acted, observation, mask, action, reward, terminated, truncated)."""

    def __init__(self, seed: int, *, next_step: bool):
        self.random, self.next_step = np.random.default_rng(seed), next_step
        self.rows: list[list[Any]] = [[] for _ in range(STREAMS)]
        self.obs = [self.number() for _ in range(STREAMS)]
        self.resets = [False] * STREAMS  # where the next row is spent on a reset

    def number(self) -> int:
        return int(self.random.integers(1000))

    def rollout(self) -> Rollout:
        """Random actions, ends and rewards; a row and its mask are known by one number."""
        names = ("obs", "action", "reward", "terminated", "truncated", "final_obs", "valid")
        columns: dict[str, Any] = {name: np.zeros((STEPS, STREAMS), np.float32) for name in names}
        for t in range(STEPS):
            for n in range(STREAMS):
                row = {"obs": self.obs[n], "valid": not self.resets[n], "final_obs": self.number()}
                after = self.number()
                if self.resets[n]:
                    self.resets[n] = False
                else:
                    row |= {"action": int(self.random.integers(7)), "reward": float(self.random.normal())}
                    row |= {"terminated": self.random.random() < 0.15, "truncated": self.random.random() < 0.15}
                    self.rows[n].append((True, row["obs"], row["action"], row["reward"], row["terminated"], row["truncated"]))
                    if row["terminated"] or row["truncated"]:
                        self.rows[n].append((False, row["final_obs"], 0, 0.0, False, False))
                        self.resets[n] = self.next_step
                for name, value in row.items():
                    columns[name][t, n] = value
                self.obs[n] = after
        flags = {name: columns.pop(name).astype(bool) for name in ("terminated", "truncated", "valid")}
        seen = {name: observation(columns.pop(name)) for name in ("obs", "final_obs")}
        last = np.array(self.obs, np.float32)
        return Rollout(
            **columns | {"action": columns["action"].astype(np.int32)},
            **flags,
            **{name: obs for name, (obs, _) in seen.items()},
            time=np.zeros((STEPS, STREAMS), np.int32),
            last_obs=observation(last)[0],
            progress=np.float32(0),
            action_mask=seen["obs"][1],
            final_action_mask=seen["final_obs"][1],
            last_action_mask=observation(last)[1],
        )

    def expected(self, n: int, number: int, n_step: int, discount: float) -> tuple[int, int, float, int, float]:
        """(observation, action, reward, next observation, discount) of the `number`-th transition of stream n."""
        rows = [*self.rows[n], (False, self.obs[n], 0, 0.0, False, False)]
        first = row = [i for i, each in enumerate(rows) if each[0]][number]
        reward, weight = 0.0, 1.0
        for _ in range(n_step):
            reward, weight = reward + weight * rows[row][3], weight * discount
            if rows[row][4] or rows[row][5] or not rows[row + 1][0]:
                break
            row += 1
        else:
            row -= 1
        return rows[first][1], rows[first][2], reward, rows[row + 1][1], 0.0 if rows[row][4] else weight

    def available(self, n: int) -> list[int]:
        """The numbers of the transitions that fit: one place is for what comes next."""
        acted = np.array([each[0] for each in self.rows[n]])
        return (np.cumsum(acted) - 1)[-(RING - 1) :][acted[-(RING - 1) :]].tolist()


def observation(number: Any) -> tuple[Any, Any]:
    """(an observation, a mask of seven actions) that give the number away."""
    number = np.asarray(number)
    place = np.stack([number, -number], axis=-1).astype(np.float32)
    bits = (number.astype(np.int64)[..., None] >> np.arange(7)) % 2 == 1
    return {"place": place, "count": number.astype(np.int32)}, bits


def row_of(replay: Any, n: int, number: int) -> int:
    """Where the `number`-th transition of stream n stands."""
    return RING * n + int(replay.order[RING * n + number % RING]) % RING


def start(**options: Any) -> Any:
    return start_replay(SPEC, capacity=RING * STREAMS + 2, num_steps=STEPS, **options)


@pytest.mark.parametrize("next_step", [False, True], ids=["same step", "next step"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_every_transition_is_what_a_list_of_all_rows_says(n_step: int, next_step: bool) -> None:
    history, replay = History(0, next_step=next_step), start()
    put, look = jax.jit(insert), jax.jit(lambda replay, index: transitions(replay, index, n_step=n_step, discount=0.9))
    for _ in range(30):
        replay = put(replay, history.rollout())
        for n in range(STREAMS):
            numbers = history.available(n)
            assert int(replay.written[n]) == sum(row[0] for row in history.rows[n])
            assert list(range(int(replay.expired[n]), int(replay.written[n]))) == numbers
            index = np.array([row_of(replay, n, number) for number in numbers])
            got = look(replay, jnp.asarray(index))
            for i, number in enumerate(numbers):
                obs, action, reward, next_obs, discount = history.expected(n, number, n_step, 0.9)
                assert (int(got.obs["count"][i]), int(got.next_obs["count"][i]), int(got.action[i])) == (obs, next_obs, action)
                np.testing.assert_array_equal(got.next_obs["place"][i], observation(next_obs)[0]["place"])
                np.testing.assert_array_equal(got.action_mask[i], observation(obs)[1])
                np.testing.assert_array_equal(got.next_action_mask[i], observation(next_obs)[1])
                np.testing.assert_allclose([got.reward[i], got.discount[i]], [reward, discount], rtol=1e-5, atol=1e-6)
    assert int(replay.size) == sum(len(history.available(n)) for n in range(STREAMS))


@pytest.mark.parametrize("next_step", [False, True], ids=["same step", "next step"])
def test_every_sequence_is_the_part_of_that_list_that_begins_with_its_transition(next_step: bool) -> None:
    """Over the ends of episodes, up to the newest row and never over it into the oldest; with the log-probability of each action."""
    history, replay, length = History(2, next_step=next_step), start(keeps_log_prob=True), 4
    put, look = jax.jit(insert), jax.jit(lambda replay, index: sequences(replay, index, length=length))
    cut = 0
    for _ in range(20):
        rollout = history.rollout()
        replay = put(replay, rollout, -0.5 * rollout.obs["count"])
        for n in range(STREAMS):
            numbers = history.available(n)
            got = look(replay, jnp.asarray([row_of(replay, n, number) for number in numbers]))
            rows = [*history.rows[n], (False, history.obs[n], 0, 0.0, False, False)]
            begins = np.flatnonzero([row[0] for row in rows])[numbers]
            for (k, later), valid in np.ndenumerate(np.asarray(got.valid).T):
                row = begins[k] + later
                if row >= len(rows) - 1:
                    assert not valid
                    continue
                acted, obs, action, reward, terminated, truncated = rows[row]
                is_last = row + 2 == len(rows)
                cut += is_last and acted
                assert (bool(valid), int(got.obs["count"][later, k]), int(got.action[later, k])) == (acted, obs, action)
                assert (bool(got.terminated[later, k]), bool(got.truncated[later, k])) == (terminated, truncated or is_last)
                np.testing.assert_allclose(got.reward[later, k], reward, rtol=1e-6)
                assert got.old_log_prob is not None
                assert float(got.old_log_prob[later, k]) == (-0.5 * obs if acted else 0.0)
                assert int(got.obs["count"][later + 1, k]) == rows[row + 1][1]
                np.testing.assert_array_equal(got.action_mask[later + 1, k], observation(rows[row + 1][1])[1])
    assert cut > 100


def filled(prioritised: bool = False) -> tuple[History, Any]:
    history, replay = History(1, next_step=True), start(prioritised=prioritised)
    for _ in range(12):
        replay = insert(replay, history.rollout())
    return history, replay


def rows_of(history: History, replay: Any) -> set[int]:
    return {row_of(replay, n, number) for n in range(STREAMS) for number in history.available(n)}


def test_uniform_draws_are_equally_likely() -> None:
    history, replay = filled()
    drawn = np.asarray(jax.jit(lambda key: draw_uniform(replay, key, (400, 500)))(jax.random.key(0)))
    rows, counts = np.unique(drawn, return_counts=True)
    assert set(rows.tolist()) == rows_of(history, replay)
    expected = drawn.size / len(rows)
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    assert chi_squared < len(rows) + 5 * np.sqrt(2 * len(rows))


def test_new_transitions_have_the_largest_priority_and_nothing_else_is_drawn() -> None:
    history, replay = filled(prioritised=True)
    priorities = np.asarray(replay.sums[0])
    assert set(np.flatnonzero(priorities).tolist()) == rows_of(history, replay)
    assert set(priorities[priorities > 0].tolist()) == {1.0}
    replay = prioritise(replay, jnp.asarray(sorted(rows_of(history, replay))[:2]), jnp.asarray([3.0, 0.5]))
    replay = insert(replay, history.rollout())
    assert set(np.flatnonzero(np.asarray(replay.sums[0])).tolist()) == rows_of(history, replay)
    newest = row_of(replay, 0, int(replay.written[0]) - 1)
    assert float(replay.sums[0][newest]) == float(replay.max_priority) == 3.0
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


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, 1025, 40_000])
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


def test_a_replay_too_small_for_a_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"replay of 30 for 3 environments has 10 rows for each.*set replay_size to at least 36"):
        start_replay(SPEC, capacity=30, num_steps=5)
    start_replay(SPEC, capacity=36, num_steps=5)


def test_a_replay_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = SimpleNamespace(replay=jax.eval_shape(lambda: start_replay(SPEC, capacity=51_000, num_steps=5)))
    needed = replay_bytes(learner)
    assert needed == 51_000 * (8 + 4 + 4 + 4 + 3 + 7 + 4) + 3 * STREAMS * 4 + 4
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


def test_what_has_no_priority_is_never_drawn_by_rounding() -> None:
    """Four million draws from a tree of which most leaves are 0; what is left after a subtraction can be a little less than 0."""
    random = np.random.default_rng(0)
    size = 40_000
    priority = (random.exponential(size=size) * (random.random(size) < 0.3)).astype(np.float32)
    tree: Any = SimpleNamespace(sums=set_priorities(empty_sums(size), jnp.arange(size), jnp.asarray(priority)))
    least = jax.jit(lambda key: jnp.min(draw_prioritised(tree, key, (200_000,))[1]))
    assert min(float(least(jax.random.key(i))) for i in range(20)) > 0
