"""Is every formula held by a test? Break one line at a time, run the tests that should notice, and name the breaks that survive.

    python tests/mutants.py                     all of them, about a quarter of an hour on two cores
    python tests/mutants.py gae "KL direction"  those whose names contain one of these words

The source is copied and broken there; the working tree stays as it is. The exit status is the number of survivors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "surefoot"


class Mutant(NamedTuple):
    """`line`, which occurs once in the file, is replaced by `broken`."""

    name: str
    file: str  # below src/surefoot
    line: str
    broken: str
    tests: str  # below tests, separated by spaces


MUTANTS = [
    # Returns and advantages
    Mutant("gae: value added", "math/returns.py", "discount=discount) - value\n    decay", "discount=discount) + value\n    decay", "math/test_returns.py"),
    Mutant("gae: runs over the ends of episodes", "math/returns.py", "decay = jnp.where(continues(terminated, truncated), discount * gae_lambda, 0)", "decay = jnp.where(continues(terminated, terminated), discount * gae_lambda, 0)", "math/test_returns.py"),
    Mutant("gae: without discount", "math/returns.py", "truncated), discount * gae_lambda, 0)", "truncated), gae_lambda, 0)", "math/test_returns.py"),
    Mutant("gae: gradient through the values", "math/returns.py", "return jax.lax.stop_gradient(linear_recurrence(td_error, decay, reverse=True))", "return linear_recurrence(td_error, decay, reverse=True)", "math/test_returns.py"),
    Mutant("gae: forwards in time", "math/returns.py", "stop_gradient(linear_recurrence(td_error, decay, reverse=True))", "stop_gradient(linear_recurrence(td_error, decay, reverse=False))", "math/test_returns.py"),
    Mutant("lambda return: bootstraps in full", "math/returns.py", "(1 - trace) * next_value", "next_value", "math/test_returns.py"),
    Mutant("n-step return: one step short", "math/returns.py", "jax.lax.fori_loop(1, min(", "jax.lax.fori_loop(2, min(", "math/test_returns.py"),
    Mutant("n-step return: over the end of an episode", "math/returns.py", "successor = jnp.where(goes_on,", "successor = jnp.where(jnp.ones_like(goes_on),", "math/test_returns.py"),
    Mutant("total return: not discounted", "math/returns.py", "discounted = time_discount(time, discount=discount).astype(reward.dtype) * reward", "discounted = reward", "math/test_returns.py"),
    Mutant("gamma^t: one step late", "math/returns.py", "return jnp.power(discount, time)", "return jnp.power(discount, time + 1)", "math/test_returns.py"),
    Mutant("TD target: bootstraps after a termination", "math/values.py", "jnp.where(terminated, 0, next_value)", "next_value", "math/test_values.py math/test_returns.py"),
    Mutant("TD target: gradient through the target", "math/values.py", "return jax.lax.stop_gradient(reward + discount * jnp.where(terminated", "return (reward + discount * jnp.where(terminated", "math/test_values.py"),
    Mutant("value loss: gradient through the target", "math/values.py", "0.5 * jnp.square(value - jax.lax.stop_gradient(value_target))", "0.5 * jnp.square(value - value_target)", "math/test_values.py"),
    Mutant("clipped value loss: the smaller of the two", "math/values.py", "return jnp.maximum(squared_value_loss(value", "return jnp.minimum(squared_value_loss(value", "math/test_values.py"),
    Mutant("the last row of a batch goes on", "math/episodes.py", ".at[-1].set(False)", "", "math/test_returns.py math/test_credit.py"),
    Mutant("an episode's sum at its end alone", "math/episodes.py", "return linear_recurrence(sum_at_end, goes_on, reverse=True)", "return sum_at_end", "math/test_credit.py math/test_returns.py math/test_importance.py"),
    Mutant("n-step target: bootstraps after an end", "math/values.py", "discount * jnp.where(discount == 0, 0, next_value)", "discount * next_value", "math/test_values.py"),
    Mutant("n-step target: gradient through the target", "math/values.py", "return jax.lax.stop_gradient(reward + discount * jnp.where(discount == 0, 0, next_value))", "return reward + discount * jnp.where(discount == 0, 0, next_value)", "math/test_values.py"),
    Mutant("double Q: judges itself", "math/values.py", "jnp.take_along_axis(target_q, jnp.argmax(online_q,", "jnp.take_along_axis(target_q, jnp.argmax(target_q,", "math/test_values.py"),
    Mutant("greatest value: of illegal actions too", "math/values.py", "initial=-jnp.inf, where=action_mask)", "initial=-jnp.inf)", "math/test_values.py"),
    Mutant("twins: the larger", "math/values.py", "return jnp.min(q, axis=0)", "return jnp.max(q, axis=0)", "math/test_values.py"),
    Mutant("V-trace: ratio not in the TD error", "math/returns.py", "linear_recurrence(rho * td_error,", "linear_recurrence(td_error,", "math/test_traces.py"),
    Mutant("V-trace: one bound for both", "math/returns.py", "gae_lambda * jnp.minimum(ratio, clip_c)", "gae_lambda * jnp.minimum(ratio, clip_rho)", "math/test_traces.py"),
    Mutant("V-trace: advantage by the own target", "math/returns.py", "later = jnp.where(goes_on, jnp.roll(correction, -1, axis=0), 0)", "later = jnp.where(goes_on, correction, 0)", "math/test_traces.py"),
    Mutant("V-trace: advantage runs over the ends of episodes", "math/returns.py", "later = jnp.where(goes_on, jnp.roll(correction, -1, axis=0), 0)", "later = jnp.roll(correction, -1, axis=0)", "math/test_traces.py"),
    Mutant("Retrace: the own ratio", "math/returns.py", "jnp.roll(jnp.minimum(ratio, 1), -1, axis=0)", "jnp.minimum(ratio, 1)", "math/test_traces.py"),
    Mutant("Retrace: ratios not cut", "math/returns.py", "jnp.roll(jnp.minimum(ratio, 1), -1, axis=0)", "jnp.roll(ratio, -1, axis=0)", "math/test_traces.py"),
    # Distributions of returns
    Mutant("projection: atoms beyond the ends are lost", "math/distributional.py", "(support[last] - support[0]) * last, 0, last)", "(support[last] - support[0]) * last, -9, 99)", "math/test_distributional.py"),
    Mutant("projection: to the farther neighbour", "math/distributional.py", "jnp.maximum(1 - jnp.abs(place", "jnp.maximum(jnp.abs(place", "math/test_distributional.py"),
    Mutant("cross-entropy: gradient through the target", "math/distributional.py", "target_probability = jax.lax.stop_gradient(target_probability)", "target_probability = 1.0 * target_probability", "math/test_distributional.py"),
    Mutant("quantile loss: the other tail", "math/distributional.py", "(error < 0).astype", "(error > 0).astype", "math/test_distributional.py"),
    Mutant("quantile loss: ends of intervals for midpoints", "math/distributional.py", "dtype=quantile.dtype) + 0.5)", "dtype=quantile.dtype) + 1.0)", "math/test_distributional.py"),
    Mutant("quantile loss: pairs the other way round", "math/distributional.py", "jnp.sum(jnp.mean(weight * huber(error, delta=delta) / delta, axis=-1), axis=-1)", "jnp.mean(jnp.sum(weight * huber(error, delta=delta) / delta, axis=-1), axis=-1)", "math/test_distributional.py"),
    # Policy gradients
    Mutant("score function: descends", "math/policy_gradient.py", "return -jax.lax.stop_gradient(advantage) * log_prob", "return jax.lax.stop_gradient(advantage) * log_prob", "math/test_credit.py"),
    Mutant("score function: gradient through the advantage", "math/policy_gradient.py", "return -jax.lax.stop_gradient(advantage) * log_prob", "return -advantage * log_prob", "math/test_policy_gradient.py"),
    Mutant("ratio: upside down", "math/policy_gradient.py", "return _weight(log_prob - jax.lax.stop_gradient(old_log_prob))", "return _weight(jax.lax.stop_gradient(old_log_prob) - log_prob)", "math/test_policy_gradient.py math/test_importance.py"),
    Mutant("ratio: gradient through the old policy", "math/policy_gradient.py", "return _weight(log_prob - jax.lax.stop_gradient(old_log_prob))", "return _weight(log_prob - old_log_prob)", "math/test_policy_gradient.py math/test_importance.py"),
    Mutant("trajectory weight: up to each row only", "math/policy_gradient.py", "return _weight(episode_sum(", "return _weight(episode_cumsum(", "math/test_importance.py"),
    Mutant("per-step weight: of the whole episode", "math/policy_gradient.py", "return _weight(episode_cumsum(", "return _weight(episode_sum(", "math/test_importance.py"),
    Mutant("self-normalised weights: by their mean over all rows", "math/policy_gradient.py", "return weight / masked_mean(weight, mask)", "return weight / jnp.mean(weight)", "math/test_importance.py"),
    Mutant("clipped surrogate: the larger of the two", "math/policy_gradient.py", "objective = jnp.minimum(ratio * advantage,", "objective = jnp.maximum(ratio * advantage,", "math/test_policy_gradient.py"),
    Mutant("clipped surrogate: no lower end", "math/policy_gradient.py", "jnp.clip(ratio, 1 - clip, 1 + clip)", "jnp.clip(ratio, 0, 1 + clip)", "math/test_policy_gradient.py"),
    Mutant("dual clip: for good actions", "math/policy_gradient.py", "objective = jnp.where(advantage < 0, jnp.maximum", "objective = jnp.where(advantage > 0, jnp.maximum", "math/test_policy_gradient.py"),
    Mutant("KL penalty: a reward", "math/policy_gradient.py", "return surrogate_loss(ratio, advantage) + penalty_coef * kl", "return surrogate_loss(ratio, advantage) - penalty_coef * kl", "math/test_policy_gradient.py"),
    Mutant("control variate: not centred", "math/policy_gradient.py", "return jax.lax.stop_gradient(advantage - control_variate + expected_control_variate)", "return jax.lax.stop_gradient(advantage - control_variate)", "math/test_control_variates.py"),
    Mutant("control variate: gradient through what is left", "math/policy_gradient.py", "return jax.lax.stop_gradient(advantage - control_variate + expected_control_variate)", "return advantage - control_variate + expected_control_variate", "math/test_control_variates.py"),
    Mutant("control variate: added", "math/policy_gradient.py", "(advantage - control_variate + expected_control_variate)", "(advantage + control_variate - expected_control_variate)", "math/test_control_variates.py"),
    Mutant("control variate: masked actions count", "math/policy_gradient.py", "p * jnp.where(p > 0, jax.lax.stop_gradient(control_variate), 0)", "p * jax.lax.stop_gradient(control_variate)", "math/test_control_variates.py"),
    # Divergences
    Mutant("KL of categories: the other direction", "math/divergences.py", "p = jnp.exp(log_prob_p)", "p = jnp.exp(log_prob_q)", "math/test_divergences.py"),
    Mutant("KL of normals: by the other spread", "math/divergences.py", "jnp.exp(-log_std_q))", "jnp.exp(-log_std_p))", "math/test_divergences.py"),
    Mutant("k3: the other direction", "math/divergences.py", "log_ratio = jnp.minimum(ref_log_prob - log_prob, MAX_LOG_RATIO)", "log_ratio = jnp.minimum(log_prob - ref_log_prob, MAX_LOG_RATIO)", "math/test_divergences.py"),
    Mutant("adaptive coefficient: halved where it is too far", "math/divergences.py", "jnp.where(too_far, coefficient * factor,", "jnp.where(too_far, coefficient / factor,", "math/test_divergences.py"),
    Mutant("adaptive step size: grows where it is too far", "math/trust_region.py", "jnp.where(too_far, step_size / factor,", "jnp.where(too_far, step_size * factor,", "math/test_trust_region.py"),
    # Trust regions
    Mutant("conjugate gradient: residual grows", "math/trust_region.py", "residual = residual - length * image", "residual = residual + length * image", "math/test_trust_region.py"),
    Mutant("step length: without the factor 2", "math/trust_region.py", "jnp.sqrt(2 * max_divergence /", "jnp.sqrt(max_divergence /", "math/test_trust_region.py"),
    Mutant("line search: gives the next try", "math/trust_region.py", "jnp.power(jnp.asarray(factor, dtype), tries - 1)", "jnp.power(jnp.asarray(factor, dtype), tries)", "math/test_trust_region.py"),
    # Statistics
    Mutant("mean: over all rows", "math/reduce.py", "return jnp.sum(x, where=mask) / jnp.maximum(jnp.sum(mask), 1)", "return jnp.mean(x)", "math/test_reduce.py"),
    Mutant("standardise: not centred", "math/reduce.py", "return jnp.where(mask, _centre(x, mask) /", "return jnp.where(mask, x /", "math/test_reduce.py"),
    Mutant("leave-one-out mean: the own sample in it", "math/reduce.py", "(jnp.sum(x, where=mask) - x) / jnp.maximum(others, 1)", "jnp.sum(x, where=mask) / jnp.maximum(others, 1)", "math/test_reduce.py"),
    Mutant("effective sample size: not squared", "math/reduce.py", "return jnp.square(jnp.sum(weight, where=mask)) /", "return jnp.sum(weight, where=mask) /", "math/test_reduce.py math/test_importance.py"),
    Mutant("Polyak: the wrong way round", "math/reduce.py", "return (1 - rate) * target + rate * online", "return rate * target + (1 - rate) * online", "math/test_reduce.py"),
    # Distributions, networks, normalisation
    Mutant("mask: ignored", "distributions.py", "        if action_mask is not None:\n            logits = jnp.where(action_mask, logits, MASKED_LOGIT)\n        return cls(jax.nn", "        return cls(jax.nn", "units/test_distributions.py"),
    Mutant("entropy: with the wrong sign", "distributions.py", "return -jnp.sum(jnp.exp(self.log_probs) * self.log_probs, axis=-1)", "return jnp.sum(jnp.exp(self.log_probs) * self.log_probs, axis=-1)", "units/test_distributions.py"),
    Mutant("choices: log-probability of the first alone", "distributions.py", "return jnp.sum(self.each.log_prob(action), axis=-1)", "return self.each.log_prob(action)[..., 0]", "units/test_distributions.py"),
    Mutant("squashed normal: density of the normal", "distributions.py", "self.log_std - log_tanh_slope(u), axis=-1)", "self.log_std, axis=-1)", "units/test_distributions.py"),
    Mutant("squashed normal: slope from the rounded action", "distributions.py", "return 2 * (LOG_TWO - u - jax.nn.softplus(-2 * u))", "return jnp.log(1 - jnp.tanh(u) ** 2)", "units/test_distributions.py"),
    Mutant("squashed normal: the ends not clipped", "distributions.py", "jnp.arctanh(jnp.clip(action, -limit, limit))", "jnp.arctanh(action)", "units/test_distributions.py"),
    Mutant("memory: not cut at the ends of episodes", "policies.py", "where_rows(time == 0, jnp.zeros_like(x), x)", "where_rows(time < 0, jnp.zeros_like(x), x)", "units/test_policies.py"),
    Mutant("memory: the critic's gradient reaches it", "policies.py", "jax.lax.stop_gradient(features)", "features", "units/test_policies.py"),
    Mutant("memory: a final value without its observation", "estimates.py", "return jax.vmap(evaluate)(obs, features_after(policy.actor, obs, memory), action_mask)", "return jax.vmap(evaluate)(obs, memory, action_mask)", "units/test_policies.py"),
    Mutant("values: of the next row at the end of an episode", "estimates.py", "jnp.where(rollout.terminated | rollout.truncated, final_values, following)", "jnp.where(rollout.terminated, final_values, following)", "units/test_policies.py"),
    Mutant("normaliser: takes in rows that do not count", "audit.py", "update_normaliser(policy.normaliser, rollout.obs, rollout.valid)", "update_normaliser(policy.normaliser, rollout.obs, rollout.valid | True)", "algorithms/test_trpo.py algorithms/test_ppo.py"),
    Mutant("normaliser: variances without the distance of the means", "normalise.py", " + weight * (1.0 - weight) * delta**2", "", "units/test_normalise.py"),
    Mutant("return scale: goes on over the ends of episodes", "normalise.py", "return jnp.where(ended, 0.0, running), running", "return running, running", "units/test_normalise.py"),
    # The audit
    Mutant("audit: KL in the other direction", "audit.py", '"kl": masked_mean(old.kl_to(new), valid)', '"kl": masked_mean(new.kl_to(old), valid)', "units/test_audit.py"),
    Mutant("audit: promise without gamma^t", "audit.py", "promise = time_discount(rollout.time, discount=discount) * (ratio - 1.0) * advantage", "promise = (ratio - 1.0) * advantage", "units/test_audit.py"),
    Mutant("audit: advantages in scaled units", "audit.py", "before.advantage * before.scale", "before.advantage", "algorithms/test_ppo.py"),
    # Minibatches
    Mutant("minibatches: the same order in every epoch", "minibatches.py", "order = shuffled(jax.random.fold_in(key, index), size)", "order = shuffled(key, size)", "units/test_minibatches.py"),
    Mutant("minibatches: sequences across streams", "minibatches.py", "num_envs, *shape).swapaxes(1, 2).reshape(-1, length", "num_envs, *shape).reshape(-1, length", "units/test_minibatches.py"),
    # The algorithms
    Mutant("reinforce: mean over rows", "algorithms/reinforce.py", "/ jnp.maximum(jnp.sum(used & ended), 1)", "/ jnp.maximum(jnp.sum(used), 1)", "algorithms/test_reinforce.py"),
    Mutant("reinforce: the true discounted gradient left out", "algorithms/reinforce.py", "advantage = time_discount(rows.time, discount=config.gamma) * advantage", "advantage = 1.0 * advantage", "algorithms/test_reinforce.py"),
    Mutant("vpg-adaptive: the step size of the next batch", "algorithms/vpg_adaptive.py", "optax.scale_by_adam(), state.learning_rate)", "optax.scale_by_adam(), config.learning_rate)", "algorithms/test_vpg_adaptive.py"),
    Mutant("vpg-adaptive: moments not carried", "algorithms/vpg_adaptive.py", "return State(acting, critic, moments,", "return State(acting, critic, state.optimiser,", "algorithms/test_vpg_adaptive.py"),
    Mutant("vpg-adaptive: the critic starts anew", "algorithms/vpg_adaptive.py", "moments, critic_moments, return_scale", "moments, state.critic_optimiser, return_scale", "algorithms/test_vpg_adaptive.py"),
    Mutant("vpg-adaptive: KL after the statistics", "algorithms/vpg_adaptive.py", "before.old.kl_to(distributions_of(moved.actor, before.inputs))", "distributions_of(moved.actor, before.inputs).kl_to(before.old)", "algorithms/test_vpg_adaptive.py"),
    Mutant("a2c: entropy is punished", "algorithms/a2c.py", "- config.entropy_coef * entropy", "+ config.entropy_coef * entropy", "algorithms/test_a2c.py"),
    Mutant("a2c: epsilon outside the root", "minibatches.py", "eps_in_sqrt=True", "eps_in_sqrt=False", "algorithms/test_a2c.py"),
    Mutant("actor-critic: judged before the fit", "algorithms/actor_critic.py", "if config.fit_first else before", "if not config.fit_first else before", "algorithms/test_actor_critic.py"),
    Mutant("actor-critic: Monte Carlo for TD", "algorithms/actor_critic.py", "trace_decay = 1.0 if config.target", "trace_decay = 0.0 if config.target", "algorithms/test_actor_critic.py"),
    Mutant("actor-critic: the advantage without V", "algorithms/actor_critic.py", "return action_value - judgement.value", "return action_value", "algorithms/test_actor_critic.py"),
    Mutant("half space: projected from its inside too", "math/trust_region.py", "keepdims=True) - bound, 0)", "keepdims=True) - bound, -jnp.inf)", "math/test_trust_region.py"),
    Mutant("a2c-trust-region: KL direction swapped", "algorithms/a2c_trust_region.py", "return jnp.sum(average.kl_to(now.free()))", "return jnp.sum(now.free().kl_to(average))", "algorithms/test_a2c_trust_region.py"),
    Mutant("a2c-trust-region: the average follows at once", "algorithms/a2c_trust_region.py", "rate=1 - config.average_decay", "rate=config.average_decay", "algorithms/test_a2c_trust_region.py"),
    Mutant("multiplier: negative", "math/trust_region.py", "return jnp.maximum(multiplier + step_size * (divergence - max_divergence), 0)", "return multiplier + step_size * (divergence - max_divergence)", "math/test_trust_region.py"),
    Mutant("multiplier: falls where the bound is broken", "math/trust_region.py", "step_size * (divergence - max_divergence), 0)", "step_size * (max_divergence - divergence), 0)", "math/test_trust_region.py"),
    Mutant("trpo-penalty: the multiplier stays", "algorithms/trpo_penalty.py", "return State(acting, critic, critic_optimiser, return_scale, multiplier)", "return State(acting, critic, critic_optimiser, return_scale, state.multiplier)", "algorithms/test_trpo_penalty.py"),
    Mutant("cem: the worst are the elites", "math/evolution.py", "jnp.argsort(fitness, descending=True, stable=True)", "jnp.argsort(fitness, descending=False, stable=True)", "math/test_evolution.py"),
    Mutant("cem: noise that does not end", "math/evolution.py", "return jnp.maximum(start * (1 - generation / generations), 0)", "return start + 0 * generation", "math/test_evolution.py"),
    Mutant("cem: not discounted", "algorithms/cem.py", "time_discount(rollout.time, discount=config.gamma) * rollout.reward", "rollout.reward", "algorithms/test_cem.py"),
    Mutant("trpo: up the loss", "algorithms/trpo.py", "config.cg_damping * v, -gradient,", "config.cg_damping * v, gradient,", "algorithms/test_trpo.py"),
    Mutant("trpo: damped length", "algorithms/trpo.py", "trust_region_scale(direction, fisher(direction),", "trust_region_scale(direction, fisher(direction) + config.cg_damping * direction,", "algorithms/test_trpo.py"),
    Mutant("trpo: any improvement", "algorithms/trpo.py", "(surrogate(candidate) < loss) & (mean_kl(candidate) <= config.max_kl)", "mean_kl(candidate) <= config.max_kl", "algorithms/test_trpo.py"),
    Mutant("trpo: KL direction swapped", "algorithms/trpo.py", 'old.kl_to(new) if config.kl_direction == "old||new"', 'old.kl_to(new) if config.kl_direction == "new||old"', "algorithms/test_trpo.py"),
    Mutant("ppo-penalty: KL direction swapped", "algorithms/ppo_penalty.py", 'return old.kl_to(new) if config.kl_direction == "old||new"', 'return old.kl_to(new) if config.kl_direction == "new||old"', "algorithms/test_ppo_penalty.py"),
    Mutant("ppo-penalty: the coefficient stays", "algorithms/ppo_penalty.py", "return State(acting, critic, moments, return_scale, next_beta)", "return State(acting, critic, moments, return_scale, beta)", "algorithms/test_ppo_penalty.py"),
    Mutant("ppo: old values from the target", "algorithms/ppo.py", "old_value=before.value,", "old_value=before.value_target,", "algorithms/test_ppo.py"),
    Mutant("ppo: clip does not fall", "algorithms/ppo.py", "clip = scheduled(config.clip, config.clip_schedule, rollout.progress)", "clip = scheduled(config.clip, config.learning_rate_schedule, rollout.progress)", "algorithms/test_ppo.py"),
    Mutant("ppo: never stops early", "algorithms/ppo.py", "config.target_kl is None or ", "True or ", "algorithms/test_ppo.py"),
    Mutant("ppo: value loss over all rows", "algorithms/ppo.py", "batch.value_target, clip=clip_value), batch.valid)", "batch.value_target, clip=clip_value), batch.valid | True)", "algorithms/test_ppo.py"),
    # What learns from a replay
    Mutant("dqn: bootstraps from the online network", "algorithms/dqn.py", "wanted = target_of(config, unravel(flat), unravel(target), batch, noise[1:])", "wanted = target_of(config, unravel(flat), unravel(flat), batch, noise[1:])", "algorithms/test_dqn.py"),
    Mutant("dqn: the target counts iterations", "algorithms/dqn.py", "start = flat, state.target, state.optimiser, state.num_updates", "start = flat, state.target, state.optimiser, 0 * state.num_updates", "algorithms/test_dqn.py"),
    Mutant("dqn: illegal actions are chosen for the target", "algorithms/dqn.py", "chosen = jnp.argmax(chooser if mask is None else jnp.where(mask, chooser, -jnp.inf), axis=-1)", "chosen = jnp.argmax(chooser, axis=-1)", "algorithms/test_dqn.py"),
    Mutant("dqn: importance weights left out", "algorithms/dqn.py", "return jnp.mean(weight * each)", "return jnp.mean(each)", "algorithms/test_dqn.py"),
    Mutant("dqn: epsilon as if the run had not begun", "algorithms/dqn.py", "acting = Acting(unravel(flat), epsilon_at(config, rollout.progress))", "acting = Acting(unravel(flat), epsilon_at(config, 0 * rollout.progress))", "algorithms/test_dqn.py"),
    Mutant("dueling: advantages not centred", "action_values.py", "[None] + output - jnp.mean(output, axis=0)", "[None] + output", "algorithms/test_dqn.py"),
    Mutant("noise: all of one sign", "action_values.py", "return jnp.sign(noise) * jnp.sqrt(jnp.abs(noise))", "return jnp.sqrt(jnp.abs(noise))", "algorithms/test_dqn.py"),
    Mutant("noise: of the online network in the target too", "algorithms/dqn.py", "unravel(target), batch, noise[1:])", "unravel(target), batch, noise[:2])", "algorithms/test_dqn.py"),
    Mutant("noise: the same in all steps", "algorithms/dqn.py", "jax.vmap(state.acting.network.noise)(keys)", "jax.vmap(state.acting.network.noise)(keys[:1].repeat(shape[0]))", "algorithms/test_dqn.py"),
    Mutant("replay: learns before it has begun", "replay.py", "started = replay.size >= config.learning_starts", "started = replay.size >= 1", "algorithms/test_dqn.py"),
    Mutant("frames: from before the episode too", "replay.py", "place = jnp.where(older, begin", "place = jnp.where(older | True, begin", "units/test_replay.py"),
    Mutant("frames: not around the ring", "replay.py", "[..., None] - back) % ring, NOWHERE)", "[..., None] - back), NOWHERE)", "units/test_replay.py"),
    Mutant("frames: of the last observation as of the row before it", "replay.py", "(rollout.time, rollout.time + 1, time)", "(rollout.time, rollout.time, time)", "units/test_replay.py"),
    Mutant("frames: of the newest successor as of a first", "replay.py", "(rollout.time, rollout.time + 1, time)", "(rollout.time, rollout.time + 1, 0 * time)", "units/test_replay.py"),
    Mutant("frames: a transition outlives its oldest", "replay.py", "(oldest < written) & (is_over | lacks_frame)", "(oldest < written) & is_over", "units/test_replay.py"),
    Mutant("frames: every transition expires as if its stack were full", "replay.py", "jnp.sum(older[begin + row % ring], axis=-1)", "older.shape[-1]", "units/test_replay.py"),
    Mutant("frames: too few looked at for having expired", "replay.py", "(0 if older is None else older.shape[-1])", "0", "units/test_replay.py"),
    Mutant("frames: a priority outlives its transition", "replay.py", "lost = jnp.where(is_gone & ~is_over,", "lost = jnp.where(is_gone & is_over & ~is_gone,", "units/test_replay.py"),
    Mutant("frames: an expired one takes another's priority along", "replay.py", "lost = jnp.where(is_gone & ~is_over,", "lost = jnp.where(is_gone & (row > cursor - ring),", "units/test_replay.py"),
    Mutant("replay: an episode that a resumed run left runs into the next", "replay.py", "cursor = replay.cursor + is_left", "cursor = replay.cursor", "units/test_replay.py"),
    Mutant("replay: an episode that was left is not truncated", "replay.py", "rollout.truncated, no, no[0], is_left)", "rollout.truncated, no, no[0], ~is_left)", "units/test_replay.py"),
    Mutant("replay: an episode that ended was left", "replay.py", "jnp.where(rollout.valid[-1] & ~ended[-1], rollout.time[-1] + 1, 0)", "rollout.time[-1] + 1", "units/test_replay.py"),
    Mutant("prioritised: what weighs nothing is drawn", "replay.py", "is_met = (weight > 0) & (before", "is_met = (weight >= 0) & (before", "units/test_replay.py"),
    Mutant("prioritised: a child begins behind itself", "replay.py", "np.float32), k=1), precision", "np.float32), k=0), precision", "units/test_replay.py"),
    Mutant("prioritised: the tree is copied", "replay.py", "return node, priority / total", "return node, replay.sums[0][node] / total", "units/test_replay.py"),
    Mutant("prioritised: what was passed is not taken off", "replay.py", "left = left - jnp.max(jnp.where(is_met, before, 0.0), axis=-1)", "left = left - 0.0 * jnp.max(before, axis=-1)", "units/test_replay.py"),
    Mutant("replay: a ring too small for a stack", "replay.py", "(least := 2 * num_steps + 1 + stack)", "(least := 2 * num_steps + 2)", "units/test_replay.py"),
    # What a checkpoint shares with the one before
    Mutant("checkpoint: a chunk that has changed is linked to", "training/checkpoint.py", "described is not None and _holds(before, pieces)", "described is not None", "training/test_checkpoint.py"),
    Mutant("checkpoint: a file that goes on is the same", "training/checkpoint.py", "return not file.read(1)", "return True", "training/test_checkpoint.py"),
    Mutant("checkpoint: no chunk is read back", "training/checkpoint.py", "if not _holds(path, pieces):", "if False:", "training/test_checkpoint.py"),
    Mutant("checkpoint: a damaged manifest is believed", "training/checkpoint.py", "written_step == step and digest == _manifest_digest(step, files)", "written_step == step", "training/test_checkpoint.py"),
    Mutant("checkpoint: a large array is copied", "training/checkpoint.py", "rows = np.asarray(leaf) if isinstance", "rows = np.array(leaf) if isinstance", "training/test_checkpoint.py"),
    Mutant("checkpoint: an accelerator sends all rows", "training/checkpoint.py", "_on_host(_take_rows(rows, start, length) if is_remote", "_on_host(np.asarray(rows)[start : start + length] if is_remote", "training/test_checkpoint.py"),
    Mutant("checkpoint: the last rows are lost", "training/checkpoint.py", "for start in range(0, len(leaf), count):", "for start in range(0, len(leaf) - count, count):", "training/test_checkpoint.py"),
    Mutant("large products: one after the other", "training/engine.py", 'kind = "CONCURRENCY" if several', 'kind = "MEMORY" if several', "units/test_replay.py"),
    Mutant("resume: two replays in memory", "training/engine.py", 'if hasattr(self.learner, "replay"):', "if False:", "training/test_frames.py"),
    Mutant("beside learning: the random numbers of the rollout before", "training/engine.py", "index + (1 + self.lag))", "index + 1)", "training/test_beside.py"),
    Mutant("beside learning: written over while it is learned from", "training/engine.py", "num_rollouts=1 + self.lag)", "num_rollouts=1)", "training/test_beside.py"),
    Mutant("beside learning: one after the other", "training/engine.py", "learned = self._thread.submit(self._learn, rollout, i) if self._thread else None", "learned = None", "training/test_beside.py"),
    Mutant("beside learning: the last rollout is not learned from", "training/engine.py", "if self.lag and i + 1 < self.num_iterations else None", "if self.lag and i + 2 < self.num_iterations else None", "training/test_beside.py"),
    Mutant("beside learning: what waits is not in the checkpoint", "training/engine.py", "if self.collected is not None:  # of", "if self.collected is None:  # of", "training/test_beside.py"),
    Mutant("beside learning: collecting is learning too", "training/engine.py", "learning += time.perf_counter() - began", "learning += time.perf_counter() - began + sum(self.collector.seconds.values())", "training/test_beside.py"),
    Mutant("beside learning: named after who learns", "training/engine.py", "return rollout._replace(acting=acting) if self.lag else rollout", "return rollout", "training/test_beside.py"),
    Mutant("rollout: what is acted on next is written over", "collect.py", "jax.tree.map(np.copy, (self.obs, self.action_mask))", "self.obs, self.action_mask", "training/test_beside.py"),
    Mutant("off-policy actor-critic: corrected for the policy that learns", "algorithms/off_policy_actor_critic.py", "acted = old if rollout.acting is None else at(rollout.acting.actor, rollout.obs, rollout.action_mask)", "acted = old", "algorithms/test_off_policy_actor_critic.py"),
    Mutant("off-policy actor-critic: promised by another's actions", "algorithms/off_policy_actor_critic.py", "foreseen = foreseen * importance_ratio(", "foreseen = foreseen + 0 * importance_ratio(", "algorithms/test_off_policy_actor_critic.py"),
    Mutant("ddpg: the target's action by the actor that learns", "algorithms/ddpg.py", "critic_loss(critic, *targets, batch)", "critic_loss(critic, actor, targets[1], batch)", "algorithms/test_ddpg.py"),
    Mutant("pathwise: noise in place of random actions", "pathwise.py", "return jnp.where(acting.is_random, jax.random.uniform(random_key, action.shape, minval=-1.0), noisy), carry", "return noisy, carry", "algorithms/test_ddpg.py"),
    Mutant("td3: the actor does not wait", "algorithms/td3.py", "count % config.policy_delay == 0", "count % 1 == 0", "algorithms/test_td3.py"),
    Mutant("td3: smoothing not clipped", "algorithms/td3.py", "noise = jnp.clip(noise, -config.target_noise_clip, config.target_noise_clip)", "noise = 1.0 * noise", "algorithms/test_td3.py"),
    Mutant("td3: the mean loss of an actor that waits", "replay.py", "jax.tree.map(jnp.nanmean, metrics)", "jax.tree.map(jnp.mean, metrics)", "algorithms/test_td3.py"),
    Mutant("sac: the target without its entropy", "algorithms/sac.py", "targets, batch.next_obs, batch.next_action_mask, temperature, next_key)", "targets, batch.next_obs, batch.next_action_mask, 0.0, next_key)", "algorithms/test_sac.py"),
    Mutant("sac: the temperature runs away from its target", "algorithms/sac.py", 'of_actor["entropy"] - target_entropy', 'target_entropy - of_actor["entropy"]', "algorithms/test_sac.py"),
    Mutant("sac: entropy of all choices, legal or not", "algorithms/sac.py", "actor.head.out_features if action_mask is None else jnp.sum(action_mask, axis=-1)", "actor.head.out_features", "algorithms/test_sac.py"),
    Mutant("sac: the actor sees every successor's mask", "algorithms/sac.py", "batch.obs, batch.action_mask, temperature, own_key)", "batch.obs, batch.next_action_mask, temperature, own_key)", "algorithms/test_sac.py"),
    # Language models
    Mutant("tokens: the divergence's sign", "rlhf/ppo.py", "kl_k1(answers.log_prob, answers.ref_log_prob), 0.0)", "kl_k1(answers.ref_log_prob, answers.log_prob), 0.0)", "rlhf/test_policy_optimisation.py"),
    Mutant("tokens: the score comes with the first token", "rlhf/ppo.py", "last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))", "last = mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))", "rlhf/test_policy_optimisation.py"),
    Mutant("tokens: the value after a token", "rlhf/heads.py", "hidden[:, -num_responses - 1 : -1]", "hidden[:, -num_responses:]", "rlhf/test_token_mdp.py"),
    Mutant("tokens: each predicts itself", "rlhf/model.py", "hidden[:, length - 1 - scored : length - 1].reshape", "hidden[:, length - scored :].reshape", "rlhf/test_token_mdp.py"),
    Mutant("tokens: probabilities at temperature 1", "rlhf/ppo.py", "temperature=config.temperature, last=", "temperature=1.0, last=", "rlhf/test_policy_optimisation.py"),
    Mutant("tokens: every micro-batch has its own mean", "rlhf/ppo.py", "return loss / count, metrics\n\n        gradient, metrics", "return loss / jnp.sum(rows.valid), metrics\n\n        gradient, metrics", "rlhf/test_policy_optimisation.py"),
    Mutant("tokens: what cannot be scored is learned from", "rlhf/ppo.py", "valid = answers.response_mask & answers.counts[:, None]", "valid = answers.response_mask", "rlhf/test_policy_optimisation.py"),
    Mutant("tokens: a group's baseline has its own answer", "rlhf/ppo.py", "else leave_one_out_advantage\n", "else (lambda worth, counts: worth - jnp.mean(worth, axis=1, keepdims=True))\n", "rlhf/test_policy_optimisation.py"),
    Mutant("tokens: a price by the token", "rlhf/ppo.py", "axis=1, where=answers.response_mask)  # [B] nats", "axis=1, where=answers.response_mask) / config.max_new_tokens  # [B] nats", "rlhf/test_policy_optimisation.py"),
    Mutant("tokens: a step that is not finite is taken", "rlhf/optimisation.py", "old - jnp.where(fine, learning_rate * step, 0.0)", "old - learning_rate * step", "rlhf/test_policy_optimisation.py"),
    Mutant("reward model: read at the last column", "rlhf/heads.py", "last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)", "last = mask.shape[1] - 1 + 0 * jnp.argmax(mask[:, ::-1], axis=1)", "rlhf/test_runs.py"),
    Mutant("memory: moments forgotten", "rlhf/memory.py", "return self.trained + self.moments + self.frozen", "return self.trained + self.frozen", "rlhf/test_memory_plan.py"),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass although the line is broken."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(SOURCE, Path(directory) / "surefoot", ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(directory) / "surefoot" / mutant.file
        text = path.read_text()
        if text.count(mutant.line) != 1:
            raise ValueError(
                f"{mutant.name}: its line occurs {text.count(mutant.line)} times in {mutant.file}; write it as it stands there."
            )
        path.write_text(text.replace(mutant.line, mutant.broken))
        tests = [str(ROOT / "tests" / name) for name in mutant.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": directory}, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: a test failed; anything else says that no test was run
        raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    words = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not words or any(word.lower() in mutant.name.lower() for word in words)]
    survivors = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for mutant, alive in zip(chosen, threads.map(survives, chosen), strict=True):
            print(f"{'SURVIVES' if alive else 'found   '}  {mutant.name}", flush=True)
            survivors += [mutant.name] * alive
    print(f"{len(chosen)} lines broken, {len(survivors)} unnoticed" + "".join(f"\n  {name}" for name in survivors))
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
