"""The decoder beside `transformers`' own, and what holds of log-probabilities whatever the model."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import CONFIGURATIONS, VOCABULARY, loaded, random_model, small, torch_model

from surefoot.rlhf import model as model_module
from surefoot.rlhf.model import ModelConfig, hidden_states, init_model, inverse_frequencies, logits_of, token_log_probs

LENGTH, SHORT = 12, 7
PADDING = {"left": LENGTH - SHORT, "right": 0, "both": 2}  # columns before the short sequence


@pytest.fixture(scope="module")
def sequences():
    """One sequence that fills its row, and the short one under each padding, with different tokens as padding."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (1 + len(PADDING), LENGTH))
    mask = np.ones(tokens.shape, bool)
    short = generator.integers(0, VOCABULARY, SHORT)
    for row, begin in enumerate(PADDING.values(), 1):
        mask[row] = False
        tokens[row, begin : begin + SHORT], mask[row, begin : begin + SHORT] = short, True
    return tokens, mask


@jax.jit
def logits(model, tokens, mask):
    return logits_of(model, hidden_states(model, tokens, mask))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_those_of_transformers_wherever_the_padding_is(name, sequences):
    tokens, mask = sequences
    ours = logits(loaded(name), tokens, mask)
    assert ours.dtype == jnp.float32
    for row in range(len(tokens)):
        alone = torch.tensor(tokens[row, mask[row]])[None]
        with torch.no_grad():
            theirs = torch_model(name)(alone).logits[0].numpy()
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours[row, mask[row]], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_padding_changes_nothing(name, sequences):
    tokens, mask = sequences
    _, *rows = logits(loaded(name), tokens, mask)
    left, right, both = (row[real] for row, real in zip(rows, mask[1:], strict=True))
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
    np.testing.assert_allclose(both, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama grouped, biases, llama3", "gpt2"])
def test_a_sequence_alone_is_as_in_a_batch(name, sequences):
    tokens, mask = sequences
    alone = logits(loaded(name), tokens[1:2, mask[1]], mask[1:2, mask[1]])
    np.testing.assert_allclose(alone[0], logits(loaded(name), tokens, mask)[1, mask[1]], rtol=0, atol=1e-5)


def test_tokens_under_the_padding_are_not_read(sequences):
    tokens, mask = sequences
    model = loaded("gpt2")
    other = np.where(mask, tokens, (tokens + 1) % VOCABULARY)
    np.testing.assert_array_equal(logits(model, tokens, mask)[mask], logits(model, other, mask)[mask])


@pytest.mark.parametrize(
    ("theta", "scaling"),
    [
        (10_000.0, {"rope_type": "default"}),
        (500_000.0, {"rope_type": "linear", "factor": 4.0}),
        (500_000.0, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        (500_000.0, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
def test_frequencies_of_large_models(theta, scaling):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    from surefoot.rlhf.pretrained import from_hugging_face

    original = {"original_max_position_embeddings": 8192} if scaling["rope_type"] == "llama3" else {}
    theirs = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=scaling | original | {"rope_theta": theta},
    )
    ours = inverse_frequencies(from_hugging_face(theirs.to_dict()))
    np.testing.assert_allclose(ours, LlamaRotaryEmbedding(theirs).inv_freq.numpy(), rtol=1e-6)


def test_what_a_scan_over_layers_computes_is_what_the_layers_compute_one_after_the_other(monkeypatch, sequences):
    tokens, mask = sequences
    unrolled = logits(loaded("qwen3 grouped, wide heads"), tokens, mask)
    monkeypatch.setattr(model_module, "UNROLLED_LAYERS", 1)
    scanned = jax.jit(lambda *arguments: logits_of(arguments[0], hidden_states(*arguments)))(
        loaded("qwen3 grouped, wide heads"), tokens, mask
    )
    np.testing.assert_allclose(scanned[mask], unrolled[mask], rtol=0, atol=1e-5)


def test_depth_does_not_lengthen_the_program():
    def lines(layers):
        config = small(num_layers=layers)
        shapes = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return jax.jit(token_log_probs).lower(shapes, tokens, tokens).as_text().count("\n")

    assert lines(40) == lines(20)


# Log-probabilities.


@pytest.fixture(scope="module")
def scored():
    """A model, sequences, and what `token_log_probs` gives them at temperature 0.7; the third row has a hole."""
    model = random_model(small())
    tokens = jax.random.randint(jax.random.key(2), (3, 6), 0, 11)
    mask = jnp.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    return model, tokens, mask, jax.jit(token_log_probs)(model, tokens, mask, temperature=0.7)


def test_a_log_probability_is_of_a_token_given_what_is_before_it(scored):
    model, tokens, mask, (log_prob, entropy) = scored
    p = np.asarray(jax.nn.softmax(logits(model, tokens, mask) / 0.7), np.float64)
    for row, column in np.ndindex(*tokens.shape):
        if column > 0 and mask[row, column] and mask[row, column - 1]:
            before = p[row, column - 1]
            np.testing.assert_allclose(log_prob[row, column], np.log(before[tokens[row, column]]), rtol=1e-5)
            np.testing.assert_allclose(entropy[row, column], -(before * np.log(before)).sum(), rtol=1e-5)
        else:
            assert log_prob[row, column] == entropy[row, column] == 0
    assert log_prob.dtype == entropy.dtype == jnp.float32


def test_a_token_alone_has_nothing_before_it(scored):
    model, tokens, mask, _ = scored
    for scores in token_log_probs(model, tokens[:, :1], mask[:, :1]):
        np.testing.assert_array_equal(scores, np.zeros((3, 1)))


def test_the_same_program_and_weights_give_the_same_bits(scored):
    model, tokens, mask, (log_prob, _) = scored
    copy = jax.tree.map(lambda x: jnp.array(np.array(x)), model)
    np.testing.assert_array_equal(jax.jit(token_log_probs)(copy, tokens, mask, temperature=0.7)[0], log_prob)


def test_pieces_of_the_vocabulary_side_change_no_value_and_no_gradient(monkeypatch, scored):
    model, tokens, mask, _ = scored

    def loss(model):
        log_prob, entropy = token_log_probs(model, tokens, mask)
        return jnp.sum(jnp.sin(log_prob) + entropy**2)

    whole = jax.jit(jax.value_and_grad(loss))(model)
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 4 * 11)  # pieces of 4 of 15 tokens, the last of which is filled up
    pieces = jax.jit(jax.value_and_grad(lambda model: loss(model)))(model)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_large_vocabulary_is_never_held_whole(monkeypatch):
    rows, length, size = 8, 32, 4096
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 16 * size)
    config = small(vocab_size=size)
    shapes = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    gradient = jax.jit(jax.grad(lambda model, tokens, mask: jnp.sum(token_log_probs(model, tokens, mask)[0])))
    temporary = gradient.lower(shapes, tokens, tokens).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * rows * (length - 1) * size / 2


def test_the_gradient_of_padding_is_zero_and_none_is_nan(scored):
    model, tokens, mask, _ = scored

    @jax.jit
    @jax.grad
    def gradient(x):
        states = hidden_states(dataclasses.replace(model, embedding=x), tokens, mask)
        return jnp.sum(jnp.where(mask[..., None] != 0, states, 0) ** 2)

    unused = sorted(set(range(11)) - set(np.asarray(tokens)[np.asarray(mask) != 0].tolist()))
    found = np.asarray(gradient(model.embedding))
    assert np.isfinite(found).all()
    assert unused
    assert (found[unused] == 0).all()


def test_bfloat16_weights_compute_in_bfloat16_with_float32_logits(scored):
    model, tokens, mask, (log_prob, _) = scored
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    states = jax.eval_shape(hidden_states, half, tokens, mask)
    assert states.dtype == jnp.bfloat16
    assert jax.eval_shape(logits_of, half, states).dtype == jnp.float32
    rounded, _ = jax.jit(token_log_probs)(half, tokens, mask, temperature=0.7)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, log_prob, atol=0.3)


def test_a_token_beyond_the_vocabulary_is_not_taken_for_another(scored):
    model, tokens, mask, _ = scored
    wrong = tokens.at[0, 1].set(11)
    states = jax.jit(hidden_states)(model, wrong, mask)
    assert np.isnan(states[0]).all()
    assert np.isfinite(states[1:]).all()


# Configurations and first weights.


def test_a_configuration_goes_through_json():
    config = small(eos_tokens=(1, 2), rope_scaling="llama3", rope_factor=8.0, pad_token=0)
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hiden_size": 3}, "no setting 'hiden_size', did you mean 'hidden_size'?"),
        ({"num_layers": 0}, "num_layers must lie in [1, inf), got 0"),
        ({"num_heads": 3}, "num_kv_heads must divide num_heads 3, got 2"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"activation": "mish"}, "'silu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'relu', got 'mish'"),
        ({"rope_factor": 2.0}, "rope_factor is for rope_scaling 'linear' or 'llama3' only"),
        ({"rope_low_frequency": 2.0}, "rope_low_frequency is for rope_scaling 'llama3' only"),
        ({"rope_scaling": "llama3", "rope_low_frequency": 4.0}, "rope_low_frequency must be below rope_high_frequency, got 4.0 and 4.0"),
        ({"positions": "learned", "rope_theta": 2.0}, "rope_theta is for positions 'rope' only"),
        ({"positions": "learned"}, "No checkpoint can hold a model of this ModelConfig; the nearest family"),
        ({"parallel_residual": True}, "the nearest family, llama, has parallel_residual False"),
        ({"rope_fraction": 0.5}, "the nearest family, llama, has rope_fraction 1.0"),
        ({"qk_norm": True, "norm": "layer", "mlp_bias": True}, "No checkpoint can hold"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**settings)


