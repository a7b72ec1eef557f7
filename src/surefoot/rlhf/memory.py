"""How much memory a run on text needs, before any of it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..replay import free_memory
from ..types import PyTree
from . import ppo, supervised
from .model import LOGITS_AT_ONCE, ModelConfig, init_model
from .optimisation import TextSettings
from .supervised import SupervisedSettings


class Plan(NamedTuple):
    """Bytes on each device. Sampling and learning take turns; the rest stays."""

    trained: int  # parameters of actor and critic, or of what else is trained
    moments: int  # Adam's
    frozen: int  # reference, reward models, what adapters are added to
    sampling: int  # keys, values and a layer of all answers, and the actor's weights with what adapters add
    learning: int  # gradients, and the activations of a micro-batch

    @property
    def total(self) -> int:
        return self.trained + self.moments + self.frozen + max(self.sampling, self.learning)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(number)}" for name, number in self._asdict().items() if number)
        return f"{size(self.total)} at most ({parts})"


def plan(config: TextSettings, model: ModelConfig, rewards: Sequence[ModelConfig] = (), *, longest: int) -> Plan:
    """What a run with these settings needs for sequences of up to `longest` tokens; of `rewards` the first may be the critic's start.

    Parameters and moments are exact. Activations are an estimate from the shapes of a layer.
    """
    key = jax.random.key(0)
    weights, *judges = (_weights(each, config.dtype) for each in (model, *rewards))
    if isinstance(config, SupervisedSettings):
        learner: Any = jax.eval_shape(partial(supervised.init, config), weights, key)
        trained, moments, largest = learner.trained, learner.moments, _bytes(learner.trained)
        frozen = _bytes(weights) if config.lora_rank else 0
        rows, sampling = config.minibatch_size * (2 if isinstance(config, supervised.RewardTraining) else 1), 0
    else:
        assert isinstance(config, ppo.OnlineSettings)
        critic = judges[0] if judges and getattr(config, "critic_from", "") == "reward" else weights
        learner = jax.eval_shape(partial(ppo.init, config), weights, critic, key)
        trained, moments = (learner.actor, learner.critic), (learner.moments, learner.critic_moments)
        largest = max(_bytes(part) for part in trained)
        frozen = _bytes((weights, judges))
        width = jnp.dtype(config.dtype).itemsize if config.lora_rank else 4
        cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * width
        sampling = config.answers * longest * (cache + one_layer(config, model, longest)) + (_bytes(weights) if config.lora_rank else 0)
        rows = config.minibatch_size
    in_micro_batches = config.micro_batch_size is not None and config.micro_batch_size < config.minibatch_size
    rows = min(config.micro_batch_size or rows, rows)
    learning = largest * (2 if in_micro_batches else 1) + activations(config, model, rows, longest)
    across = jax.device_count()
    shared = config.weight_devices
    return Plan(_bytes(trained) // shared, _bytes(moments) // shared, frozen // shared, sampling // across, learning // across)


def activations(config: TextSettings, model: ModelConfig, rows: int, longest: int) -> int:
    """Bytes that the gradient of `rows` sequences of `longest` tokens keeps: of every layer, or of one and the inputs of the others."""
    width = jnp.dtype(config.dtype).itemsize if config.lora_rank else 4
    layer = one_layer(config, model, longest)
    kept = model.num_layers * model.hidden_size * width + layer if config.gradient_checkpointing else model.num_layers * layer
    logits = 3 * 4 * min(rows * longest * model.vocab_size, LOGITS_AT_ONCE)
    return rows * longest * kept + logits


def one_layer(config: TextSettings, model: ModelConfig, longest: int) -> int:
    """Bytes of what a layer computes for a token that sees `longest` of them."""
    width = jnp.dtype(config.dtype).itemsize if config.lora_rank else 4
    heads = (2 * model.num_heads + 3 * model.num_kv_heads) * model.head_dim  # before the rotation and after it; values
    inner = (4 if model.gated else 2) * model.intermediate_size
    return (3 * model.hidden_size + heads + inner) * width + 2 * model.hidden_size * 4 + 2 * model.num_heads * longest * 4


def check_memory(needed: Plan) -> str:
    """A sentence on the plan; ValueError where it does not fit into the memory that is free."""
    free = free_bytes()
    if free is not None and needed.total > free:
        raise ValueError(
            f"The run needs {needed}, and {size(free)} are free. Less is needed with a smaller micro_batch_size, gradient_checkpointing, "
            "dtype='bfloat16', adapters (lora_rank), weight_devices on several devices, or fewer answers at a time."
        )
    return f"memory: {needed}{'' if free is None else f', of {size(free)} that are free'}"


def free_bytes() -> int | None:
    """Of the first device, or of the machine where that is its CPU; None where nobody says."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else free_memory()


def size(number: int) -> str:
    """In GB, or in MB where they are few."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _weights(config: ModelConfig, dtype: str) -> PyTree:
    shapes = jax.eval_shape(partial(init_model, config), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
