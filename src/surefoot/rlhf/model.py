"""A decoder-only transformer whose switches cover Llama, Qwen2, Qwen3, GPT-2 and GPT-NeoX.

One block computes them all (Vaswani et al. 2017, with RMSNorm of Zhang & Sennrich 2019, rotary positions of Su et al. 2021, grouped
queries of Ainslie et al. 2023, gated units of Shazeer 2020). What a token sees, and its position, come from the mask and never from
token ids, so that padding on either side changes nothing. Left out: dropout, sliding windows, mixtures of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..config import check_bounds, configuration, refuse_unread
from ..types import Array, PyTree

Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
LOGITS_AT_ONCE = 2**24  # of token_log_probs: 64 MB
UNROLLED_LAYERS = 8

# What each family of checkpoints fixes; whatever is not here it leaves open. The first that fits is a configuration's family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"norm": "rms", "gated": True, "positions": "rope", "rope_fraction": 1.0, "qk_norm": False}
    | {"parallel_residual": False, "attention_biases_agree": True},
    "qwen3": {"norm": "rms", "gated": True, "positions": "rope", "rope_fraction": 1.0, "qk_norm": True}
    | {"parallel_residual": False, "attention_biases_agree": True, "mlp_bias": False},
    "qwen2": {"norm": "rms", "gated": True, "positions": "rope", "rope_fraction": 1.0, "qk_norm": False}
    | {"parallel_residual": False, "qkv_bias": True, "output_bias": False, "mlp_bias": False},
    "gpt2": {"norm": "layer", "gated": False, "positions": "learned", "qk_norm": False, "heads_divide_hidden": True}
    | {"parallel_residual": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "gpt_neox": {"norm": "layer", "gated": False, "positions": "rope", "qk_norm": False, "heads_divide_hidden": True}
    | {"attention_biases_agree": True, "mlp_bias": True},
}


@configuration
class ModelConfig:
    """Shape and switches of a language model; the defaults are Llama's. JSON by `dataclasses.asdict`, and back by `ModelConfig(**json)`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    """Of the queries."""
    num_kv_heads: int
    """Of keys and values; each serves num_heads / num_kv_heads heads of queries."""
    head_dim: int
    intermediate_size: int
    """Of the MLP; a gated one has this width twice."""
    max_positions: int
    """The longest sequence, padding included."""
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    activation: Activation = "silu"
    gated: bool = True
    """The MLP's activation multiplies a second projection (SwiGLU and its like)."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the projection that follows attention."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys pass an RMSNorm of their own, for each head, before they are rotated."""
    parallel_residual: bool = False
    """Attention and MLP both read the block's input, and are added to it together."""
    tied: bool = False
    """The embedding is also the output head."""
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    """Share of each head that is rotated, its first part."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    """By which `linear` divides all frequencies, and `llama3` the low ones."""
    rope_low_frequency: float = 1.0
    """llama3: waves that fit into rope_original_positions less often than this are slowed down in full ..."""
    rope_high_frequency: float = 4.0
    """... more often than this, not at all; in between, by degrees."""
    rope_original_positions: int = 8192
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size max_positions rope_original_positions"
        check_bounds(self, **dict.fromkeys(sizes.split(), "[1, inf)"))
        check_bounds(self, norm_epsilon="[0, inf)", initializer_range="[0, inf)", rope_theta="(0, inf)", rope_fraction="(0, 1]")
        check_bounds(self, rope_factor="[1, inf)", rope_low_frequency="(0, inf)", rope_high_frequency="(0, inf)")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"ModelConfig.num_kv_heads must divide num_heads {self.num_heads}, got {self.num_kv_heads}.")
        if self.positions == "rope" and self.head_dim % 2 and self.rotary_size > self.head_dim:
            raise ValueError(f"ModelConfig.head_dim must be even where all of it is rotated, got {self.head_dim}.")
        if self.rope_scaling == "llama3" and self.rope_high_frequency <= self.rope_low_frequency:
            ends = f"{self.rope_low_frequency} and {self.rope_high_frequency}"
            raise ValueError(f"ModelConfig.rope_low_frequency must be below rope_high_frequency, got {ends}.")
        refuse_unread(self)
        self.family  # noqa: B018 - raises where there is none

    @property
    def unread(self) -> dict[str, str]:
        scaled = {"rope_factor": "rope_scaling 'linear' or 'llama3'"} if self.rope_scaling == "none" else {}
        names = "rope_low_frequency", "rope_high_frequency", "rope_original_positions"
        llama3 = dict.fromkeys(names, "rope_scaling 'llama3'") if self.rope_scaling != "llama3" else {}
        rotary = dict.fromkeys(("rope_theta", "rope_fraction", "rope_scaling"), "positions 'rope'") if self.positions != "rope" else {}
        return scaled | llama3 | rotary

    @property
    def attention_biases_agree(self) -> bool:
        return self.qkv_bias == self.output_bias

    @property
    def heads_divide_hidden(self) -> bool:
        return self.num_heads * self.head_dim == self.hidden_size and self.num_kv_heads == self.num_heads

    @property
    def rotary_size(self) -> int:
        """Numbers of each head that are rotated, in pairs."""
        return 2 * math.ceil(int(self.head_dim * self.rope_fraction) / 2)

    @property
    def family(self) -> str:
        """The kind of checkpoint that holds such a model, by the name that `transformers` has for it."""
        differences = {}
        for name, fixed in FAMILIES.items():
            differences[name] = {field: value for field, value in fixed.items() if getattr(self, field) != value}
            if not differences[name]:
                return name
        name = min(differences, key=lambda name: len(differences[name]))
        wanted = ", ".join(f"{field} {value!r}" for field, value in differences[name].items())
        raise ValueError(f"No checkpoint can hold a model of this ModelConfig; the nearest family, {name}, has {wanted}.")


class LowRank(eqx.Module):
    """What an adapter adds to a linear map: x @ a @ b."""

    a: jax.Array  # [in, rank]
    b: jax.Array  # [rank, out]


class Linear(eqx.Module):
    """x @ weight + bias; stacked layers have one axis more in front."""

    weight: jax.Array  # [in, out]
    bias: jax.Array | None  # [out]
    adapter: LowRank | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weight
        if self.bias is not None:
            y = y + self.bias
        if self.adapter is not None:
            y = y + ((x @ self.adapter.a) @ self.adapter.b).astype(y.dtype)
        return y


class Norm(eqx.Module):
    """RMSNorm where there is no bias, LayerNorm where there is one; in float32, whatever the dtype of x."""

    weight: jax.Array
    bias: jax.Array | None
    epsilon: float = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y.astype(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias


class Layer(eqx.Module):
    """The weights of one block, or with an axis in front those of all."""

    attention_norm: Norm
    qkv: Linear  # queries, keys and values side by side
    query_norm: Norm | None
    key_norm: Norm | None
    output: Linear
    mlp_norm: Norm
    up: Linear  # gated: the gate, then what it gates
    down: Linear


class LanguageModel(eqx.Module):
    """All parameters of a decoder; `hidden_states` and `logits_of` compute with them."""

    embedding: jax.Array  # [V, D]
    position_embedding: jax.Array | None  # [max_positions, D]
    layers: Layer  # [num_layers, ...] each
    final_norm: Norm
    head: jax.Array | None  # [V, D]; None where the embedding serves
    config: ModelConfig = eqx.field(static=True)
    gradient_checkpointing: bool = eqx.field(static=True, default=False)  # keep inputs of layers alone for a gradient


@partial(jax.jit, static_argnames="config")
def init_model(config: ModelConfig, key: jax.Array) -> LanguageModel:
    """Weights as `transformers` draws them: normal with deviation `initializer_range`, biases 0, norms 1.

    GPT-2 divides the deviation of what is added to the residual stream by sqrt(2 num_layers) (Radford et al. 2019, section 2.3).
    """
    c, deviation = config, config.initializer_range
    residual = deviation / math.sqrt(2 * c.num_layers) if c.family == "gpt2" else deviation
    keys = iter(jax.random.split(key, 7))

    def normal(*shape: int, deviation: float = deviation) -> jax.Array:
        return deviation * jax.random.normal(next(keys), shape)

    def linear(inputs: int, outputs: int, bias: bool, deviation: float = deviation) -> Linear:
        weight = normal(c.num_layers, inputs, outputs, deviation=deviation)
        return Linear(weight, jnp.zeros((c.num_layers, outputs)) if bias else None)

    def norm(*shape: int, bias: bool = c.norm == "layer") -> Norm:
        return Norm(jnp.ones(shape), jnp.zeros(shape) if bias else None, c.norm_epsilon)

    queries, keys_and_values = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    return LanguageModel(
        embedding=normal(c.vocab_size, c.hidden_size),
        position_embedding=normal(c.max_positions, c.hidden_size) if c.positions == "learned" else None,
        layers=Layer(
            attention_norm=norm(c.num_layers, c.hidden_size),
            qkv=linear(c.hidden_size, queries + keys_and_values, c.qkv_bias),
            query_norm=norm(c.num_layers, c.head_dim, bias=False) if c.qk_norm else None,
            key_norm=norm(c.num_layers, c.head_dim, bias=False) if c.qk_norm else None,
            output=linear(queries, c.hidden_size, c.output_bias, residual),
            mlp_norm=norm(c.num_layers, c.hidden_size),
            up=linear(c.hidden_size, c.intermediate_size * (2 if c.gated else 1), c.mlp_bias),
            down=linear(c.intermediate_size, c.hidden_size, c.mlp_bias, residual),
        ),
        final_norm=norm(c.hidden_size),
        head=None if c.tied else normal(c.vocab_size, c.hidden_size),
        config=c,
    )


def hidden_states(model: LanguageModel, tokens: Array, mask: Array) -> jax.Array:
    """[B, L, D] what the model makes of each token and those before it, after the last norm; arbitrary where `mask` [B, L] is false."""
    check_tokens(model.config, tokens, mask)
    positions = positions_of(mask)
    visible, rotation = causal(mask), rotation_of(model.config, positions)

    def block(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        return apply_block(model.config, layer, x, rotation, lambda q, k, v: (attention(q, k, v, visible), None))

    step, unroll = block, unrolled(model.config)
    if model.gradient_checkpointing:  # not written out, since XLA would find that layers are computed twice and keep them
        step, unroll = jax.checkpoint(block), 1
    x, _ = jax.lax.scan(step, embed(model, tokens, positions), model.layers, unroll=unroll)
    return model.final_norm(x)


def logits_of(model: LanguageModel, hidden: jax.Array) -> jax.Array:
    """[..., V] float32, of the token after each."""
    head = model.embedding if model.head is None else model.head
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def token_log_probs(
    model: LanguageModel, tokens: jax.Array, mask: jax.Array, *, temperature: float | jax.Array = 1.0, last: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """[B, L] each, float32: the log-probability of tokens[b, t] given what is before it, and the entropy of what it was drawn from.

    Both are 0 where `mask` is false, and at a row's first real token, with nothing before it. With `last`, [B, last]: of the last tokens
    alone. Logits are held for a part of the tokens at a time, in the gradient too, where they are computed again: [B, L, V] would be
    the largest array of a training step.
    """
    hidden = hidden_states(model, tokens, mask)

    @jax.checkpoint
    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, chosen = part
        log_probs = jax.nn.log_softmax(logits_of(model, states) / temperature)
        log_prob = jnp.take_along_axis(log_probs, chosen[:, None], axis=-1)[:, 0]
        return log_prob, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    rows, length, width = hidden.shape
    scored = length - 1 if last is None else min(last, length - 1)
    count = rows * scored
    size = max(1, min(count, LOGITS_AT_ONCE // model.config.vocab_size))
    filling = -count % size
    states = jnp.pad(hidden[:, length - 1 - scored : length - 1].reshape(count, width), ((0, filling), (0, 0)))
    chosen = jnp.pad(tokens[:, length - scored :].reshape(count), (0, filling))
    log_prob, entropy = jax.lax.map(score, (states.reshape(-1, size, width), chosen.reshape(-1, size)))
    real = mask != 0
    follows = real[:, length - scored :] & real[:, length - 1 - scored : length - 1]

    def placed(x: jax.Array) -> jax.Array:
        following = jnp.where(follows, x.reshape(-1)[:count].reshape(rows, scored), 0)
        return jnp.pad(following, ((0, 0), ((length if last is None else last) - scored, 0)))

    return placed(log_prob), placed(entropy)


def folded(model: LanguageModel) -> LanguageModel:
    """The same model without adapters: what they add is in the weights."""

    def fold(x: PyTree) -> PyTree:
        if not isinstance(x, Linear) or x.adapter is None:
            return x
        return Linear((x.weight + x.adapter.a @ x.adapter.b).astype(x.weight.dtype), x.bias)

    return jax.tree.map(fold, model, is_leaf=lambda x: isinstance(x, Linear))


# What sampling shares with the functions above.


def check_tokens(config: ModelConfig, tokens: Array, mask: Array, *, new: int = 0) -> None:
    """Raise ValueError unless both are [B, L], and the model's positions reach for L tokens and `new` ones more."""
    if jnp.ndim(tokens) != 2 or jnp.shape(tokens) != jnp.shape(mask) or 0 in jnp.shape(tokens):
        raise ValueError(
            f"tokens and mask must be [B, L], one shape for both and not empty; got {jnp.shape(tokens)} and {jnp.shape(mask)}."
        )
    length = jnp.shape(tokens)[1]
    if length + new > config.max_positions:
        asked = f"{length} tokens and {new} new ones" if new else f"{length} tokens"
        raise ValueError(
            f"{asked}, padding included, are more than the {config.max_positions} positions of the model; shorten prompts or responses."
        )


