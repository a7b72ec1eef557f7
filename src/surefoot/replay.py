"""Replay: transitions of earlier iterations, in memory that the compiled program writes in place, on a host or a device.

Each of N streams has a ring of rows. A row is an observation with what was done there; where an episode ends, one more row holds its
last observation, so that every observation is stored once and the successor of a transition is the row after it. Of stacked frames a
row has the newest. Stacks and n-step returns are made when a transition is drawn. Prioritised replay (Schaul et al. 2016,
arXiv:1511.05952, section 3.3) keeps a tree of sums in which a parent is always recomputed from its children, so that rounding does
not add up.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box

from .spaces import choices, zero_actions, zeros
from .types import Array, EnvironmentSpec, Observation, PyTree, Rollout

NOWHERE = np.iinfo(np.int32).max  # the place of what is not written
BRANCHES = 16  # children of a node: a cache line of them


class Rows(NamedTuple):
    """What is stored, [C, ...] with C = N streams times the length of a ring."""

    obs: Observation  # of a stack of K frames the newest
    action: jax.Array  # in the policy's units
    reward: jax.Array  # float32
    terminated: jax.Array  # bool
    truncated: jax.Array  # bool
    acted: jax.Array  # bool; false where the row only holds an observation
    action_mask: jax.Array | None = None  # [C, A] bool
    older: jax.Array | None = None  # [C, K - 1] bool, which frames of its stack are of its episode; None where K is 1
    old_log_prob: jax.Array | None = None  # float32, of the policy that acted; None where nobody asks for it


class Replay(NamedTuple):
    """Rows, where the rings stand, and priorities where there are any. The k-th row of a stream stands in its ring at k modulo L."""

    rows: Rows
    order: jax.Array  # [C] int32, the row of each transition, that of the k-th of a stream at k modulo the length L of its ring
    cursor: jax.Array  # [N] int32, which row a stream writes next; the observation there is that of its newest successor
    time: jax.Array  # [N] int32, steps since the reset of what stands there
    written: jax.Array  # [N] int32, transitions so far
    expired: jax.Array  # [N] int32, of these the ones of which something was written over
    sums: tuple[jax.Array, ...]  # a tree: priorities [C], sums of 16 of them each, and so on to at most 16; empty where all are equal
    max_priority: jax.Array  # [] with which a transition begins

    @property
    def size(self) -> jax.Array:
        """[] transitions that can be drawn."""
        return jnp.sum(self.written - self.expired)


class Transitions(NamedTuple):
    """What a learner draws, [B, ...]: up to n steps from `obs` on."""

    obs: Observation
    action: jax.Array
    reward: jax.Array  # sum of gamma^k r_k over the steps
    next_obs: Observation  # after them
    discount: jax.Array  # gamma^(number of steps); 0 where the episode terminated
    action_mask: jax.Array | None = None
    next_action_mask: jax.Array | None = None


class Sequences(NamedTuple):
    """Rows one after another, [L, B, ...] as a rollout has them; behind each that counts stands its true successor."""

    obs: Observation  # [L + 1, B, ...]
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array  # also where the replay ends
    valid: jax.Array  # false where a row holds an observation alone, and from where the replay ends
    action_mask: jax.Array | None = None  # [L + 1, B, A]
    old_log_prob: jax.Array | None = None


def start_replay(
    spec: EnvironmentSpec, *, capacity: int, num_steps: int, prioritised: bool = False, keeps_log_prob: bool = False
) -> Replay:
    """Room for `capacity` rows, shared equally by the streams; ValueError where rollouts of `num_steps` do not fit."""
    ring, stack = capacity // spec.num_envs, spec.frame_stack
    if ring < (least := 2 * num_steps + 1 + stack):
        raise ValueError(
            f"A replay of {capacity} for {spec.num_envs} environments has {ring} rows for each, and an iteration of {num_steps} steps can "
            f"write {2 * num_steps + 1}{f' behind the {stack - 1} older frames of a stack' if stack > 1 else ''}; "
            f"set replay_size to at least {least * spec.num_envs}."
        )
    size = ring * spec.num_envs
    obs = zeros(spec.observation_space)
    assert stack == 1 or (isinstance(spec.observation_space, Box) and len(obs) == stack), spec
    rows = Rows(
        obs=jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), obs if stack == 1 else obs[-1]),
        action=zero_actions(spec.action_space, size),
        reward=jnp.zeros(size),
        terminated=jnp.zeros(size, bool),
        truncated=jnp.zeros(size, bool),
        acted=jnp.zeros(size, bool),
        action_mask=jnp.ones((size, sum(choices(spec.action_space) or ())), bool) if spec.has_action_mask else None,
        older=jnp.zeros((size, stack - 1), bool) if stack > 1 else None,
        old_log_prob=jnp.zeros(size) if keeps_log_prob else None,
    )
    nothing = jnp.zeros(spec.num_envs, jnp.int32)
    sums = empty_sums(size) if prioritised else ()
    return Replay(rows, jnp.zeros(size, jnp.int32), nothing, nothing, nothing, nothing, sums, jnp.ones(()))


def is_older(time: Array, num_older: int) -> Array:
    """[..., K - 1] which of the older frames, the oldest first, belong to an episode that has lasted `time` [...] steps."""
    return time[..., None] >= np.arange(num_older, 0, -1)


def insert(replay: Replay, rollout: Rollout, old_log_prob: jax.Array | None = None) -> Replay:
    """Append the valid rows of a rollout [T, N], the last observation of each episode, and what will be acted on next.

    A replay that keeps log-probabilities is given those of the actions, [T, N].
    """
    assert (old_log_prob is None) == (replay.rows.old_log_prob is None)
    num_streams, size = len(replay.cursor), len(replay.order)
    ring = size // num_streams
    begin = ring * jnp.arange(num_streams)
    ended = (rollout.terminated | rollout.truncated) & rollout.valid
    present = jnp.stack([rollout.valid, ended], axis=1)  # [T, 2, N]: a row, and behind it the last observation
    before = jnp.cumsum(present.reshape(-1, num_streams), axis=0).reshape(present.shape) - present
    # Where a resumed run began a new episode, what was to be acted on next stays: it is the last that was seen of the old one.
    is_left = (rollout.time[0] == 0) & (replay.time > 0)
    cursor = replay.cursor + is_left
    number = cursor + before
    place = jnp.where(present, begin + number % ring, NOWHERE)
    cursor = cursor + jnp.sum(present, axis=(0, 1))
    where = jnp.concatenate([place.reshape(-1), begin + cursor % ring])
    left = jnp.where(is_left, begin + (replay.cursor - 1) % ring, NOWHERE)

    def put(buffer: jax.Array, row: Any, last: Any, following: Any, *before: Any) -> jax.Array:
        """Into a buffer [C, ...]: rows [T, N, ...], what ends their episodes [T, N, ...], and what stands at the new cursor [N, ...].

        In the last row of an episode that was left goes what is given of `before` [N, ...]. All in one write: of two, one after the
        other, XLA makes copies of the buffer.
        """
        both = jnp.stack([row, last], axis=1)
        values = jnp.concatenate([both.reshape(-1, *both.shape[3:]), following, *before])
        return buffer.at[jnp.concatenate([where, *[left for _ in before]])].set(values.astype(buffer.dtype), mode="drop")

    zero, no = jnp.zeros_like(rollout.reward), jnp.zeros_like(ended)
    rows, masks = replay.rows, (rollout.action_mask, rollout.final_action_mask, rollout.last_action_mask)
    obs, older = (rollout.obs, rollout.final_obs, rollout.last_obs), rows.older
    time = jnp.where(rollout.valid[-1] & ~ended[-1], rollout.time[-1] + 1, 0)
    if older is not None:
        obs = obs[0][:, :, -1], obs[1][:, :, -1], obs[2][:, -1]
        older = put(older, *(is_older(each, older.shape[-1]) for each in (rollout.time, rollout.time + 1, time)))
    rows = Rows(
        obs=jax.tree.map(put, rows.obs, *obs),
        action=put(rows.action, rollout.action, jnp.zeros_like(rollout.action), jnp.zeros_like(rollout.action[0])),
        reward=put(rows.reward, rollout.reward, zero, zero[0]),
        terminated=put(rows.terminated, rollout.terminated, no, no[0]),
        truncated=put(rows.truncated, rollout.truncated, no, no[0], is_left),
        acted=put(rows.acted, rollout.valid, no, no[0]),
        action_mask=None if rows.action_mask is None else put(rows.action_mask, *masks),
        older=older,
        old_log_prob=None if old_log_prob is None else put(rows.old_log_prob, old_log_prob, zero, zero[0]),
    )
    transition = replay.written + jnp.cumsum(rollout.valid, axis=0) - rollout.valid  # [T, N], the number of each in its stream
    slot = jnp.where(rollout.valid, begin + transition % ring, NOWHERE)
    order = replay.order.at[slot].set(number[:, 0], mode="drop")
    written = replay.written + jnp.sum(rollout.valid, axis=0)
    # Only as many transitions can have expired as rows were written, and the few that share their oldest frame with one of these.
    # Asking rows before they are written would make XLA copy them; of one that has been written over `order` tells enough.
    most = len(where) // num_streams + (0 if older is None else older.shape[-1])
    oldest = replay.expired + jnp.arange(most)[:, None]
    row = order[begin + oldest % ring]
    is_over = (row <= cursor - ring) | (oldest + ring < written)
    lacks_frame = False if older is None else row - jnp.sum(older[begin + row % ring], axis=-1) <= cursor - ring
    is_gone = (oldest < written) & (is_over | lacks_frame)
    expired = replay.expired + jnp.sum(is_gone, axis=0)
    sums = replay.sums
    if sums:
        priority = jnp.stack([jnp.where(rollout.valid, replay.max_priority, 0.0), zero], axis=1).reshape(-1)
        priority = jnp.concatenate([priority, zero[0]])
        if older is not None:  # of these the row itself is still there
            lost = jnp.where(is_gone & ~is_over, begin + row % ring, NOWHERE).reshape(-1)
            where, priority = jnp.concatenate([where, lost]), jnp.pad(priority, (0, len(lost)))
        sums = set_priorities(sums, where, priority)
    return replay._replace(
        rows=rows,
        order=order,
        cursor=cursor,
        time=time,
        written=written,
        expired=expired,
        sums=sums,
    )


def draw_uniform(replay: Replay, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Rows of transitions, each equally likely, with replacement."""
    ring = len(replay.order) // len(replay.cursor)
    available = replay.written - replay.expired
    end = jnp.cumsum(available)
    chosen = jax.random.randint(key, shape, 0, jnp.maximum(end[-1], 1))
    stream = jnp.searchsorted(end, chosen, side="right")
    number = replay.expired[stream] + chosen - (end - available)[stream]
    return ring * stream + replay.order[ring * stream + number % ring] % ring


