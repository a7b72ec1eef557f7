"""How a replay of Atari frames grows: its memory, the time to insert and to draw, and what a checkpoint of it costs.

    python benchmarks/frames.py                                            measure, print the table, write results/frames.json
    python benchmarks/frames.py --table benchmarks/results/frames.json     print the table of a recorded result

Stacks of four frames of 84 by 84, eight environments. The largest replay takes 7.1 GB of memory, and its checkpoints as much of the
disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete
from machine import RESULTS, ROOT, provenance
from speed import load_now

from surefoot.replay import Replay, draw_uniform, insert, start_replay, transitions
from surefoot.training.checkpoint import newest, save
from surefoot.training.engine import compiler_options
from surefoot.types import EnvironmentSpec, Rollout

SPEC = EnvironmentSpec("Atari", Box(0, 255, (4, 84, 84), np.uint8), Discrete(18), 8, frame_stack=4)
SIZES = 100_000, 283_000, 1_000_000  # the second takes 2 GB
NUM_STEPS, LONG, EPISODE, BATCH, LOOP = 4, 125, 1000, 32, 200
STEPS_BETWEEN = 10_000  # from one checkpoint to the next


def frames(time: jax.Array, episode: jax.Array) -> jax.Array:
    """[..., 4, 84, 84] unlike each other; zeros before an episode's first."""
    number = (time[..., None] - jnp.arange(3, -1, -1)).astype(jnp.uint32)[..., None, None]
    pixel = jnp.arange(84 * 84, dtype=jnp.uint32).reshape(84, 84)
    mixed = (number + jnp.uint32(7919) * episode[..., None, None, None].astype(jnp.uint32)) * jnp.uint32(2654435761) + pixel * jnp.uint32(
        40503
    )
    return jnp.where(number > jnp.uint32(2**31), 0, mixed >> 24).astype(jnp.uint8)


def rollout(begin: jax.Array, num_steps: int) -> Rollout:
    """Steps from `begin` on, in episodes of the same length."""
    step = begin + jnp.zeros((num_steps, SPEC.num_envs), jnp.int32) + jnp.arange(num_steps)[:, None]
    time, last = step % EPISODE, step[-1] + 1
    ended = time == EPISODE - 1
    return Rollout(
        obs=frames(time, step // EPISODE),
        action=jnp.zeros_like(step),
        reward=jnp.ones(step.shape),
        terminated=ended,
        truncated=jnp.zeros_like(ended),
        final_obs=frames(time + 1, step // EPISODE),
        valid=jnp.ones_like(ended),
        time=time,
        last_obs=frames(last % EPISODE, last // EPISODE),
        progress=jnp.zeros(()),
    )


def draw_and_forget(replay: Replay, key: jax.Array) -> tuple[jax.Array, ...]:
    """LOOP minibatches one after the other, of which the last is given."""
    shape = BATCH, *(SPEC.observation_space.shape or ())

    def one(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        batch = transitions(replay, draw_uniform(replay, jax.random.fold_in(key, i), (BATCH,)), n_step=3, discount=0.99)
        return batch.obs, batch.next_obs, carry[2] + batch.reward

    return jax.lax.fori_loop(0, LOOP, one, (jnp.zeros(shape, jnp.uint8), jnp.zeros(shape, jnp.uint8), jnp.zeros(BATCH)))


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - begin


def checkpoint(directory: Path, step: int, replay: Replay) -> None:
    save(directory, step, {"learner": replay}, {})


def restore(directory: Path, shapes: Replay) -> Replay:
    found = newest(directory)
    assert found is not None
    return found.restore("learner", shapes)


def measure(size: int, repetitions: int, directory: Path) -> dict[str, Any]:
    """One replay, full: bytes, microseconds and seconds."""
    jit = partial(jax.jit, compiler_options=compiler_options())
    fill = jit(lambda replay, begin: insert(replay, rollout(begin, LONG)), donate_argnums=0)
    begins = iter(range(0, 2**31 - LONG, LONG))

    def write(replay: Replay, count: int) -> Replay:
        for _ in range(-(-count // (LONG * SPEC.num_envs))):
            replay = jax.block_until_ready(fill(replay, np.int32(next(begins))))
        return replay

    replay = write(jit(lambda: start_replay(SPEC, capacity=size, num_steps=LONG))(), size)
    shapes = jax.eval_shape(lambda x: x, replay)
    draw, put = jit(draw_and_forget), jit(insert, donate_argnums=0)
    few = jax.block_until_ready(jit(partial(rollout, num_steps=NUM_STEPS))(np.int32(10)))
    drawing = [seconds_of(draw, replay, jax.random.key(i)) for i in range(repetitions + 1)][1:]  # the first compiles
    inserting = []
    for _ in range(10 * repetitions + 1):
        begin = time.perf_counter()
        replay = jax.block_until_ready(put(replay, few))
        inserting.append(time.perf_counter() - begin)
    first, unchanged = (seconds_of(checkpoint, directory, step, replay) for step in range(2))
    following = []
    for step in range(2, 2 + repetitions):
        replay = write(replay, STEPS_BETWEEN)
        following.append(seconds_of(checkpoint, directory, step, replay))
    del replay
    return {
        "size": size,
        "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        "draw_microseconds": round(statistics.median(drawing) / LOOP * 1e6, 1),
        "insert_microseconds": round(statistics.median(inserting[1:]) * 1e6, 1),
        "first_checkpoint_seconds": round(first, 2),
        "unchanged_checkpoint_seconds": round(unchanged, 2),
        "checkpoint_seconds": round(statistics.median(following), 2),
        "restore_seconds": round(seconds_of(restore, directory, shapes), 2),
    }


ROWS = {
    "bytes": "memory",
    "insert_microseconds": f"inserting {NUM_STEPS} steps of {SPEC.num_envs} environments",
    "draw_microseconds": f"a minibatch of {BATCH} transitions of three steps, two stacks each",
    "first_checkpoint_seconds": "the first checkpoint",
    "checkpoint_seconds": f"the next, {STEPS_BETWEEN:,} steps later",
    "unchanged_checkpoint_seconds": "one where nothing has changed",
    "restore_seconds": "checking and restoring it",
}


def table(record: dict[str, Any]) -> str:
    """Markdown: what each size costs."""
    measured = record["sizes"]

    def shown(name: str, value: float) -> str:
        if name == "bytes":
            return f"{value / 1e9:.2f} GB"
        return f"{value / 1e3:.2f} ms" if name.endswith("microseconds") else f"{value:.1f} s"

    sizes = [f"{each['size']:,} rows" for each in measured]
    lines = [f"| | {' | '.join(sizes)} |", f"| --- | {' | '.join('---:' for _ in sizes)} |"]
    lines += [f"| {label} | {' | '.join(shown(name, each[name]) for each in measured)} |" for name, label in ROWS.items()]
    machine = record["machine"]
    return "\n".join([*lines, "", f"`{machine['processor']}, {machine['cores']} cores; {record['date']}; jax {record['jax']}`"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows")
    parser.add_argument("--repetitions", type=int, default=5, help="of which the median counts")
    parser.add_argument("--disk", type=Path, help="where the checkpoints are written; by default a temporary directory beside this file")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "frames.json", help=f"by default {(RESULTS / 'frames.json').relative_to(ROOT)}"
    )
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a record and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    jax.config.update("jax_platforms", "cpu")
    record = provenance() | {"load": load_now(), "jax": jax.__version__, "sizes": []}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.disk or Path(__file__).parent) as directory:
            record["sizes"].append(measure(size, options.repetitions, Path(directory) / "checkpoints"))
    print(table(record), end="")
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