def test_first_weights_are_drawn_as_transformers_draws_them():
    wide = {
        "vocab_size": 300,
        "hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 32,
        "intermediate_size": 256,
        "num_layers": 8,
    }
    gpt2 = small(
        **wide,
        **{"norm": "layer", "activation": "gelu_new", "gated": False, "positions": "learned"},
        **{"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    )
    for config, residual in ((small(**wide, tied=False), 0.02), (gpt2, 0.02 / 4)):
        model = init_model(config, jax.random.key(0))
        layers = model.layers
        for weight in [model.embedding, layers.qkv.weight, layers.up.weight]:
            assert np.std(weight) == pytest.approx(0.02, rel=0.02)
        for weight in (layers.output.weight, layers.down.weight):
            assert np.std(weight) == pytest.approx(residual, rel=0.02)
        assert (layers.mlp_norm.weight == 1).all()
        for bias in (layers.qkv.bias, layers.down.bias, layers.mlp_norm.bias):
            assert bias is None or (bias == 0).all()
        assert not np.array_equal(layers.up.weight[0], layers.up.weight[1])
    assert np.std(init_model(small(**wide, tied=False), jax.random.key(0)).head) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ((2, 3), (2, 4), "one shape for both and not empty; got (2, 3) and (2, 4)"),
        ((3,), (3,), "must be [B, L]"),
        ((1, 33), (1, 33), "33 tokens, padding included, are more than the 32 positions"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tokens, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hidden_states(random_model(small()), np.zeros(tokens, int), np.ones(mask, bool))


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, surefoot, surefoot.rlhf.sampling, surefoot.rlhf.lora, surefoot.rlhf.pretrained"
    code += "; sys.exit(bool({'transformers', 'torch', 'huggingface_hub', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