def causal(mask: jax.Array) -> jax.Array:
    """[B, L, L] what each token sees: real tokens of `mask` [B, L], up to itself."""
    return jnp.tril(jnp.ones((mask.shape[1],) * 2, bool)) & (mask != 0)[:, None, :]


def positions_of(mask: jax.Array) -> jax.Array:
    """[B, L] how many real tokens are before each."""
    return jnp.maximum(jnp.cumsum(mask != 0, axis=1) - 1, 0)


def embed(model: LanguageModel, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """[..., D]. A token beyond the vocabulary gives NaN, which no guard overlooks, where a clamped one would be learned from."""
    x = jnp.take(model.embedding, tokens, axis=0)
    return x if model.position_embedding is None else x + jnp.take(model.position_embedding, positions, axis=0)


def inverse_frequencies(config: ModelConfig) -> np.ndarray[Any, Any]:
    """[rotary_size / 2] radians per position, in float32 as checkpoints were trained with.

    llama3: a wave that fits into the original context fewer than `rope_low_frequency` times is `rope_factor` times as long, one that
    fits more than `rope_high_frequency` times stays, and in between it is interpolated.
    """
    size = int(config.head_dim * config.rope_fraction)
    inverse = 1 / np.float32(config.rope_theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    if config.rope_scaling == "linear":
        return inverse / np.float32(config.rope_factor)
    if config.rope_scaling == "llama3":
        fits = config.rope_original_positions * inverse / np.float32(2 * math.pi)
        kept = np.clip((fits - config.rope_low_frequency) / (config.rope_high_frequency - config.rope_low_frequency), 0, 1)
        return ((1 - kept) * inverse / config.rope_factor + kept * inverse).astype(np.float32)
    return inverse


Rotation = tuple[jax.Array, jax.Array] | None  # [..., 1, 2, rotary_size / 2]: cosines, and sines with the signs of both halves


def rotation_of(config: ModelConfig, positions: jax.Array) -> Rotation:
    if config.positions == "learned":
        return None
    angles = (positions[..., None].astype(jnp.float32) * inverse_frequencies(config))[..., None, None, :]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    pair = jnp.concatenate([cosine, cosine], axis=-2), jnp.concatenate([-sine, sine], axis=-2)
    return jax.lax.optimization_barrier(pair)  # else XLA computes them again for every layer and head


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """x [..., H, head_dim] with the i-th number of the rotated part and the i-th of its second half turned as a pair."""
    if rotation is None:
        return x
    cosine, sine = rotation
    size = 2 * cosine.shape[-1]
    pairs = x[..., :size].astype(jnp.float32).reshape(*x.shape[:-1], 2, size // 2)
    turned = (pairs * cosine + pairs[..., ::-1, :] * sine).reshape(*x.shape[:-1], size).astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)


def attention(queries: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """[B, L, H, head_dim] of queries [B, L, H, head_dim] to keys and values [B, M, K, head_dim], where `visible` [B, L, M].

    The softmax is in float32. A row that sees nothing, as padding does, averages over everything, which is finite and not used.
    """
    return jax.nn.dot_product_attention(queries, keys, values, mask=visible[:, None])


def project(config: ModelConfig, layer: Layer, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values [..., heads, head_dim] of x [..., D]."""
    projected = layer.qkv(layer.attention_norm(x)).reshape(*x.shape[:-1], -1, config.head_dim)
    queries, keys, values = jnp.split(projected, (config.num_heads, config.num_heads + config.num_kv_heads), axis=-2)
    if layer.query_norm is not None and layer.key_norm is not None:
        queries, keys = layer.query_norm(queries), layer.key_norm(keys)
    return rotate(queries, rotation), rotate(keys, rotation), values


def apply_block(
    config: ModelConfig,
    layer: Layer,
    x: jax.Array,
    rotation: Rotation,
    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, PyTree]],
) -> tuple[jax.Array, PyTree]:
    """x [..., D] after one block, and what `attend` of queries, keys and values [..., heads, head_dim] gives besides their attention."""
    attended, extra = attend(*project(config, layer, x, rotation))
    attended = layer.output(attended.reshape(*x.shape[:-1], -1))

    def mlp(x: jax.Array) -> jax.Array:
        inner = layer.up(layer.mlp_norm(x))
        activation = ACTIVATIONS[config.activation]
        if config.gated:
            gate, inner = jnp.split(inner, 2, axis=-1)
            return layer.down(activation(gate) * inner)
        return layer.down(activation(inner))

    if config.parallel_residual:
        return x + attended + mlp(x), extra
    x = x + attended
    return x + mlp(x), extra


def unrolled(config: ModelConfig) -> int:
    """How many layers of a scan are written out: few are faster so, and many would take long to compile."""
    return config.num_layers if config.num_layers <= UNROLLED_LAYERS else 1
