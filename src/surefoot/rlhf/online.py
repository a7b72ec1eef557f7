"""A run whose policy answers prompts: what the answers are worth, what stands out in them, and the step that follows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..training.checkpoint import Checkpoint
from ..training.seeding import key_for
from ..types import PyTree
from . import alarms, ppo
from .batches import TokenPrompt, bucket_lengths, pad
from .data import Dataset
from .devices import place_rows, place_weights
from .heads import RewardModel, values
from .model import LanguageModel
from .optimisation import map_rows, model_of
from .rewards import Reward, score
from .sampling import Generated, generate
from .tokens import Tokens
from .trainers import TextTrainer


class Judges(NamedTuple):
    """What scores answers: reward models and Python functions with their weights, and what is only watched."""

    models: list[tuple[str, RewardModel, float]]  # name, model, weight
    functions: list[Reward]
    gold: list[Reward]  # stands in for people: reported for held-out prompts, never learned from
    timeout_seconds: float | None = None


class Judgement(NamedTuple):
    """What B answers are worth."""

    completions: list[str]
    score: np.ndarray[Any, Any]  # [B] of the rewards with their weights
    is_scored: np.ndarray[Any, Any]  # [B]
    parts: dict[str, np.ndarray[Any, Any]]  # [B] what each reward said
    gold: np.ndarray[Any, Any] | None  # [B], NaN where there is none
    length: np.ndarray[Any, Any]  # [B] tokens
    is_ended: np.ndarray[Any, Any]  # [B] the end token is there


class Sample(NamedTuple):
    """An answer for people to read."""

    prompt: Any
    completion: str
    score: float
    kl: float  # nats between policy and reference, summed over the answer


class RunAstray(FloatingPointError):
    """A run that would learn nothing good any more. `samples` show it, and the last checkpoint is from before."""

    def __init__(self, message: str, samples: list[Sample]):
        super().__init__(message)
        self.samples = samples


class OnlineTrainer(TextTrainer):
    """Answers to prompts, their scores, and a step of the policy: PPO, RLOO or GRPO."""

    def __init__(
        self,
        config: ppo.OnlineSettings,
        reference: LanguageModel,
        judges: Judges,
        prompts: Dataset[TokenPrompt],
        held_out: Dataset[TokenPrompt] | None,
        tokens: Tokens,
        *,
        longest_prompt: int,
        seed: int,
        steps: int,
    ):
        super().__init__(config, seed=seed, steps=steps, batch=config.answers, data_size=len(prompts.rows))
        reference = place_weights(reference, self.mesh)
        models = [(name, place_weights(model, self.mesh), weight) for name, model, weight in judges.models]
        self.judges, self.prompts, self.tokens = judges._replace(models=models), prompts.rows, tokens
        self.held_out = held_out.rows if held_out else []
        self.prompt_lengths = bucket_lengths(longest_prompt)
        from_reward = getattr(config, "critic_from", "") == "reward" and models
        critic = models[0][1].backbone if from_reward else reference
        self.frozen = ppo.Frozen(reference, critic if config.lora_rank else None)
        self.compile(partial(ppo.init, config), partial(ppo.update, config), reference, critic, key_for(seed, "parameters"))
        self.sampling_key, self.learning_key, self.held_out_key = (key_for(seed, name) for name in ("sampling", "learning", "held-out"))
        self._log_probs, self._values = jax.jit(self._scored), jax.jit(self._valued)
        self._reward = jax.jit(lambda model, *rows: map_rows(config, lambda part: model(*part), rows))
        self.worth: tuple[float, float] | None = None  # of the last iteration's answers: mean, and its standard error
        self.samples: list[Sample] = []  # of the last iteration
        self.warnings: list[str] = []  # what stands out in them

    @property
    def model(self) -> LanguageModel:
        """The policy as it stands."""
        return model_of(self.frozen.reference, self.learner.actor)

    def _scored(self, base: LanguageModel, trained: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        model = model_of(base, trained)
        return map_rows(self.config, lambda rows: ppo.log_probs(self.config, model, *rows)[0], (tokens, mask))

    def _valued(self, base: LanguageModel | None, critic: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return map_rows(self.config, lambda rows: values(base, critic, *rows, self.config.max_new_tokens), (tokens, mask))

    def answer(self, prompts: Sequence[TokenPrompt], key: jax.Array) -> tuple[Generated, Judgement]:
        """The policy's answers, one to each prompt, and what they are worth; `config.answers` at a time."""
        config = self.config
        filling = [prompts[0]] * (config.answers - len(prompts))
        ids = [prompt.ids for prompt in (*prompts, *filling)]
        rows = place_rows(pad(ids, self.prompt_lengths, self.tokens.pad_id, side="left"), self.mesh)
        generated: Generated = self.timed(
            "generating",
            generate,
            self.model,
            *rows,
            key,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_token=self.tokens.stop_ids,
            pad_token=self.tokens.pad_id,
            done=np.arange(len(ids)) >= len(prompts),
        )
        began = time.perf_counter()
        judgement = self._judge(prompts, generated)
        self.seconds["scoring"] = self.seconds.get("scoring", 0.0) + time.perf_counter() - began
        return generated, judgement

    def _judge(self, prompts: Sequence[TokenPrompt], generated: Generated) -> Judgement:
        config, judges, num = self.config, self.judges, len(prompts)
        parts = {name: np.asarray(self._reward(model, generated.tokens, generated.mask))[:num] for name, model, _ in judges.models}
        total = sum((weight * parts[name] for name, _, weight in judges.models), np.zeros(num, np.float32))
        tokens, mask = (np.asarray(x)[:num, -config.max_new_tokens :] for x in (generated.tokens, generated.response_mask))
        completions = self.tokens.decode([row[kept] for row, kept in zip(tokens, mask, strict=True)])
        asked = [prompt.prompt for prompt in prompts], completions, [prompt.columns for prompt in prompts]
        by_functions = score(judges.functions, *asked, timeout_seconds=judges.timeout_seconds)
        gold = score(judges.gold, *asked, timeout_seconds=judges.timeout_seconds) if judges.gold else None
        length = mask.sum(axis=1)
        last = tokens[np.arange(num), np.maximum(length - 1, 0)]
        return Judgement(
            completions=completions,
            score=(total + by_functions.score).astype(np.float32),
            is_scored=by_functions.is_scored,
            parts=parts | by_functions.parts,
            gold=None if gold is None else np.where(gold.is_scored, gold.score, np.nan),
            length=length,
            is_ended=np.isin(last, self.tokens.stop_ids) & (length > 0),
        )

    def iterate(self) -> Mapping[str, Any]:
        config = self.config
        metrics: dict[str, Any] = {}
        if self.iteration == 0 and self.held_out:
            metrics |= {f"start_{name}": value for name, value in self.judge_held_out().items()}
        prompts = [self.prompts[i] for i in self.take(config.num_prompts) for _ in range(config.group_size)]
        generated, judged = self.answer(prompts, jax.random.fold_in(self.sampling_key, self.iteration))
        rows = generated.tokens, generated.mask
        # The reference goes through the same program as the actor: with equal weights the log-probabilities are equal to the bit.
        reference = self.frozen.reference if not config.lora_rank else jax.tree.map(jnp.zeros_like, self.learner.actor)
        log_prob = self.timed("scoring", self._log_probs, self.frozen.reference, self.learner.actor, *rows)
        ref_log_prob = self.timed("scoring", self._log_probs, self.frozen.reference, reference, *rows)
        critic = self.learner.critic
        value = None if critic is None else self.timed("scoring", self._values, self.frozen.critic_base, critic, *rows)
        response_mask = np.asarray(generated.response_mask)[:, -config.max_new_tokens :]
        kl = np.sum(np.asarray(log_prob - ref_log_prob), axis=1, where=response_mask)
        each = zip(prompts, judged.completions, judged.score.tolist(), kl.tolist(), strict=True)
        self.samples = [Sample(prompt.prompt, *row) for prompt, *row in each]
        is_empty_lesson = self._look_at(np.asarray(log_prob), response_mask, kl, judged)
        penalised = judged.score - config.missing_end_penalty * ~judged.is_ended
        answers = ppo.Answers(
            *rows,
            response_mask=response_mask,
            score=penalised.astype(np.float32),
            counts=judged.is_scored & ~np.bool_(is_empty_lesson),
            log_prob=log_prob,
            ref_log_prob=ref_log_prob,
            value=value,
        )
        price = float(self.learner.kl_coef) if config.kl_as == "reward" else 0.0
        key = jax.random.fold_in(self.learning_key, self.iteration)
        self.learner, of_update = self.timed("learning", self._update, self.learner, answers, self.frozen, key, self.progress)
        of_update = jax.device_get(of_update)
        if not of_update.pop("finite"):
            raise RunAstray(f"The gradient of iteration {self.iteration} was not finite; no step was taken along it.", self.samples)
        metrics |= self._counted(judged, penalised - price * kl) | of_update
        if self.held_out and self.evaluates:
            self.iteration += 1  # of the policy that has just moved
            metrics |= {f"held_out_{name}": value for name, value in self.judge_held_out().items()}
            self.iteration -= 1
        return metrics

    def _look_at(self, log_prob: Any, response_mask: Any, kl: Any, judged: Judgement) -> bool:
        """Note what stands out; raise where the run has gone astray. Whether nothing can be learned from these answers."""
        prompts, completions = [sample.prompt for sample in self.samples], judged.completions
        limit = self.config.max_kl
        fatal = alarms.non_finite(log_prob, response_mask, completions) or alarms.far_from_reference(kl, completions, limit)
        if fatal:
            raise RunAstray(f"Iteration {self.iteration}: {fatal} Nothing was learned from it.", self.samples)
        same = alarms.identical_completions(prompts, completions)
        empty = alarms.empty_completions(prompts, completions)
        self.warnings = [warning for warning in (same, empty) if warning]
        return same is not None or not any(map(str.strip, completions))

    def _counted(self, judged: Judgement, worth: Any) -> dict[str, Any]:
        """What the answers of an iteration came to."""
        counted = worth[judged.is_scored]
        now = (float(counted.mean()), standard_error(counted)) if len(counted) else None
        before, self.worth = self.worth, now
        metrics = {
            "score": mean(judged.score[judged.is_scored]),
            "score_error": standard_error(judged.score[judged.is_scored]),
            "response_length": judged.length.mean(),
            "ended": judged.is_ended.mean(),
            "empty": np.mean([not completion.strip() for completion in judged.completions]),
            "unscored": 1.0 - judged.is_scored.mean(),
            **{f"reward/{name}": np.nanmean(part) if np.isfinite(part).any() else np.nan for name, part in judged.parts.items()},
        }
        if judged.gold is not None:
            metrics["gold"] = np.nanmean(judged.gold) if np.isfinite(judged.gold).any() else np.nan
        if before is not None and now is not None:
            metrics |= {"realised_improvement": now[0] - before[0], "realised_improvement_error": float(np.hypot(now[1], before[1]))}
        return metrics

    def judge_held_out(self) -> dict[str, float]:
        """What answers to the held-out prompts are worth: means and their standard errors."""
        parts = []
        for begin in range(0, len(self.held_out), self.batch):
            key = jax.random.fold_in(jax.random.fold_in(self.held_out_key, self.iteration), begin)
            parts.append(self.answer(self.held_out[begin : begin + self.batch], key)[1])
        scores = np.concatenate([part.score[part.is_scored] for part in parts])
        found = {"score": mean(scores), "score_error": standard_error(scores)}
        if self.judges.gold:
            gold = np.concatenate([part.gold[np.isfinite(part.gold)] for part in parts if part.gold is not None])
            found |= {"gold": mean(gold), "gold_error": standard_error(gold)}
        return found | {"length": float(np.concatenate([part.length for part in parts]).mean())}

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        trees, info = super().snapshot()
        return trees, info | {"worth": self.worth}

    def restore(self, checkpoint: Checkpoint) -> None:
        super().restore(checkpoint)
        self.worth = None if checkpoint.info["worth"] is None else tuple(checkpoint.info["worth"])


def mean(x: Any) -> float:
    """NaN of nothing."""
    return float(x.mean()) if len(x) else float("nan")


def standard_error(x: Any) -> float:
    """Of the mean; NaN of fewer than two."""
    return float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")
