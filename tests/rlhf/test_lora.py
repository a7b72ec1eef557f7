"""Adapters: what they change, what they leave alone, and that merging them changes nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import random_model, small

from surefoot.rlhf.lora import adapted, merge, start_adapters
from surefoot.rlhf.model import Linear, token_log_probs
from surefoot.rlhf.pretrained import load_model, save_model
from surefoot.rlhf.sampling import generate

EVERY = ("query", "key", "value", "output", "gate", "up", "down")
GPT2 = {"norm": "layer", "activation": "gelu_new", "gated": False, "positions": "learned", "num_kv_heads": 4}
GPT2 |= {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
TOKENS = jax.random.randint(jax.random.key(1), (3, 6), 0, 11)
MASK = jnp.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def model():
    return random_model(small(), spread=0.3)


def start(model, targets=EVERY):
    return start_adapters(model, jax.random.key(0), rank=2, alpha=6.0, targets=targets)


def trained(adapters):
    """Adapters as after training: B is no longer 0."""
    generator = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(generator.normal(0, 0.2, x.shape), x.dtype), adapters)


@jax.jit
def score(model, adapters):
    return token_log_probs(adapted(model, adapters), TOKENS, MASK)[0]


def test_without_adapters_it_is_the_model_itself(model):
    assert adapted(model, None) is model
    for one, other in zip(jax.tree.leaves(merge(model, None)), jax.tree.leaves(model), strict=True):
        assert one is other


def test_at_the_start_nothing_is_changed(model):
    np.testing.assert_array_equal(score(model, start(model)), score(model, None))
    assert (score(model, trained(start(model))) != score(model, None)).any()


def test_the_gradient_reaches_every_adapter_and_nothing_else(model):
    def loss(model, adapters):
        return jnp.sum(score(model, adapters) ** 2)

    of_model, of_adapters = jax.jit(jax.grad(loss, argnums=(0, 1)))(model, trained(start(model)))
    assert all((x == 0).all() for x in jax.tree.leaves(of_model))
    for name, factors in of_adapters.low_rank.items():
        for layer in range(2):
            assert jnp.abs(factors.a[layer]).max() > 0, name
            assert jnp.abs(factors.b[layer]).max() > 0, name


def test_what_is_merged_is_what_was_adapted(model, tmp_path):
    adapters = trained(start(model))
    merged = merge(model, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    np.testing.assert_allclose(score(merged, None), score(model, adapters), rtol=1e-4, atol=1e-4)
    saved, _ = load_model(save_model(adapted(model, adapters), tmp_path / "merged"))
    for one, other in zip(jax.tree.leaves(saved), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_update_is_scaled_by_alpha_over_rank(model):
    """W + (alpha / rank) A B, term by term."""
    adapters = trained(start(model, ("output",)))
    factors = adapters.low_rank["output"]
    expected = model.layers.output.weight + 3.0 * np.einsum("lir,lro->lio", factors.a, factors.b)
    np.testing.assert_allclose(merge(model, adapters).layers.output.weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", EVERY)
def test_a_target_is_the_projection_of_its_name(model, target):
    columns = {"query": (0, 16), "key": (16, 24), "value": (24, 32), "gate": (0, 24), "up": (24, 48)}
    linear = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "up"}.get(target, target)
    merged = merge(model, trained(start(model, (target,))))
    for name, layer in ((field, getattr(merged.layers, field)) for field in ("qkv", "output", "up", "down")):
        assert isinstance(layer, Linear)
        changed = (layer.weight != getattr(model.layers, name).weight).any(axis=(0, 1))
        expected = np.zeros(changed.shape, bool)
        if name == linear:
            expected[slice(*columns.get(target, (None,)))] = True
        np.testing.assert_array_equal(changed, expected)


def test_a_sample_with_adapters_is_a_sample_of_what_is_merged(model):
    adapters = trained(start(model))
    settings = {"max_new_tokens": 4, "temperature": 1.0, "stop_token": (), "pad_token": 0}
    ones = np.ones((3, 6), bool)
    with_adapters, with_merged = (
        generate(given, TOKENS, ones, jax.random.key(2), **settings).tokens for given in (adapted(model, adapters), merge(model, adapters))
    )
    np.testing.assert_array_equal(with_adapters, with_merged)


def test_adapters_of_a_bfloat16_model_are_trained_in_float32(model):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    adapters = start(half)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(merge(half, adapters))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(score, half, adapters).dtype == jnp.float32


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (("querry",), 2, "no projection 'querry' to adapt, did you mean 'query'?"),
        ((), 2, "at least one target; got rank 2, targets []"),
        (("query",), 0, "a rank of at least 1 and at least one target; got rank 0"),
    ],
)
def test_adapters_that_cannot_be_are_refused(model, targets, rank, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        start_adapters(model, jax.random.key(0), rank=rank, alpha=1.0, targets=targets)


def test_a_model_without_a_gate_has_none_to_adapt():
    model = random_model(small(**GPT2))
    with pytest.raises(ValueError, match="no projection 'gate'"):
        start(model)
    assert set(start(model, ("up", "query")).low_rank) == {"up", "query"}