def draw_prioritised(replay: Replay, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(rows of transitions with a probability in proportion to their priorities, these probabilities)."""
    top = replay.sums[-1]
    total = jnp.sum(top)
    left = jax.random.uniform(key, shape, maxval=total)
    node = jnp.zeros(shape, jnp.int32)
    for level in reversed(replay.sums):
        weight = level.reshape(-1, min(BRANCHES, len(level)))[node]
        # What the children before a child weigh: a product with a triangle of ones, in a third of the time of a cumulative sum.
        before = jnp.matmul(weight, np.triu(np.ones(weight.shape[-1:] * 2, np.float32), k=1), precision="highest")
        # Whatever rounding does, the first child that weighs anything begins at 0, and one without weight is never met.
        is_met = (weight > 0) & (before <= left[..., None])
        child = jnp.max(jnp.where(is_met, np.arange(weight.shape[-1]), 0), axis=-1)
        left = left - jnp.max(jnp.where(is_met, before, 0.0), axis=-1)
        node = BRANCHES * node + child
    # Not asked of the tree again: it would have to be copied where priorities may be written before that.
    priority = jnp.take_along_axis(weight, child[..., None], axis=-1)[..., 0]
    return node, priority / total


def draw(config: Any, replay: Replay, key: jax.Array, shape: tuple[int, ...], progress: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rows of transitions, their weights in a loss): drawn by their priorities where `config.prioritised`, else uniformly."""
    if not config.prioritised:
        return draw_uniform(replay, key, shape), jnp.ones(shape)
    index, probability = draw_prioritised(replay, key, shape)
    exponent = config.importance_exponent + (1.0 - config.importance_exponent) * progress
    return index, importance_weight(replay, probability, exponent=exponent)


def importance_weight(replay: Replay, probability: jax.Array, *, exponent: Any) -> jax.Array:
    """(1 / (size times probability))^exponent over the largest of each batch [..., B] (Schaul et al. 2016, section 3.4)."""
    weight = (replay.size * probability) ** -exponent
    return weight / jnp.max(weight, axis=-1, keepdims=True)


def prioritise(replay: Replay, index: jax.Array, priority: jax.Array, *, where: Any = True) -> Replay:
    """New priorities, all positive, of the rows `index`; nothing changes unless `where`."""
    place = jnp.where(where, index.ravel(), NOWHERE)
    largest = jnp.where(where, jnp.maximum(replay.max_priority, jnp.max(priority)), replay.max_priority)
    return replay._replace(sums=set_priorities(replay.sums, place, priority.ravel()), max_priority=largest)


def transitions(replay: Replay, index: jax.Array, *, n_step: int, discount: float) -> Transitions:
    """The transitions that begin in the rows `index` [...], of fewer than `n_step` steps where an episode or the replay ends."""
    rows = replay.rows
    ring = len(replay.order) // len(replay.cursor)
    begin = index // ring * ring
    reward, weight = jnp.zeros(index.shape), jnp.ones(index.shape)
    row, last, going_on = index, index, jnp.ones(index.shape, bool)
    for _ in range(n_step):
        going_on = going_on & rows.acted[row]
        reward = reward + jnp.where(going_on, weight * rows.reward[row], 0.0)
        weight = jnp.where(going_on, discount * weight, weight)
        last = jnp.where(going_on, row, last)
        going_on = going_on & ~(rows.terminated[row] | rows.truncated[row])
        row = begin + (row - begin + 1) % ring
    after = begin + (last - begin + 1) % ring
    mask = rows.action_mask
    return Transitions(
        obs=observations(rows, index, ring),
        action=rows.action[index],
        reward=reward,
        next_obs=observations(rows, after, ring),
        discount=jnp.where(rows.terminated[last], 0.0, weight),
        action_mask=None if mask is None else mask[index],
        next_action_mask=None if mask is None else mask[after],
    )


def observations(rows: Rows, index: jax.Array, ring: int) -> Observation:
    """What was seen in the rows `index` [...]; of frames the whole stack, with zeros for those from before the episode."""
    if rows.older is None:
        return jax.tree.map(lambda x: x[index], rows.obs)
    begin, older = index // ring * ring, rows.older[index]
    back = np.arange(older.shape[-1], 0, -1)
    place = jnp.where(older, begin[..., None] + ((index - begin)[..., None] - back) % ring, NOWHERE)
    return rows.obs.at[jnp.concatenate([place, index[..., None]], axis=-1)].get(mode="fill", fill_value=0)


def sequences(replay: Replay, index: jax.Array, *, length: int) -> Sequences:
    """The `length` rows of its stream from each of the rows `index` [B] on, over the ends of episodes, up to where the replay ends."""
    rows = replay.rows
    ring = len(replay.order) // len(replay.cursor)
    stream = index // ring
    place = ring * stream + (index % ring + jnp.arange(length + 1)[:, None]) % ring
    is_end = place == ring * stream + replay.cursor[stream] % ring  # what will be acted on next: the rows from there on are the oldest
    row = place[:-1]
    valid = rows.acted[row] & (jnp.cumsum(is_end, axis=0) == 0)[:-1]
    return Sequences(
        obs=observations(rows, place, ring),
        action=rows.action[row],
        reward=rows.reward[row],
        terminated=rows.terminated[row],
        truncated=rows.truncated[row] | is_end[1:],
        valid=valid,
        action_mask=None if rows.action_mask is None else rows.action_mask[place],
        old_log_prob=None if rows.old_log_prob is None else rows.old_log_prob[row],
    )


def empty_sums(size: int) -> tuple[jax.Array, ...]:
    """A tree over `size` priorities of 0, each level a multiple of 16 long but the last."""
    sums = []
    while True:
        size = size if size <= BRANCHES else -(-size // BRANCHES) * BRANCHES
        sums.append(jnp.zeros(size))
        if size <= BRANCHES:
            return tuple(sums)
        size //= BRANCHES


def set_priorities(sums: tuple[jax.Array, ...], index: jax.Array, priority: jax.Array) -> tuple[jax.Array, ...]:
    """The tree after `priority` [B] at the rows `index` [B], but for those at NOWHERE."""
    level, *above = sums
    levels = [level := level.at[index].set(priority, mode="drop")]
    for parents in above:
        index = jnp.where(index == NOWHERE, NOWHERE, index // BRANCHES)
        children = jnp.sum(level.reshape(-1, BRANCHES)[index], axis=-1)
        levels.append(level := parents.at[index].set(children, mode="drop"))
    return tuple(levels)


def replay_bytes(learner: PyTree) -> int:
    """What the replay of a learner, or of its shapes, takes in memory; 0 without one."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(getattr(learner, "replay", None)))


def check_memory(config: Any, learner: PyTree) -> None:
    """Raise a ValueError where the replay of these shapes does not fit into the memory that is free."""
    needed, free = replay_bytes(learner), free_memory()
    if free is not None and needed > free:
        fits = int(config.replay_size * free / needed * 0.9)
        raise ValueError(
            f"A replay of {config.replay_size:,} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            f"set replay_size to at most {fits:,}."
        )


def free_memory() -> int | None:
    """Bytes that can be had without swapping, where the system says so."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def gradient_steps(config: Any, num_envs: int) -> int:
    """Of one iteration: `update_to_data` times its environment steps; ValueError where they are not whole, or none would be taken."""
    if config.learning_starts > (room := config.replay_size - 2 * num_envs):
        raise ValueError(
            f"learning_starts={config.learning_starts} transitions are never there: a replay_size of {config.replay_size} holds {room} "
            "at most; make the one smaller or the other larger."
        )
    steps = config.update_to_data * config.num_steps * num_envs
    if round(steps) < 1 or abs(steps - round(steps)) > 1e-6:
        raise ValueError(
            f"update_to_data={config.update_to_data} of {config.num_steps} steps x {num_envs} environments is {steps:g} gradient steps; "
            "choose num_steps or update_to_data so that it is a whole number."
        )
    return round(steps)


def learn_once_started(config: Any, replay: Replay, step: Any, carry: PyTree, minibatches: PyTree) -> tuple[jax.Array, PyTree, Any]:
    """(whether `config.learning_starts` transitions are there, and if so what a scan of `step` over the minibatches gives).

    `step(carry, minibatch) -> (carry, (metrics, output))`; metrics come back as their means, outputs one after another. Before
    that the carry is left as it is, and all else is NaN.
    """

    started = replay.size >= config.learning_starts
    one = jax.tree.map(lambda x: x[0], minibatches)
    shapes = jax.eval_shape(step, carry, one)[1]
    num_steps = len(jax.tree.leaves(minibatches)[0])
    nothing = jax.tree.map(lambda x: jnp.full((num_steps, *x.shape), jnp.nan, x.dtype), shapes)

    def take(i: jax.Array, loop: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        carry, results = loop
        carry, result = step(carry, jax.tree.map(lambda x: x[i], minibatches))
        return carry, jax.tree.map(lambda all_of_them, one: all_of_them.at[i].set(one), results, result)

    # A loop that may have no steps leaves the carry where it is; the branches of a `cond` would copy it.
    carry, (metrics, outputs) = jax.lax.fori_loop(0, jnp.where(started, num_steps, 0), take, (carry, nothing))
    return started, carry, (jax.tree.map(jnp.nanmean, metrics), outputs)
