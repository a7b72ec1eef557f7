"""Policy optimisation on tokens: PPO with a critic, RLOO and GRPO with the other answers to a prompt in its place.

The four models of Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al. 2022 (arXiv:2203.02155, eq. 2): the actor, the frozen
reference it must not leave far behind, a critic, and a frozen reward. Tokens are rows: an answer is an episode, its score comes with its
last token, and a divergence from the reference costs at every token. RLOO is Ahmadian et al. 2024 (arXiv:2402.14740, eq. 8), GRPO Shao
et al. 2024 (arXiv:2402.03300, eq. 3); both share PPO's clipped surrogate (Schulman et al. 2017, eq. 7) and count every token once, where
GRPO's paper averages over each answer first. An answer that the length limit cuts has no future: it ends there, at a price.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..config import check_bounds, configuration
from ..math.divergences import kl_k1, kl_k2, kl_k3, proportional_kl_coefficient
from ..math.policy_gradient import clipped_surrogate_loss, importance_ratio
from ..math.preferences import group_relative_advantage, kl_penalised_reward, leave_one_out_advantage
from ..math.reduce import effective_sample_size, explained_variance, masked_mean, mean_standard_error, standardise
from ..math.returns import gae
from ..math.values import clipped_value_loss
from ..minibatches import descend
from ..types import PyTree
from .heads import Critic, values, zero_head
from .model import LanguageModel, token_log_probs
from .optimisation import (
    Metrics,
    TextSettings,
    Trainable,
    adam,
    gradient_step,
    map_rows,
    model_of,
    scheduled_rate,
    summed_gradient,
    trainable_of,
)


@configuration
class OnlineSettings(TextSettings):
    """The settings of every method that learns from answers of its own."""

    num_prompts: int = 64
    """Prompts in one iteration."""
    group_size: int = 1
    """Answers to each prompt."""
    max_new_tokens: int = 128
    """Longest answer; one that is cut there pays `missing_end_penalty`."""
    temperature: float = 1.0
    """Of sampling, and of every probability that is learned from."""
    epochs: int = 1
    """Passes over the answers of an iteration."""
    clip: float = 0.2
    """How far the probability ratio may leave 1 before the objective turns flat."""
    kl_coef: float = 0.05
    """Price of the KL divergence from the reference, at the start where `kl_target` is given."""
    kl_as: Literal["reward", "loss"] = "reward"
    """Where it is paid: in the rewards of tokens (k1), or in the loss (k2)."""
    kl_target: float | None = None
    """KL divergence from the reference, in nats per answer, that the price adapts to; by default the price is fixed."""
    kl_horizon: int = 10_000
    """Answers over which the price adapts."""
    max_kl: float = 200.0
    """Nats per answer at which a run stops, with its answers saved for you to see."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    missing_end_penalty: float = 1.0
    """Taken from the score of an answer without its end token."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens, by default what the model has room for; `overlong` says what happens to longer ones."""
    overlong: Literal["error", "drop"] = "error"
    """What happens to prompts that are longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(
            self, num_prompts="[1, inf)", group_size="[1, inf)", max_new_tokens="[1, inf)", temperature="(0, inf)", epochs="[1, inf)"
        )
        check_bounds(self, clip="(0, inf)", kl_coef="[0, inf)", kl_target="(0, inf)", kl_horizon="[1, inf)", max_kl="(0, inf]")
        check_bounds(self, entropy_coef="[0, inf)", missing_end_penalty="[0, inf)", max_prompt_length="[1, inf)")
        if self.answers % self.minibatch_size:
            raise ValueError(
                f"{type(self).__name__}.minibatch_size={self.minibatch_size} does not divide the {self.answers} answers of an iteration "
                f"(num_prompts={self.num_prompts} x group_size={self.group_size}); choose a divisor."
            )

    @property
    def answers(self) -> int:
        """Of one iteration."""
        return self.num_prompts * self.group_size

    @property
    def unread(self) -> dict[str, str]:
        return super().unread | ({} if self.kl_target else {"kl_horizon": "kl_target"})


@configuration
class PPO(OnlineSettings):
    """Proximal policy optimisation of a language model: actor, reference, critic and reward."""

    epochs: int = 4
    """Passes over the answers of an iteration."""
    gamma: float = 1.0
    """Discount factor from token to token."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimator."""
    critic_learning_rate: float = 1e-5
    """Step size of the critic's Adam."""
    clip_value: float | None = 0.2
    """How far the critic may move from its old values in one iteration; None is unlimited."""
    critic_from: Literal["reward", "actor"] = "reward"
    """Whose weights the critic begins with: the first reward model's, if there is one, or the actor's."""
    whiten: bool = True
    """Give the advantages of each iteration mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gamma="[0, 1]", gae_lambda="[0, 1]", critic_learning_rate="(0, inf)", clip_value="(0, inf)")


@configuration
class GroupSettings(OnlineSettings):
    """The settings of every method whose baseline is the other answers to a prompt."""

    num_prompts: int = 16
    """Prompts in one iteration."""
    group_size: int = 4
    """Answers to each prompt, at least 2."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"{type(self).__name__}.group_size must be at least 2: a group of 1 has no baseline; take ppo for it.")
        super().__post_init__()


