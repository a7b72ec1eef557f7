"""PPO, RLOO and GRPO on tokens: what each answer teaches, however its batch is divided, and what must not be learned from."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from surefoot.math.divergences import kl_k2
from surefoot.rlhf import ppo
from surefoot.rlhf.heads import Critic, zero_head
from surefoot.rlhf.model import ModelConfig, hidden_states, init_model, logits_of
from surefoot.rlhf.optimisation import adam, gradient_step, map_rows, model_of, summed_gradient
from surefoot.rlhf.ppo import GRPO, PPO, RLOO, Answers, Frozen
from surefoot.training.cache import use_compilation_cache

use_compilation_cache()
B, P, N, V = 8, 3, 5, 12
CONFIG = ModelConfig(
    vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=16, max_positions=16
)
SHARED = {"max_new_tokens": N, "minibatch_size": B, "learning_rate": 1e-3}
CONFIGS = {
    "ppo": PPO(**SHARED, num_prompts=B, critic_learning_rate=1e-3, epochs=2),
    "rloo": RLOO(**SHARED, num_prompts=2, group_size=4),
    "grpo": GRPO(**SHARED, num_prompts=2, group_size=4),
}


@cache
def models():
    """(policy, reference, a model for the critic), all different."""
    return tuple(jax.tree.map(lambda x: 4.0 * x, init_model(CONFIG, jax.random.key(seed))) for seed in range(3))


@cache
def scored(config):
    """Log-probabilities and values, compiled as in a run."""
    log_probs = jax.jit(lambda model, tokens, mask: map_rows(config, lambda x: ppo.log_probs(config, model, *x)[0], (tokens, mask)))
    values = jax.jit(lambda critic, tokens, mask: ppo.values(None, critic, tokens, mask, N))
    return log_probs, values


def head(seed):
    return dataclasses.replace(zero_head(16), weight=0.5 * jax.random.normal(jax.random.key(seed), (16,)))


@cache
def answers_of(config):
    """Random answers of 1 to N tokens to prompts of 1 to P."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, P + N)).astype(np.int32)
    prompt, length = rng.integers(1, P + 1, B), np.array([1, 2, 3, 4, 5, 5, 2, 3])
    column = np.arange(P + N)
    mask = (column >= P - prompt[:, None]) & (column < P + length[:, None])
    policy, reference, other = models()
    log_probs, values = scored(config)
    return Answers(
        tokens=tokens,
        mask=mask,
        response_mask=mask[:, P:],
        score=rng.normal(size=B).astype(np.float32),
        counts=np.ones(B, bool),
        log_prob=log_probs(policy, tokens, mask),
        ref_log_prob=log_probs(reference, tokens, mask),
        value=values(Critic(other, head(3)), tokens, mask) if isinstance(config, PPO) else None,
    )


@cache
def compiled(config):
    return jax.jit(partial(ppo.update, config)), jax.jit(partial(ppo.init, config))


def updated(config, answers, **changes):
    policy, reference, other = models()
    update, init = compiled(config)
    state = init(policy, other, jax.random.key(0))
    if isinstance(config, PPO):
        state = state._replace(critic=Critic(state.critic.backbone, head(3)))
    return state, update(state._replace(**changes), answers, Frozen(reference, None), jax.random.key(1), jnp.float32(0.5))


def same(x, y):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def test_equal_weights_have_equal_log_probabilities_and_a_ratio_of_one_where_they_are_learned():
    config = CONFIGS["ppo"]
    policy = models()[0]
    answers, log_probs = answers_of(config), scored(config)[0]
    copy = jax.tree.map(lambda x: x + 0, policy)
    np.testing.assert_array_equal(log_probs(copy, answers.tokens, answers.mask), answers.log_prob)

    def worst(model, rows):
        log_prob, _ = ppo.log_probs(config, model, rows.tokens, rows.mask)
        ratio = jnp.exp(log_prob - rows.log_prob)
        return jnp.sum(ratio, where=rows.response_mask), {"off": jnp.max(jnp.abs(ratio - 1.0), where=rows.response_mask, initial=0.0)}

    _, metrics = jax.jit(partial(summed_gradient, config, worst))(policy, answers)
    assert metrics["off"] <= 2e-6


