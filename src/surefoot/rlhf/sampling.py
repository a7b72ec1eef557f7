"""Sampling from a language model: one pass over the prompts, then a compiled loop over a key-value cache of fixed size.

Tokens come from the model's own distribution at a temperature. Top-k, top-p and a minimal length are left out: the probabilities
that training computes would not know of them. Log-probabilities are not returned, as training computes them with the forward pass
that it differentiates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..distributions import MASKED_LOGIT
from ..types import Array
from .model import (
    LanguageModel,
    Layer,
    apply_block,
    attention,
    causal,
    check_tokens,
    embed,
    folded,
    logits_of,
    positions_of,
    project,
    rotation_of,
    unrolled,
)

ROWS_AT_LEAST = 16  # of a part of a batch: products of fewer rows are slower by more than a core of one's own gains
Cache = Any  # keys [B, K, head_dim, S] and values [B, K, S, head_dim]: of all layers, stacked, or a list with those of each


class Generated(NamedTuple):
    """Prompts with their responses, all rows of one length."""

    tokens: jax.Array  # [B, P + N] int32
    mask: jax.Array  # [B, P + N] bool: real tokens, of the prompt and of the response
    response_mask: jax.Array  # [B, P + N] bool: those of the response, with the token that stopped it


def generate(
    model: LanguageModel,
    prompts: Array,
    prompt_mask: Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token: int | Sequence[int],
    pad_token: int,
    done: Array | None = None,
) -> Generated:
    """Continue each prompt [B, P], padded on its left where `prompt_mask` is false, by up to `max_new_tokens` tokens.

    What is drawn for a row depends on the key, its place in the batch and its prompt; the other rows change no more than rounding.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        stop_token: ends a response, of which it is the last token; one or several.
        pad_token: fills up what follows. Masks alone tell it from the same token in a text.
        done: [B] rows that get no response, such as those that fill up a batch.

    Raises:
        ValueError: shapes that do not fit, a prompt that is empty or not padded on its left, tokens beyond the vocabulary or the
            model's positions.
    """
    stop_tokens = (stop_token,) if isinstance(stop_token, int | np.integer) else tuple(stop_token)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((model, prompts, prompt_mask, key, done)))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must lie in [0, inf), got {temperature}; 0 takes the most likely token.")
    check_tokens(model.config, prompts, prompt_mask, new=max_new_tokens)
    rows = jnp.shape(prompts)[0]
    if done is not None and jnp.shape(done) != (rows,):
        raise ValueError(f"done must have shape ({rows},), one truth value for each prompt; got {jnp.shape(done)}.")
    done = np.zeros(rows, bool) if done is None else done
    if not traced:
        check_prompts(model.config.vocab_size, *map(np.asarray, (prompts, prompt_mask, done)), (*stop_tokens, pad_token))
    batch = prompts, prompt_mask, done, np.arange(rows)
    rest = key, np.asarray(stop_tokens, np.int32), np.int32(pad_token), np.float32(temperature)
    size = rows // (1 if traced else number_of_parts(rows))

    def part(begin: int) -> Generated:
        return continue_prompts(model, *(x[begin : begin + size] for x in batch), *rest, new=max_new_tokens)

    begins = range(0, rows, size)
    first = part(0)  # compiles, if need be, before the others ask for the same
    if len(begins) == 1:
        return first
    with ThreadPoolExecutor(len(begins) - 1) as pool:
        return jax.tree.map(lambda *x: jnp.concatenate(x), first, *pool.map(part, begins[1:]))


def number_of_parts(rows: int) -> int:
    """Into how many equal parts to divide a batch: on a CPU one for each core, if they are not too small.

    Most products of a step are too small for XLA to share them among cores, but calls from different threads run side by side.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return next(parts for parts in range(max(1, min(cores, rows // ROWS_AT_LEAST)), 0, -1) if rows % parts == 0)


def check_prompts(vocab_size: int, prompts: Array, mask: Array, done: Array, others: tuple[int, ...]) -> None:
    """Raise ValueError for prompts that could be continued only by accident; `others` are stop and pad tokens."""
    for name, tokens in (("The prompts hold", prompts[mask != 0]), ("The stop and pad tokens are", np.asarray(others))):
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise ValueError(f"{name} tokens from {tokens.min()} to {tokens.max()}, but the model knows 0 to {vocab_size - 1}.")
    real = (mask != 0)[~np.asarray(done, bool)]
    if (bad := ~real[:, -1] | (real[:, :-1] & ~real[:, 1:]).any(axis=1)).any():
        raise ValueError(
            f"Prompt {np.flatnonzero(~np.asarray(done, bool))[bad][0]} is empty or does not end at the last column; pad prompts on "
            "their left, and begin an empty one with a token that begins texts."
        )


class State(NamedTuple):
    """Of the loop over the tokens of N responses."""

    step: jax.Array  # [] tokens drawn so far
    token: jax.Array  # [B] the last of them
    done: jax.Array  # [B]
    responses: jax.Array  # [N, B]
    real: jax.Array  # [N, B]
    cache: Cache


@partial(jax.jit, static_argnames="new")
def continue_prompts(
    model: LanguageModel,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    done: jax.Array,
    rows: jax.Array,
    key: jax.Array,
    stop_tokens: jax.Array,
    pad_token: jax.Array,
    temperature: jax.Array,
    *,
    new: int,
) -> Generated:
    """What `generate` says, for the prompts that are these `rows` [B] of its batch."""
    number, length = prompts.shape
    prompts, prompt_mask, done = prompts.astype(jnp.int32), prompt_mask != 0, done != 0
    uniform = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (new, 2)))(rows)
    model = folded(model)
    layers = unstacked(model.layers, model.config.num_layers) if unrolled(model.config) > 1 else model.layers
    hidden, cache = prefill(model, layers, prompts, prompt_mask, new)
    real_tokens = jnp.sum(prompt_mask, axis=1)
    readable = jnp.pad(prompt_mask, ((0, 0), (0, new)), constant_values=True)

    def draw_next(state: State, hidden: jax.Array) -> State:
        drawn = draw(logits_of(model, hidden), uniform[:, state.step], temperature)
        token = jnp.where(state.done, pad_token, drawn)
        responses, real = state.responses.at[state.step].set(token), state.real.at[state.step].set(~state.done)
        done = state.done | jnp.any(token[:, None] == stop_tokens, axis=1)
        return State(state.step + 1, token, done, responses, real, state.cache)

    def advance(state: State) -> State:
        slot = length + state.step - 1
        visible = readable & (jnp.arange(length + new) <= slot)
        hidden, cache = decode(model, layers, state.cache, state.token, real_tokens + state.step - 1, slot, visible)
        return draw_next(state._replace(cache=cache), hidden)

    empty = jnp.full((new, number), pad_token), jnp.zeros((new, number), bool)
    start = draw_next(State(jnp.int32(0), jnp.zeros(number, jnp.int32), done, *empty, cache), hidden)
    end = jax.lax.while_loop(lambda state: (state.step < new) & ~jnp.all(state.done), advance, start)
    return Generated(
        jnp.concatenate([prompts, end.responses.T], axis=1),
        jnp.concatenate([prompt_mask, end.real.T], axis=1),
        jnp.pad(end.real.T, ((0, 0), (length, 0))),
    )


def prefill(model: LanguageModel, layers: Any, prompts: jax.Array, mask: jax.Array, new: int) -> tuple[jax.Array, Cache]:
    """What the model makes of the last token of each prompt, [B, D], and the cache of all, with room for `new` tokens more."""
    positions = positions_of(mask)
    rotation = rotation_of(model.config, positions)
    visible = causal(mask)

    def cached(keys: jax.Array, values: jax.Array) -> Cache:
        keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
        return jnp.pad(keys, ((0, 0),) * 3 + ((0, new),)), jnp.pad(values, ((0, 0),) * 2 + ((0, new), (0, 0)))

    def block(x: jax.Array, layer: Layer) -> tuple[jax.Array, Cache]:
        def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, Cache]:
            return attention(queries, keys, values, visible), cached(keys, values)

        return apply_block(model.config, layer, x, rotation, attend)

    def last_block(x: jax.Array, layer: Layer) -> tuple[jax.Array, Cache]:
        """Of the last layer's work for the other tokens nothing but keys and values is used."""

        def attend(query: jax.Array, *_: jax.Array) -> tuple[jax.Array, Cache]:
            _, keys, values = project(model.config, layer, x, rotation)
            return attention(query[:, None], keys, values, visible[:, -1:])[:, 0], cached(keys, values)

        at_last = None if rotation is None else jax.tree.map(lambda x: x[:, -1], rotation)
        return apply_block(model.config, layer, x[:, -1], at_last, attend)

    x = embed(model, prompts, positions)
    if isinstance(layers, list):
        cache: Cache = [None] * len(layers)
        for i, layer in enumerate(layers[:-1]):
            x, cache[i] = block(x, layer)
        last, cache[-1] = last_block(x, layers[-1])
    else:
        x, cache = jax.lax.scan(block, x, layers)
        last = x[:, -1]
    return model.final_norm(last), cache


def decode(
    model: LanguageModel, layers: Any, cache: Cache, token: jax.Array, position: jax.Array, slot: jax.Array, visible: jax.Array
) -> tuple[jax.Array, Cache]:
    """What the model makes of one more token of each row, [B, D], and the cache with it at `slot`. `visible` [B, S]: slots to see."""
    rotation = rotation_of(model.config, position)

    def block(x: jax.Array, layer_and_cache: tuple[Layer, Cache]) -> tuple[jax.Array, Cache]:
        layer, (keys, values) = layer_and_cache

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Cache]:
            put = jax.lax.dynamic_update_index_in_dim
            cached = put(keys, key, slot, axis=3), put(values, value, slot, axis=2)
            return attention_to_cache(query, *cached, visible), cached

        return apply_block(model.config, layer, x, rotation, attend)

    x = embed(model, token, position)
    if isinstance(layers, list):  # each layer's cache is written in place; a scan copies all of it, and the weights
        cache = list(cache)
        for i, layer in enumerate(layers):
            x, cache[i] = block(x, (layer, cache[i]))
    else:
        x, cache = jax.lax.scan(block, x, (layers, cache))
    return model.final_norm(x), cache