@configuration
class RLOO(GroupSettings):
    """REINFORCE with the mean of the other answers as a baseline."""


@configuration
class GRPO(GroupSettings):
    """Group-relative policy optimisation: advantages in units of the spread of a prompt's answers."""

    kl_as: Literal["reward", "loss"] = "loss"
    """Where it is paid: in the rewards of tokens (k1), or in the loss (k2)."""


class State(NamedTuple):
    """Everything that learning changes."""

    actor: Trainable
    critic: Critic | None
    moments: optax.OptState
    critic_moments: optax.OptState | None
    kl_coef: jax.Array  # []


class Frozen(NamedTuple):
    """What is never trained."""

    reference: LanguageModel  # with adapters, also what the actor's are added to
    critic_base: LanguageModel | None  # what the critic's adapters are added to


class Answers(NamedTuple):
    """Prompts, padded on their left, with B answers of at most N tokens, those to one prompt side by side."""

    tokens: jax.Array  # [B, L] int32
    mask: jax.Array  # [B, L] bool, real tokens
    response_mask: jax.Array  # [B, N] bool, real tokens of the answer: the last N columns of a row
    score: jax.Array  # [B], with the penalty for a missing end
    counts: jax.Array  # [B] bool; false where nothing is learned from an answer, such as one that could not be scored
    log_prob: jax.Array  # [B, N] by the policy that answered
    ref_log_prob: jax.Array  # [B, N] by the reference
    value: jax.Array | None = None  # [B, N] by the critic


class Judged(NamedTuple):
    """What a gradient step needs of each answer, [B, ...]."""

    answers: Answers
    valid: jax.Array  # [B, N] bool, tokens that are learned from
    advantage: jax.Array  # [B, N]
    value_target: jax.Array | None  # [B, N]


def init(config: OnlineSettings, actor: LanguageModel, critic: LanguageModel, key: jax.Array) -> State:
    """The state before the first iteration: the weights of `actor`, and for PPO a critic on those of `critic` whose every value is 0."""
    actor_key, critic_key = jax.random.split(key)
    trained = trainable_of(config, actor, actor_key)
    judge = None
    if isinstance(config, PPO):
        judge = Critic(trainable_of(config, critic, critic_key), zero_head(critic.config.hidden_size))
    moments = adam(config).init(trained), None if judge is None else adam(config).init(judge)
    return State(trained, judge, *moments, jnp.asarray(config.kl_coef, jnp.float32))