def test_log_probabilities_are_of_each_token_given_those_before_it_at_the_temperature_of_sampling():
    config = dataclasses.replace(CONFIGS["ppo"], temperature=0.7)
    answers, policy = answers_of(CONFIGS["ppo"]), models()[0]
    log_prob, entropy = jax.jit(partial(ppo.log_probs, config))(policy, answers.tokens, answers.mask)
    for b in (0, 3, 4):
        real = answers.tokens[b][answers.mask[b]]
        logits = logits_of(policy, hidden_states(policy, real[None], np.ones((1, len(real)), bool)))[0]
        log_probs = jax.nn.log_softmax(logits / 0.7)
        length = int(answers.response_mask[b].sum())
        expected = [log_probs[len(real) - length + t - 1, real[len(real) - length + t]] for t in range(length)]
        np.testing.assert_allclose(log_prob[b, :length], expected, atol=1e-5)
        spread = -np.sum(np.exp(log_probs) * log_probs, axis=-1)[len(real) - length - 1 : -1]
        np.testing.assert_allclose(entropy[b, :length], spread, atol=1e-5)
        assert not np.any(log_prob[b, length:])


def test_a_value_is_of_the_state_before_its_token():
    answers, critic = answers_of(CONFIGS["ppo"]), Critic(models()[2], head(3))
    for b, t in ((0, 0), (4, 0), (4, 4), (5, 2)):
        seen = answers.mask[b, : P + t]
        before = answers.tokens[b, : P + t][seen]
        hidden = hidden_states(critic.backbone, before[None], np.ones((1, len(before)), bool))
        np.testing.assert_allclose(answers.value[b, t], critic.head(hidden)[0, -1], atol=1e-5)


