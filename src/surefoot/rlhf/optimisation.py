"""What every trainer of a language model shares: its settings, what of the model is trained, gradient steps over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from ..config import check_bounds, configuration, refuse_unread
from ..types import PyTree
from .devices import device_mesh, divided
from .lora import Adapters, adapted, places, start_adapters
from .model import LanguageModel

Metrics = dict[str, jax.Array]


@configuration
class TextSettings:
    """The settings that every trainer of a language model has."""

    learning_rate: float = 1e-5
    """Step size of Adam."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Keep `learning_rate`, or let it fall to 0 over the run."""
    warmup: float = 0.0
    """Part of the run over which the step size rises from 0 to what the schedule says."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to at most this norm."""
    minibatch_size: int = 64
    """Sequences in one gradient step."""
    micro_batch_size: int | None = None
    """Sequences whose activations are in memory at once, a divisor of `minibatch_size`: by default all. The gradient is the same."""
    lora_rank: int = 0
    """Train adapters of this rank in place of all weights; 0 trains all weights."""
    lora_alpha: float = 16.0
    """What adapters add is multiplied by lora_alpha / lora_rank."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights that are not trained: the reference, reward models, what adapters are added to. What is trained is float32."""
    gradient_checkpointing: bool = False
    """Of each layer keep its input alone for the gradient, and compute the rest again: a third more time, much less memory."""
    weight_devices: int = 1
    """Devices that share every weight; those that there are beyond that share the sequences."""

    def __post_init__(self) -> None:
        check_bounds(self, learning_rate="(0, inf)", warmup="[0, 1)", max_grad_norm="(0, inf]", minibatch_size="[1, inf)")
        check_bounds(self, micro_batch_size="[1, inf)", lora_rank="[0, inf)", lora_alpha="(0, inf)", weight_devices="[1, inf)")
        if self.micro_batch_size is not None and self.minibatch_size % self.micro_batch_size:
            raise ValueError(
                f"{type(self).__name__}.micro_batch_size={self.micro_batch_size} does not divide minibatch_size={self.minibatch_size}; "
                "choose a divisor."
            )
        refuse_unread(self)

    @property
    def unread(self) -> dict[str, str]:
        """Settings that nothing reads as the others stand, and what would read them."""
        return {} if self.lora_rank else {"lora_alpha": "lora_rank above 0"}


Trainable = LanguageModel | Adapters


def trainable_of(config: TextSettings, model: LanguageModel, key: jax.Array) -> Trainable:
    """What of `model` is trained: all of it, or adapters that begin without effect."""
    if not config.lora_rank:
        return jax.tree.map(lambda x: x.astype(jnp.float32), model)
    return start_adapters(model, key, rank=config.lora_rank, alpha=config.lora_alpha, targets=list(places(model.config)))


def model_of(base: LanguageModel | None, trained: Trainable) -> LanguageModel:
    """The model that is trained: `trained` itself, or `base` with its adapters."""
    if isinstance(trained, LanguageModel):
        return trained
    assert base is not None
    return adapted(base, trained)


def adam(config: TextSettings) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) on gradients of a norm of at most `config.max_grad_norm`, with step size 1."""
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam())


def scheduled_rate(config: TextSettings, rate: float, progress: jax.Array) -> jax.Array:
    """The step size `rate` after the fraction `progress` of the run."""
    falling = {"constant": jnp.ones_like(progress), "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress))}
    rising = jnp.minimum(progress / config.warmup, 1.0) if config.warmup else 1.0
    return rate * rising * falling[config.learning_rate_schedule]


def gradient_step(
    gradient: PyTree, parameters: PyTree, moments: optax.OptState, optimiser: optax.GradientTransformation, learning_rate: jax.Array
) -> tuple[PyTree, optax.OptState, jax.Array]:
    """(parameters, moments, norm of the gradient) after one step down a gradient, which is not taken unless its norm is finite.

    Looked at before the step and not after it, so that old and new parameters need not be in memory together.
    """
    norm = optax.tree.norm(gradient)
    fine = jnp.isfinite(norm)
    direction, moved = optimiser.update(gradient, moments)
    moments = jax.tree.map(lambda new, old: jnp.where(fine, new, old), moved, moments)
    return jax.tree.map(lambda old, step: old - jnp.where(fine, learning_rate * step, 0.0), parameters, direction), moments, norm


def in_micro_batches(config: TextSettings, batch: PyTree) -> PyTree:
    """[B, ...] -> [B / M, M, ...] with M = `config.micro_batch_size`, or all B where they are fewer.

    A micro-batch has every (B / M)-th row, so that rows that are divided among devices are so in each.
    """
    rows = len(jax.tree.leaves(batch)[0])
    size = min(config.micro_batch_size or rows, rows)
    assert rows % size == 0, (rows, size)
    parts = jax.tree.map(lambda x: x.reshape(size, rows // size, *x.shape[1:]).swapaxes(0, 1), batch)
    return divided(parts, device_mesh(config.weight_devices))


def map_rows(config: TextSettings, function: Callable[[PyTree], PyTree], batch: PyTree) -> PyTree:
    """`function` of the rows [B, ...], as many at a time as micro-batches hold."""
    parts = in_micro_batches(config, batch)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(function, parts))


def summed_gradient(
    config: TextSettings, loss: Callable[[PyTree, PyTree], tuple[jax.Array, Metrics]], parameters: PyTree, batch: PyTree
) -> tuple[PyTree, Metrics]:
    """(gradient, metrics) of a `loss(parameters, rows)` and metrics that are sums over rows, micro-batch by micro-batch.

    A loss divided by the number of tokens of the whole batch gives the same gradient however the rows are divided.
    """
    parts = in_micro_batches(config, batch)

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, jax.grad(loss, has_aux=True)(parameters, part)), None

    shapes = jax.eval_shape(jax.grad(loss, has_aux=True), parameters, jax.tree.map(lambda x: x[0], parts))
    if len(jax.tree.leaves(parts)[0]) == 1:
        result: tuple[PyTree, Metrics] = jax.grad(loss, has_aux=True)(parameters, jax.tree.map(lambda x: x[0], parts))
        return result
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)[0]
