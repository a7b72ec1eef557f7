"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / rank) B A x, where only A and B are trained.

One base model serves several roles, each with adapters of its own; the reference is the base without any.
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from ..config import nearest
from .model import LanguageModel, Linear, LowRank, ModelConfig, folded


class Adapters(eqx.Module):
    """What is trained, by the projection that it belongs to."""

    low_rank: dict[str, LowRank]  # a [num_layers, in, rank], b [num_layers, rank, out]
    scale: float = eqx.field(static=True)  # alpha / rank


def places(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """The projections that can be adapted: the linear map that computes each, and its first and last column there."""
    queries, keys, width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    attention = {"query": (0, queries), "key": (queries, queries + keys), "value": (queries + keys, queries + 2 * keys)}
    mlp = {"gate": (0, width), "up": (width, 2 * width)} if config.gated else {"up": (0, width)}
    outputs = {"output": ("output", 0, config.hidden_size), "down": ("down", 0, config.hidden_size)}
    return {
        **{name: ("qkv", *columns) for name, columns in attention.items()},
        **{name: ("up", *columns) for name, columns in mlp.items()},
        **outputs,
    }


def start_adapters(model: LanguageModel, key: jax.Array, *, rank: int, alpha: float, targets: Sequence[str]) -> Adapters:
    """Adapters that change nothing yet: A is normal with variance 1 / in, B is 0, both float32 whatever the model's dtype.

    Args:
        targets: of "query", "key", "value", "output", "gate", "up" and "down"; "gate" where the model has one.
    """
    known = places(model.config)
    for name in targets:
        if name not in known:
            raise ValueError(f"The model has no projection {name!r} to adapt{nearest(name, known)} It has {', '.join(known)}.")
    if not targets or rank < 1:
        raise ValueError(f"Adapters need a rank of at least 1 and at least one target; got rank {rank}, targets {list(targets)}.")
    low_rank = {}
    for name, name_key in zip(targets, jax.random.split(key, len(targets)), strict=True):
        linear, first, last = known[name]
        layers, inputs, _ = getattr(model.layers, linear).weight.shape
        a = inputs**-0.5 * jax.random.normal(name_key, (layers, inputs, rank))
        low_rank[name] = LowRank(a, jnp.zeros((layers, rank, last - first)))
    return Adapters(low_rank, alpha / rank)


def adapted(model: LanguageModel, adapters: Adapters | None) -> LanguageModel:
    """The model with its adapters, to be used like any other; the model itself where there are none. Gradients reach adapters alone."""
    if adapters is None:
        return model
    known = places(model.config)
    found: dict[str, list[LowRank]] = {}
    for name, factors in adapters.low_rank.items():
        linear, first, last = known[name]
        outputs = getattr(model.layers, linear).weight.shape[-1]
        # Adapters of one linear map stand side by side: one product with all of A, and one with B, which leaves other columns 0.
        b = jnp.pad(adapters.scale * factors.b, ((0, 0), (0, 0), (first, outputs - last)))
        found.setdefault(linear, []).append(LowRank(factors.a, b))
    frozen = jax.lax.stop_gradient(model)
    layers = frozen.layers
    for name, parts in found.items():
        linear = getattr(layers, name)
        joined = LowRank(jnp.concatenate([x.a for x in parts], axis=2), jnp.concatenate([x.b for x in parts], axis=1))
        layers = eqx.tree_at(lambda x, name=name: getattr(x, name), layers, Linear(linear.weight, linear.bias, joined))
    return eqx.tree_at(lambda x: x.layers, frozen, layers)


def merge(model: LanguageModel, adapters: Adapters | None) -> LanguageModel:
    """The model with its adapters added to its weights, as it is saved; in the model's own dtype."""
    return folded(adapted(model, adapters))
