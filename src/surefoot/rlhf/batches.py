"""Examples in an order that needs no state, padded to few lengths so that few programs are compiled."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..training.seeding import seed_for
from .data import Text

Ids = np.ndarray[Any, np.dtype[np.int32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Order = np.ndarray[Any, np.dtype[np.int64]]


class TokenPrompt(NamedTuple):
    """A prompt as the sampler sees it; the rest is what reward functions see."""

    ids: Ids  # [L]
    prompt: Text
    columns: dict[str, Any]
    line: int


class TokenSequence(NamedTuple):
    """A prompt and its completion with the end token; the completion begins at `num_prompt`."""

    ids: Ids  # [L]
    num_prompt: int
    line: int


class TokenPreference(NamedTuple):
    """Two sequences of one prompt, the better one first."""

    chosen: TokenSequence
    rejected: TokenSequence
    line: int


class TokenBatch(NamedTuple):
    """B sequences padded to L tokens. What is real is what `mask` says, never what an id looks like: pad may equal the end token."""

    ids: Ids  # [B, L]
    mask: Mask  # [B, L] tokens that are not padding
    is_completion: Mask  # [B, L] tokens of the completion, its end token among them


class Cursor(NamedTuple):
    """Where a run stands in its data; with the seed, all that a checkpoint has to keep of it."""

    epoch: int = 0
    position: int = 0  # of the next example in the epoch's order


@functools.lru_cache(maxsize=4)
def epoch_order(epoch: int, size: int, seed: int) -> Order:
    """The order of `size` examples in one epoch, [size]. Philox' raw words are the same in every version of NumPy, its shuffles are not."""
    words = np.random.Philox(np.random.SeedSequence([seed_for(seed, "data"), epoch])).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def take(cursor: Cursor, num: int, *, size: int, seed: int) -> tuple[Order, Cursor]:
    """(the next `num` of `size` examples [num], the cursor after them); every epoch has each example once, in an order of its own."""
    if not (cursor.epoch >= 0 and 0 <= cursor.position < size):
        raise ValueError(f"{cursor} does not lie in data of {size} examples; resume with the data and limits that the run began with.")
    taken: list[Order] = []
    while num > 0:
        order = epoch_order(cursor.epoch, size, seed)[cursor.position : cursor.position + num]
        taken.append(order)
        num -= len(order)
        end = cursor.position + len(order)
        cursor = Cursor(cursor.epoch, end) if end < size else Cursor(cursor.epoch + 1, 0)
    return np.concatenate([np.empty(0, np.int64), *taken]), cursor


def bucket_lengths(longest: int, *, shortest: int = 16) -> tuple[int, ...]:
    """The lengths that rows of up to `longest` tokens are padded to: `shortest` times 1, 1.5, 2, 3, 4, 6 ..., and `longest` itself."""
    assert shortest > 1, shortest
    lengths, length = [], shortest
    while length < longest:
        lengths += [length, length * 3 // 2]
        length *= 2
    return (*(length for length in lengths if length < longest), longest)


def pad(rows: Sequence[Ids], lengths: Sequence[int], pad_id: int, *, side: Literal["left", "right"]) -> tuple[Ids, Mask]:
    """(ids, mask), both [B, L], L the smallest of `lengths` that holds every row. Prompts are padded left, training sequences right."""
    longest = max(map(len, rows))
    width = min((length for length in lengths if length >= longest), default=None)
    assert width is not None, f"a row of {longest} tokens does not fit into {lengths}"
    ids, mask = np.full((len(rows), width), pad_id, np.int32), np.zeros((len(rows), width), np.bool_)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, True
    return ids, mask


def sequence_batch(sequences: Sequence[TokenSequence], lengths: Sequence[int], pad_id: int) -> TokenBatch:
    """Training sequences, padded on the right."""
    ids, mask = pad([sequence.ids for sequence in sequences], lengths, pad_id, side="right")
    num_prompt = np.array([sequence.num_prompt for sequence in sequences])
    return TokenBatch(ids, mask, mask & (np.arange(ids.shape[1]) >= num_prompt[:, None]))