def test_without_a_critic_s_opinion_each_token_s_advantage_is_the_score_less_the_divergence_to_go():
    config = dataclasses.replace(CONFIGS["ppo"], gae_lambda=1.0)
    answers = answers_of(CONFIGS["ppo"])._replace(value=jnp.zeros((B, N)))
    advantage, target = ppo.advantages(config, jnp.float32(0.3), answers)
    kl = np.where(answers.response_mask, answers.log_prob - answers.ref_log_prob, 0.0)
    expected = answers.score[:, None] - 0.3 * np.cumsum(kl[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(np.where(answers.response_mask, advantage - expected, 0.0), 0.0, atol=1e-5)
    np.testing.assert_array_equal(advantage, target)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_answers_to_one_prompt_are_each_other_s_baseline(name):
    config = dataclasses.replace(CONFIGS[name], kl_as="reward")
    answers = answers_of(CONFIGS[name])._replace(counts=np.array([True] * 3 + [False] + [True] * 4))
    advantage, target = ppo.advantages(config, jnp.float32(0.3), answers)
    assert target is None
    kl = np.sum(answers.log_prob - answers.ref_log_prob, axis=1, where=answers.response_mask)
    worth = np.asarray(answers.score - 0.3 * kl)
    for group in (slice(0, 3), slice(4, 8)):
        mine = worth[group]
        others = [np.delete(mine, i).mean() for i in range(len(mine))]
        expected = mine - others if name == "rloo" else (mine - mine.mean()) / mine.std()
        np.testing.assert_allclose(advantage[group], np.repeat(expected[:, None], N, axis=1), rtol=1e-4)
    np.testing.assert_array_equal(advantage[3], 0.0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_does_not_depend_on_how_answers_are_divided(size):
    answers, policy = answers_of(CONFIGS["ppo"]), models()[1]

    def gradient(config):
        def loss(model, rows):
            log_prob, _ = ppo.log_probs(config, model, rows.tokens, rows.mask)
            return -jnp.sum(rows.score[:, None] * log_prob, where=rows.response_mask) / answers.response_mask.sum(), {}

        return jax.jit(partial(summed_gradient, config, loss))(policy, answers)[0]

    whole = gradient(CONFIGS["ppo"])
    parts = gradient(dataclasses.replace(CONFIGS["ppo"], micro_batch_size=size))
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, whole, parts)) / optax.tree.norm(whole)
    assert optax.tree.norm(whole) > 0
    assert apart < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_an_iteration_in_micro_batches_is_the_same_iteration(name):
    _, (whole, metrics) = updated(CONFIGS[name], answers_of(CONFIGS[name]))
    divided = dataclasses.replace(CONFIGS[name], micro_batch_size=2)
    _, (parts, of_parts) = updated(divided, answers_of(CONFIGS[name]))
    for metric, value in metrics.items():
        np.testing.assert_allclose(of_parts[metric], value, rtol=2e-3, atol=1e-5, err_msg=metric)
    for a, b in zip(jax.tree.leaves(whole.actor), jax.tree.leaves(parts.actor), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_that_does_not_count_leaves_no_trace(name):
    config, answers = CONFIGS[name], answers_of(CONFIGS[name])
    counts = np.arange(B) != 2
    noisy = answers._replace(
        counts=counts,
        score=np.where(counts, answers.score, 1e6).astype(np.float32),
        log_prob=jnp.where(counts[:, None], answers.log_prob, answers.log_prob + 1.0),
    )
    _, (with_noise, _) = updated(config, noisy)
    _, (without, _) = updated(config, answers._replace(counts=counts))
    assert same(with_noise.actor, without.actor)
    _, (counted, _) = updated(config, answers)
    assert not same(with_noise.actor, counted.actor)


@pytest.mark.parametrize("name", CONFIGS)
def test_where_nothing_counts_nothing_moves(name):
    state, (moved, metrics) = updated(CONFIGS[name], answers_of(CONFIGS[name])._replace(counts=np.zeros(B, bool)))
    assert same(moved.actor, state.actor)
    assert metrics["gradient_norm"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_would_not_be_finite_is_not_taken(name):
    answers = answers_of(CONFIGS[name])
    answers = answers._replace(score=np.where(np.arange(B) == 1, np.float32(np.nan), answers.score))
    state, (after, metrics) = updated(CONFIGS[name], answers)
    assert not metrics["finite"]
    assert same(after, state)


def test_the_divergence_as_a_loss_has_its_own_gradient_and_its_price():
    config = CONFIGS["grpo"]
    assert config.kl_as == "loss"
    answers, policy = answers_of(config), models()[0]
    judged = ppo.Judged(answers, answers.response_mask, jnp.zeros((B, N)), None)

    def loss(model, price):
        log_prob, entropy = ppo.log_probs(config, model, answers.tokens, answers.mask)
        return ppo.policy_loss(config, price, log_prob, entropy, judged)[0]

    def divergence(model):
        log_prob, _ = ppo.log_probs(config, model, answers.tokens, answers.mask)
        return jnp.sum(kl_k2(log_prob, answers.ref_log_prob), where=answers.response_mask)

    with_price, without = (jax.grad(loss)(policy, price) for price in (0.7, 0.0))
    expected = jax.grad(lambda model: 0.7 * divergence(model))(policy)
    for a, b, c in zip(*map(jax.tree.leaves, (with_price, without, expected)), strict=True):
        np.testing.assert_allclose(a - b, c, rtol=1e-3, atol=1e-5)


def test_the_price_adapts_to_the_divergence_of_whole_answers_and_is_part_of_the_state():
    config = dataclasses.replace(CONFIGS["ppo"], kl_target=4.0, kl_horizon=80, kl_coef=0.5)
    answers = answers_of(CONFIGS["ppo"])
    _, (state, metrics) = updated(config, answers)
    kl = np.sum(answers.log_prob - answers.ref_log_prob, axis=1, where=answers.response_mask).mean()
    np.testing.assert_allclose(metrics["reference_kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(state.kl_coef, 0.5 * (1 + B / 80 * np.clip(kl / 4.0 - 1, -0.2, 0.2)), rtol=1e-5)
    _, (fixed, _) = updated(CONFIGS["ppo"], answers)
    assert fixed.kl_coef == np.float32(CONFIGS["ppo"].kl_coef)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_promises_what_its_ratios_say(name):
    config, answers = CONFIGS[name], answers_of(CONFIGS[name])
    _, (state, metrics) = updated(config, answers)
    advantage, _ = ppo.advantages(config, jnp.float32(config.kl_coef), answers)
    log_prob = scored(config)[0](model_of(None, state.actor), answers.tokens, answers.mask)
    ratio = np.exp(np.asarray(log_prob - answers.log_prob))
    promise = np.sum((ratio - 1) * advantage, axis=1, where=answers.response_mask)
    np.testing.assert_allclose(metrics["predicted_improvement"], promise.mean(), rtol=1e-3, atol=1e-6)
    assert metrics["predicted_improvement"] > 0
    np.testing.assert_allclose(metrics["ratio_max"], ratio[answers.response_mask].max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_min"], ratio[answers.response_mask].min(), rtol=1e-5)


def test_adapters_begin_as_the_reference_and_leave_it_alone():
    config = dataclasses.replace(CONFIGS["ppo"], lora_rank=2)
    policy, _, other = models()
    update, init = compiled(config)
    state, frozen = init(policy, other, jax.random.key(0)), Frozen(policy, other)
    log_probs = jax.jit(lambda trained, tokens, mask: ppo.log_probs(config, model_of(policy, trained), tokens, mask)[0])
    answers = answers_of(CONFIGS["ppo"])
    nothing = jax.tree.map(jnp.zeros_like, state.actor)
    at_first, reference = (log_probs(x, answers.tokens, answers.mask) for x in (state.actor, nothing))
    np.testing.assert_array_equal(at_first, reference)
    np.testing.assert_allclose(reference, answers.log_prob, atol=1e-5)
    after, _ = update(state, answers._replace(log_prob=at_first, ref_log_prob=reference), frozen, jax.random.key(1), jnp.float32(0.5))
    assert not same(after.actor, state.actor)
    assert np.abs(log_probs(after.actor, answers.tokens, answers.mask) - reference).max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PPO, {"minibatch_size": 48}, "minibatch_size=48 does not divide the 64 answers"),
        (PPO, {"micro_batch_size": 48}, "micro_batch_size=48 does not divide minibatch_size=64"),
        (PPO, {"kl_horizon": 5}, "kl_horizon is for kl_target only"),
        (PPO, {"lora_alpha": 5.0}, "lora_alpha is for lora_rank above 0 only"),
        (GRPO, {"group_size": 1}, "a group of 1 has no baseline"),
        (RLOO, {"critic_learning_rate": 1.0}, "RLOO has no setting 'critic_learning_rate', did you mean 'learning_rate'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_along_a_gradient_that_is_not_finite_is_not_taken(bad):
    config, parameters = ppo.PPO(learning_rate=0.1), {"a": jnp.arange(3.0), "b": jnp.ones(2)}
    moments = adam(config).init(parameters)
    good = jax.tree.map(jnp.ones_like, parameters)
    for gradient, is_taken in ((good, True), (good | {"a": jnp.array([1.0, bad, 1.0])}, False)):
        moved, after, norm = jax.jit(lambda gradient: gradient_step(gradient, parameters, moments, adam(config), jnp.float32(0.1)))(
            gradient
        )
        assert bool(jnp.isfinite(norm)) == is_taken
        for new, old in zip(jax.tree.leaves((moved, after)), jax.tree.leaves((parameters, moments)), strict=True):
            assert np.array_equal(new, old) != is_taken
