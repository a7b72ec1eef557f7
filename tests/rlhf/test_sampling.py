"""Sampling: the cache against the whole forward pass, frequencies against probabilities, and where responses end."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import ONE_OF_EACH, loaded, random_model, small, torch_model
from scipy import stats

from surefoot.rlhf import sampling
from surefoot.rlhf.model import hidden_states, logits_of, token_log_probs
from surefoot.rlhf.sampling import draw, generate

NEW = 6
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def prompts():
    """Four prompts of 5, 4, 2 and 1 tokens, padded on their left."""
    mask = np.arange(5) >= np.array([0, 1, 3, 4])[:, None]
    return np.random.default_rng(1).integers(0, 11, mask.shape), mask


@pytest.fixture(scope="module")
def model():
    return random_model(small())


def run(model, prompts, **settings):
    return generate(model, *prompts, KEY, **{"max_new_tokens": NEW, "temperature": 1.0, "stop_token": (), "pad_token": 0} | settings)


@jax.jit
def logits(model, tokens, mask):
    return logits_of(model, hidden_states(model, tokens, mask))


# The cache.


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_greedy_continuations_are_those_of_transformers(name, prompts):
    tokens, mask = prompts
    with torch.inference_mode():
        theirs = torch_model(name).generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), max_new_tokens=NEW, do_sample=False, pad_token_id=7
        )
    ours = run(loaded(name), prompts, temperature=0.0, stop_token=5, pad_token=7).tokens
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs.numpy())
    assert len(np.unique(theirs[:, 5:])) > 3


def test_the_cache_gives_what_the_training_pass_gives(model, prompts):
    """The probability of every token by the one is that by the other, to a relative 1e-5, at each step."""
    tokens, mask = prompts
    whole = np.pad(tokens, ((0, 0), (0, 4)), constant_values=3), np.pad(mask, ((0, 0), (0, 4)), constant_values=True)
    expected = jax.nn.log_softmax(logits(model, *whole))

    @jax.jit
    def through_the_cache(model):
        layers = sampling.unstacked(model.layers, 2)
        hidden, cache = sampling.prefill(model, layers, jnp.asarray(tokens), jnp.asarray(mask), 4)
        found = [logits_of(model, hidden)]
        for slot in range(5, 9):
            visible = jnp.asarray(whole[1]) & (jnp.arange(9) <= slot)
            position = jnp.asarray(mask.sum(axis=1) + slot - 5)
            hidden, cache = sampling.decode(model, layers, cache, jnp.full(4, 3), position, jnp.int32(slot), visible)
            found.append(logits_of(model, hidden))
        return jax.nn.log_softmax(jnp.stack(found, axis=1))

    assert np.abs(np.expm1(through_the_cache(model) - expected[:, 4:])).max() < 1e-5


def test_the_most_likely_tokens_of_a_deep_model_are_those_of_the_training_pass(prompts):
    """Nine layers are scanned, where two are not."""
    model = random_model(small(num_layers=9), spread=0.3)
    tokens, mask, response = run(model, prompts, temperature=0.0)
    best = jnp.argmax(logits(model, tokens, mask), axis=-1)
    np.testing.assert_array_equal(tokens[:, 5:], best[:, 4:-1])
    assert response[:, 5:].all()


# Drawing.

drawn = jax.jit(draw)


def test_a_draw_inverts_the_cumulative_distribution():
    """On a grid of pairs of uniform numbers every token is drawn as often as its probability says."""
    n, size, temperature = 500, 11, 0.7
    row = np.random.default_rng(0).normal(0, 2, size).astype(np.float32)
    row[4] = -np.inf
    grid = (np.arange(n, dtype=np.float32) + 0.5) / n
    uniform = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    tokens = drawn(np.broadcast_to(row, (len(uniform), size)), uniform, temperature)
    share = np.bincount(np.asarray(tokens), minlength=size) / len(uniform)
    expected = np.exp(row / temperature, dtype=np.float64)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=2 / n)
    assert share[4] == 0


def test_rare_tokens_of_a_large_vocabulary_are_not_lost():
    """60,000 tokens of 2e-9 each, which a cumulative sum in float32 would not notice beside one of nearly 1."""
    size = 60_001
    row = np.where(np.arange(size) > 0, np.log(2e-9), 0).astype(np.float32)
    n = 1000
    grid = np.stack([1 - (np.arange(n) + 0.5) / n * 1.2e-4, (np.arange(n) * 0.61803) % 1], axis=1).astype(np.float32)
    tokens = np.asarray(drawn(np.broadcast_to(row, (n, size)), grid, 1.0))
    assert 0.9 < np.mean(tokens > 0) < 1.0
    assert tokens.max() > 0.99 * size


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_a_probability(extreme):
    row = jnp.array([[-jnp.inf, 1.0, 0.3, -jnp.inf, 2.0, -jnp.inf, -jnp.inf]])
    assert drawn(row, jnp.full((1, 2), extreme, jnp.float32), 1.0)[0] == (1 if extreme == 0 else 4)


def test_at_temperature_zero_the_first_of_the_most_likely_is_drawn():
    row = jnp.array([[0.0, 3.0, 1.0, 3.0, 2.0], [1.0, 0.0, 0.0, 0.0, 1.5]])
    np.testing.assert_array_equal(drawn(row, jnp.full((2, 2), 0.9), 0.0), [1, 4])


def test_samples_are_as_frequent_as_they_are_likely():
    """Pairs of tokens after one prompt, 16384 times: chi-square over all pairs, so that the second is drawn given the first."""
    rows, size, temperature = 16384, 6, 0.8
    model = random_model(small(vocab_size=size), seed=4, spread=0.25)
    prompt = np.array([[1, 2, 0]])
    every_pair = np.array([[1, 2, 0, a, b] for a in range(size) for b in range(size)])
    log_prob, _ = token_log_probs(model, every_pair, np.ones_like(every_pair), temperature=temperature)
    expected = np.exp(np.asarray(log_prob[:, 3:], np.float64).sum(axis=1))
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    batch = np.repeat(prompt, rows, axis=0)
    tokens = np.asarray(run(model, (batch, np.ones_like(batch)), max_new_tokens=2, temperature=temperature).tokens)
    counts = np.bincount(tokens[:, 3] * size + tokens[:, 4], minlength=size**2)
    assert expected.min() * rows > 5
    assert stats.chisquare(counts, expected / expected.sum() * rows).pvalue > 0.01


def test_tokens_depend_on_the_key_and_on_nothing_random_besides(model, prompts):
    first, again = (run(model, prompts).tokens for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (generate(model, *prompts, jax.random.key(4), **SETTINGS).tokens != first).any()
    greedy = [generate(model, *prompts, jax.random.key(seed), **SETTINGS | {"temperature": 0.0}).tokens for seed in (3, 4)]
    np.testing.assert_array_equal(*greedy)


SETTINGS = {"max_new_tokens": NEW, "temperature": 1.0, "stop_token": (), "pad_token": 0}


def test_a_row_does_not_depend_on_the_others_nor_on_the_parts_of_its_batch(monkeypatch, model, prompts):
    whole = run(model, prompts)
    monkeypatch.setattr(sampling, "number_of_parts", lambda rows: 2)
    for one, other in zip(whole, run(model, prompts), strict=True):
        np.testing.assert_array_equal(one, other)
    tokens, mask = prompts
    changed = np.concatenate([tokens[:2], (tokens[2:] + 1) % 11])
    np.testing.assert_array_equal(run(model, (changed, mask)).tokens[:2], whole.tokens[:2])


@pytest.mark.parametrize(("cores", "rows", "parts"), [(2, 64, 2), (2, 31, 1), (2, 33, 1), (8, 64, 4), (8, 96, 6), (1, 64, 1), (4, 3, 1)])
def test_a_batch_is_divided_evenly_and_not_into_crumbs(monkeypatch, cores, rows, parts):
    monkeypatch.setattr(sampling.os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert sampling.number_of_parts(rows) == parts


def test_it_can_be_traced(model, prompts):
    out = jax.eval_shape(partial(generate, **SETTINGS), model, *prompts, KEY)
    assert (out.tokens.shape, out.tokens.dtype) == ((4, 5 + NEW), jnp.int32)


# Where responses end.


def after_the_first(stops, responses):
    """[B, N] the tokens up to the first stop and the stop itself."""
    stopped = np.isin(responses, stops)
    return np.cumsum(stopped, axis=1) - stopped == 0


@pytest.fixture(scope="module")
def unstopped(model, prompts):
    return np.asarray(run(model, prompts, temperature=2.0).tokens[:, 5:])


@pytest.mark.parametrize("stops", [(3,), (3, 7, 1), ()])
@pytest.mark.parametrize("pad", [0, 3])
def test_a_response_ends_with_its_first_stop_token(model, prompts, unstopped, stops, pad):
    """Under one key, stopping changes nothing but what follows; the pad token may be the stop token."""
    tokens, mask = prompts
    out = run(model, prompts, temperature=2.0, stop_token=stops, pad_token=pad)
    real = after_the_first(stops, unstopped)
    np.testing.assert_array_equal(out.tokens[:, 5:], np.where(real, unstopped, pad))
    np.testing.assert_array_equal(out.response_mask, np.pad(real, ((0, 0), (5, 0))))
    np.testing.assert_array_equal(out.mask, np.concatenate([mask, real], axis=1))
    np.testing.assert_array_equal(out.tokens[:, :5], tokens)
    assert real.all() == (not stops)
    assert out.tokens.dtype == jnp.int32
    assert out.mask.dtype == out.response_mask.dtype == bool


def test_one_stop_token_may_be_a_number(model, prompts, unstopped):
    out = run(model, prompts, temperature=2.0, stop_token=np.int64(3))
    np.testing.assert_array_equal(out.response_mask[:, 5:], after_the_first((3,), unstopped))


def test_rows_that_are_done_get_no_response(model, prompts, unstopped):
    tokens, mask = prompts
    done = np.array([False, True, False, True])
    empty = mask & ~done[:, None]  # a row that fills up the batch may be empty
    out = run(model, (tokens, empty), temperature=2.0, done=done, pad_token=9)
    np.testing.assert_array_equal(out.tokens[~done, 5:], unstopped[~done])
    assert (out.tokens[done, 5:] == 9).all()
    assert not out.response_mask[done].any()
    assert not out.mask[done].any()


def test_the_loop_ends_when_every_row_has_stopped(monkeypatch, model, prompts):
    steps = []
    decode = sampling.decode

    def counted(model, layers, cache, token, position, slot, visible):
        jax.debug.callback(lambda slot: steps.append(int(slot)), slot)
        return decode(model, layers, cache, token, position, slot, visible)

    monkeypatch.setattr(sampling, "decode", counted)
    longer = {"max_new_tokens": NEW + 1, "temperature": 2.0}  # not traced before, so that the counter is in it
    for stops in ((0, 1, 2, 3) * 2, (4,) * 8):
        steps.clear()
        out = run(model, prompts, stop_token=stops, **longer)
        jax.effects_barrier()
        lengths = np.asarray(out.response_mask).sum(axis=1)
        assert sorted(steps) == list(range(5, 5 + lengths.max() - 1))
        assert (lengths.max() <= NEW) == (0 in stops)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 28}, "5 tokens and 28 new ones, padding included, are more than the 32 positions"),
        ({"temperature": -0.1}, "temperature must lie in [0, inf), got -0.1"),
        ({"temperature": float("nan")}, "temperature must lie in [0, inf), got nan"),
        ({"stop_token": (1, 11)}, "The stop and pad tokens are tokens from 0 to 11, but the model knows 0 to 10"),
        ({"pad_token": -1}, "tokens from -1 to -1, but"),
        ({"done": np.zeros(3, bool)}, "done must have shape (4,), one truth value for each prompt; got (3,)"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, prompts, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(model, prompts, **change)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([[1, 2], [1, 11]], [[1, 1], [1, 1]], "The prompts hold tokens from 1 to 11"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], "Prompt 1 is empty or does not end at the last column"),
        ([[1, 2], [1, 2]], [[1, 0], [1, 1]], "Prompt 0 is empty or does not end at the last column"),
        ([[1, 2, 3], [1, 2, 3]], [[1, 1, 1], [1, 0, 1]], "Prompt 1 is empty or does not end"),
        ([1, 2], [1, 1], "must be [B, L]"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, tokens, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(model, (np.array(tokens), np.array(mask)))


def test_tokens_under_the_padding_may_be_anything(model, prompts):
    tokens, mask = prompts
    np.testing.assert_array_equal(
        run(model, (np.where(mask, tokens, 10), mask)).tokens[:, 5:], run(model, (np.where(mask, tokens, 0), mask)).tokens[:, 5:]
    )