def attention_to_cache(query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """`attention` of one query [B, H, head_dim] of each row; keys lie with their slots last, as is fastest on a CPU."""
    grouped = query.reshape(*values.shape[:2], -1, values.shape[-1])
    scores = jnp.einsum("bkgd,bkds->bkgs", grouped, keys, preferred_element_type=jnp.float32) * values.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED_LOGIT))
    return jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values).reshape(query.shape)


def unstacked(tree: Any, number: int) -> list[Any]:
    """A list of `number` trees, of one whose leaves have them along their first axis."""
    leaves, structure = jax.tree.flatten(tree)
    return [jax.tree.unflatten(structure, [x[i] for x in leaves]) for i in range(number)]


def draw(logits: jax.Array, uniform: jax.Array, temperature: jax.Array) -> jax.Array:
    """[B] tokens from logits [B, V] at a temperature, by two uniform numbers [B, 2] each; at 0 the first of the most likely.

    One number chooses among about sqrt(V) blocks of the vocabulary, the other a token of the block. A cumulative sum over the whole
    vocabulary would lose rare tokens to rounding; Gumbel noise for every token costs three times as much.
    """
    number, size = logits.shape
    width = math.isqrt(size - 1) + 1
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(temperature > 0, jnp.exp(below / temperature), below == 0)
    uniform = jnp.where(temperature > 0, uniform, 0)
    blocks = jnp.pad(weights, ((0, 0), (0, width * width - size))).reshape(number, width, width)
    block = pick(jnp.sum(blocks, axis=-1), uniform[:, 0])
    within = pick(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], uniform[:, 1])
    return (block * width + within).astype(jnp.int32)


def pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """[B] indices drawn in proportion to weights [B, n] by uniform numbers in [0, 1); one of weight 0 never is."""
    total = jnp.cumsum(weights, axis=-1)
    return jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
