"""Language models that give numbers and not words: the critic's value of every token, and the reward of a whole answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..training.checkpoint import CheckpointError, read_file, restore_tree, save_file
from .model import LanguageModel, hidden_states
from .optimisation import Trainable, model_of
from .pretrained import load_model, save_model

HEAD_FILE = "reward_head.safetensors"


class Head(eqx.Module):
    """[..., D] -> [...] in float32."""

    weight: jax.Array  # [D]
    bias: jax.Array  # []

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return jnp.einsum("...d,d->...", hidden, self.weight, preferred_element_type=jnp.float32) + self.bias


def zero_head(size: int) -> Head:
    """Of a critic: every value is 0 at first."""
    return Head(jnp.zeros(size), jnp.zeros(()))


def random_head(size: int, key: jax.Array) -> Head:
    """Of a reward model: weights from N(0, 1 / (D + 1)) (Stiennon et al. 2020, arXiv:2009.01325, appendix B.1)."""
    return Head(jax.random.normal(key, (size,)) * (size + 1) ** -0.5, jnp.zeros(()))


class Critic(eqx.Module):
    """What of a critic is trained."""

    backbone: Trainable
    head: Head


def values(base: LanguageModel | None, critic: Critic, tokens: jax.Array, mask: jax.Array, num_responses: int) -> jax.Array:
    """[B, N] values of the states before each of the last N tokens [B, L]: of what is there before the token is chosen."""
    hidden = hidden_states(model_of(base, critic.backbone), tokens, mask)
    return critic.head(hidden[:, -num_responses - 1 : -1])


class RewardModel(eqx.Module):
    """Scores whole answers; the bias makes demonstrations score 0 on average."""

    backbone: LanguageModel
    head: Head

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """[B] scores, read at the last token of each row [B, L] that the mask keeps."""
        return scores_at_end(self.backbone, self.head, tokens, mask)


def scores_at_end(model: LanguageModel, head: Head, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """[B] what `head` makes of the last real token of each row, wherever the padding is."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    hidden = hidden_states(model, tokens, mask)
    return head(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def save_reward_model(model: RewardModel, directory: Path, info: dict[str, Any]) -> None:
    """Write the backbone as a Hugging Face directory, and the head beside it with what is to be known of it."""
    save_model(model.backbone, directory)
    save_file(directory / HEAD_FILE, model.head, info)


def load_reward_model(directory: Path, dtype: str = "float32") -> tuple[RewardModel, dict[str, Any]]:
    """What `save_reward_model` wrote; ValueError where it is no reward model."""
    if not (directory / HEAD_FILE).exists():
        raise ValueError(f"{directory} holds no {HEAD_FILE}, so it is no reward model; train one with `surefoot rlhf reward`.")
    backbone, _ = load_model(directory, dtype)
    arrays, info = read_file(directory / HEAD_FILE)
    template = jax.eval_shape(lambda: zero_head(backbone.config.hidden_size))
    try:
        head = restore_tree(arrays, template, source=str(directory / HEAD_FILE))
    except CheckpointError as error:
        raise ValueError(f"The head in {directory} does not fit its model: {error}") from error
    return RewardModel(backbone, head), info