def log_probs(config: OnlineSettings, model: LanguageModel, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, entropies) of the last `max_new_tokens` tokens [B, N], at the temperature of sampling."""
    return token_log_probs(model, tokens, mask, temperature=config.temperature, last=config.max_new_tokens)


def advantages(config: OnlineSettings, kl_coef: jax.Array, answers: Answers) -> tuple[jax.Array, jax.Array | None]:
    """(advantages [B, N], value targets [B, N] where there is a critic) in units of the score."""
    mask = answers.response_mask
    kl = jnp.where(mask, kl_k1(answers.log_prob, answers.ref_log_prob), 0.0)
    penalty = kl_coef if config.kl_as == "reward" else 0.0
    if answers.value is None:
        worth = (answers.score - penalty * jnp.sum(kl, axis=1)).reshape(-1, config.group_size)
        relative = group_relative_advantage if isinstance(config, GRPO) else leave_one_out_advantage
        advantage = relative(worth, answers.counts.reshape(worth.shape)).reshape(-1, 1)
        return jnp.broadcast_to(advantage, mask.shape), None
    assert isinstance(config, PPO)
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    score = jnp.broadcast_to(answers.score[:, None], mask.shape)
    reward = kl_penalised_reward(score, kl, last, penalty_coef=penalty)
    following = jnp.pad(answers.value[:, 1:], ((0, 0), (0, 1)))
    rows = reward.T, answers.value.T, following.T, last.T, jnp.zeros_like(last).T  # time-major
    advantage = gae(*rows, discount=config.gamma, gae_lambda=config.gae_lambda).T
    return advantage, advantage + answers.value


def policy_loss(config: OnlineSettings, kl_coef: jax.Array, log_prob: jax.Array, entropy: jax.Array, batch: Judged) -> tuple[Any, Metrics]:
    """The loss of the actor and what to report of it, both summed over the tokens that count."""
    answers, valid = batch.answers, batch.valid
    ratio = importance_ratio(log_prob, answers.log_prob)
    loss = clipped_surrogate_loss(ratio, batch.advantage, clip=config.clip) - config.entropy_coef * entropy
    if config.kl_as == "loss":
        loss = loss + kl_coef * kl_k2(log_prob, answers.ref_log_prob)
    clipped = (jnp.abs(ratio - 1.0) > config.clip).astype(ratio.dtype)
    return jnp.sum(loss, where=valid), {"policy_loss": jnp.sum(loss, where=valid), "clip_fraction": jnp.sum(clipped, where=valid)}


def update(
    config: OnlineSettings, state: State, answers: Answers, frozen: Frozen, key: jax.Array, progress: jax.Array
) -> tuple[State, Metrics]:
    """One iteration: advantages, epochs of minibatches of answers, the price of divergence, and the audit of the step."""
    valid = answers.response_mask & answers.counts[:, None]
    advantage, value_target = advantages(config, state.kl_coef, answers)
    whiten = isinstance(config, PPO) and config.whiten
    judged = Judged(answers, valid, standardise(advantage, valid) if whiten else advantage, value_target)

    def step(carry: PyTree, batch: Judged) -> tuple[PyTree, Metrics]:
        (actor, moments), judge = carry
        batch = jax.tree.map(lambda x: x[0], batch)  # [1, B, ...]: an answer is a sequence of one row
        count = jnp.maximum(jnp.sum(batch.valid), 1)

        def actor_loss(actor: Trainable, rows: Judged) -> tuple[jax.Array, Metrics]:
            log_prob, entropy = log_probs(config, model_of(frozen.reference, actor), rows.answers.tokens, rows.answers.mask)
            loss, metrics = policy_loss(config, state.kl_coef, log_prob, entropy, rows)
            return loss / count, metrics

        gradient, metrics = summed_gradient(config, actor_loss, actor, batch)
        rate = scheduled_rate(config, config.learning_rate, progress)
        actor, moments, norm = gradient_step(gradient, actor, moments, adam(config), rate)
        metrics = {name: total / count for name, total in metrics.items()} | {"gradient_norm": norm}
        if judge is None:
            return ((actor, moments), judge), metrics
        assert isinstance(config, PPO)
        clip_value = jnp.inf if config.clip_value is None else config.clip_value

        def critic_loss(critic: Critic, rows: Judged) -> tuple[jax.Array, Metrics]:
            value = values(frozen.critic_base, critic, rows.answers.tokens, rows.answers.mask, config.max_new_tokens)
            loss = jnp.sum(clipped_value_loss(value, rows.answers.value, rows.value_target, clip=clip_value), where=rows.valid) / count
            return loss, {"value_loss": loss}

        critic, critic_moments = judge
        gradient, of_critic = summed_gradient(config, critic_loss, critic, batch)
        rate = scheduled_rate(config, config.critic_learning_rate, progress)
        critic, critic_moments, norm = gradient_step(gradient, critic, critic_moments, adam(config), rate)
        return ((actor, moments), (critic, critic_moments)), metrics | of_critic | {"critic_gradient_norm": norm}

    start = (state.actor, state.moments), None if state.critic is None else (state.critic, state.critic_moments)
    sizes = {"epochs": config.epochs, "minibatch_size": config.minibatch_size}
    (moved, judge), metrics = descend(step, start, jax.tree.map(lambda x: x[None], judged), key, **sizes)
    kl = jnp.sum(kl_k1(answers.log_prob, answers.ref_log_prob), axis=1, where=answers.response_mask)  # [B] nats per answer
    kl_coef = state.kl_coef
    if config.kl_target is not None:
        gain = config.answers / config.kl_horizon
        kl_coef = proportional_kl_coefficient(kl_coef, jnp.mean(kl), target=config.kl_target, gain=gain)
    metrics |= audit(config, model_of(frozen.reference, moved[0]), answers, valid, advantage)
    metrics |= {"reference_kl": jnp.mean(kl), "kl_coef": state.kl_coef}
    if value_target is not None:
        metrics["explained_variance"] = explained_variance(answers.value, value_target, valid)
    else:
        metrics["flat_groups"] = jnp.mean((jnp.ptp(advantage[:, 0].reshape(-1, config.group_size), axis=1) == 0).astype(jnp.float32))
    critic, critic_moments = judge if judge is not None else (None, None)
    fine = jnp.isfinite(metrics["gradient_norm"] + metrics.get("critic_gradient_norm", 0.0))
    return State(moved[0], critic, moved[1], critic_moments, kl_coef), metrics | {"finite": fine}


def audit(config: OnlineSettings, moved: LanguageModel, answers: Answers, valid: jax.Array, advantage: jax.Array) -> Metrics:
    """How far the step went, on the answers that it was made from, and what it promises in units of the score.

    The divergence from the old policy is k3's estimate for each token; the promise is the mean over answers of sum_t (ratio_t - 1) A_t.
    """
    log_prob, entropy = map_rows(config, lambda rows: log_probs(config, moved, *rows), (answers.tokens, answers.mask))
    ratio = importance_ratio(log_prob, answers.log_prob)
    promise = jnp.sum((ratio - 1.0) * advantage, axis=1, where=valid)
    return {
        "kl": masked_mean(kl_k3(answers.log_prob, log_prob), valid),
        "ratio_min": jnp.min(jnp.where(valid, ratio, jnp.inf)),
        "ratio_max": jnp.max(jnp.where(valid, ratio, -jnp.inf)),
        "effective_sample_size": effective_sample_size(ratio, valid) / jnp.sum(valid),
        "entropy": masked_mean(entropy, answers.response_mask),
        "predicted_improvement": masked_mean(promise, answers.counts),
        "predicted_improvement_error": mean_standard_error(promise, answers.counts),
    }
