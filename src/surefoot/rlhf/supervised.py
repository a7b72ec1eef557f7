"""Learning from what people wrote or preferred: supervised fine-tuning, and reward models.

Fine-tuning maximises the log-likelihood of completions, each token counting once. A reward model maximises the likelihood of comparisons
under Bradley & Terry 1952 (Christiano et al. 2017, arXiv:1706.03741, eq. 1; Stiennon et al. 2020, arXiv:2009.01325): one backbone,
one head, read at the last token of each answer.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..config import check_bounds, configuration
from ..math.preferences import bradley_terry_loss
from ..types import PyTree
from .heads import Head, random_head, scores_at_end
from .model import LanguageModel, token_log_probs
from .optimisation import (
    Metrics,
    TextSettings,
    Trainable,
    adam,
    gradient_step,
    model_of,
    scheduled_rate,
    summed_gradient,
    trainable_of,
)


@configuration
class SupervisedSettings(TextSettings):
    """The settings of every method that passes over a file of examples."""

    epochs: float = 1.0
    """Passes over the data."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Keep `learning_rate`, or let it fall to 0 over the run."""
    warmup: float = 0.03
    """Part of the run over which the step size rises from 0 to what the schedule says."""
    max_length: int | None = None
    """Longest sequence, prompt and completion, by default what the model has room for; what to do with longer ones says `overlong`."""
    overlong: Literal["error", "drop"] = "error"
    """What happens to sequences that are longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, epochs="(0, inf)", max_length="[2, inf)")


@configuration
class SFT(SupervisedSettings):
    """Supervised fine-tuning on prompts and completions."""


@configuration
class RewardTraining(SupervisedSettings):
    """A reward model from comparisons of two answers."""

    held_out_share: float = 0.05
    """Part of the comparisons that is not trained on and says how often the model agrees with people."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, held_out_share="(0, 0.5]")


class Sequences(NamedTuple):
    """B sequences of L tokens; of a comparison the B / 2 answers that were preferred come first."""

    tokens: jax.Array  # [B, L] int32
    mask: jax.Array  # [B, L] bool, real tokens
    is_completion: jax.Array  # [B, L] bool
    counts: jax.Array  # [B] bool; false in rows that fill up the last batch


class Scorer(NamedTuple):
    """What of a reward model is trained."""

    backbone: Trainable
    head: Head


class State(NamedTuple):
    """Everything that learning changes."""

    trained: Trainable | Scorer
    moments: optax.OptState


def init(config: SupervisedSettings, model: LanguageModel, key: jax.Array) -> State:
    """The state before the first step on the weights of `model`; of a reward model with a random head."""
    weights_key, head_key = jax.random.split(key)
    trained: Any = trainable_of(config, model, weights_key)
    if isinstance(config, RewardTraining):
        trained = Scorer(trained, random_head(model.config.hidden_size, head_key))
    return State(trained, adam(config).init(trained))


def completion_loss(model: LanguageModel, rows: Sequences) -> tuple[jax.Array, jax.Array]:
    """(-log-likelihood, number) summed over the tokens of completions."""
    log_prob, _ = token_log_probs(model, rows.tokens, rows.mask)
    counted = rows.is_completion & rows.counts[:, None]
    return -jnp.sum(log_prob, where=counted), jnp.sum(counted).astype(jnp.float32)


def comparison_loss(model: LanguageModel, head: Head, pairs: PyTree) -> tuple[jax.Array, Metrics]:
    """Of pairs (preferred, other) of `Sequences`: the loss, and metrics, all summed."""
    better, worse = pairs
    both = jax.tree.map(lambda *x: jnp.concatenate(x), better, worse)
    chosen, rejected = jnp.split(scores_at_end(model, head, both.tokens, both.mask), 2)
    loss = jnp.sum(bradley_terry_loss(chosen, rejected), where=better.counts)
    agrees = jnp.sum((chosen > rejected).astype(jnp.float32), where=better.counts)
    return loss, {"loss": loss, "accuracy": agrees, "margin": jnp.sum(chosen - rejected, where=better.counts)}


def update(config: SupervisedSettings, state: State, batch: Any, base: LanguageModel | None, progress: jax.Array) -> tuple[State, Metrics]:
    """One gradient step, not taken where it would leave anything non-finite; `metrics["finite"]` says whether it was."""
    if isinstance(config, RewardTraining):
        count = jnp.maximum(jnp.sum(batch[0].counts), 1).astype(jnp.float32)

        def loss(trained: Any, rows: Any) -> tuple[jax.Array, Metrics]:
            total, metrics = comparison_loss(model_of(base, trained.backbone), trained.head, rows)
            return total / count, metrics
    else:
        count = jnp.maximum(jnp.sum(batch.is_completion & batch.counts[:, None]), 1).astype(jnp.float32)

        def loss(trained: Any, rows: Any) -> tuple[jax.Array, Metrics]:
            total, _ = completion_loss(model_of(base, trained), rows)
            return total / count, {"loss": total}

    gradient, metrics = summed_gradient(config, loss, state.trained, batch)
    rate = scheduled_rate(config, config.learning_rate, progress)
    *moved, norm = gradient_step(gradient, state.trained, state.moments, adam(config), rate)
    metrics = {name: total / count for name, total in metrics.items()}
    return State(*moved), metrics | {"gradient_norm": norm, "learning_rate": rate, "finite": jnp.isfinite(norm)}
