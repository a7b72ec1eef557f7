"""One task as a Gymnasium environment and as text: the same advantages, targets and losses, by either path."""

from functools import partial

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surefoot as sf
from surefoot.algorithms import ppo as control
from surefoot.collect import HostCollector
from surefoot.envs.gymnasium import gymnasium_environment
from surefoot.estimates import estimate
from surefoot.policies import Actor, StochasticPolicy
from surefoot.policies import Critic as ControlCritic
from surefoot.rlhf import ppo as text
from surefoot.rlhf.heads import Critic, Head
from surefoot.rlhf.model import LanguageModel, ModelConfig, hidden_states, init_model

V, P, N, B = 5, 2, 4, 6
END, PRICE = 0, 0.25
CONFIG = ModelConfig(
    vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=16, max_positions=P + N
)
PROMPTS = np.array([[1, 2], [3, 4], [2, 2], [4, 1], [1, 1], [3, 2]], np.int32)
ANSWERS = np.array([[3, 1, 0, 0], [0, 0, 0, 0], [4, 4, 2, 1], [2, 3, 1, 0], [1, 0, 0, 0], [2, 2, 2, 2]], np.int32)  # two are cut


def score(answer):
    return float(np.sum(answer) - 3 * len(answer))


class Tokens(gymnasium.Env):
    """An observation is the text so far, -1 where there is none yet; an action is the next token; a divergence costs at every step."""

    observation_space = gymnasium.spaces.Box(-1, V - 1, (P + N,), np.int32)
    action_space = gymnasium.spaces.Discrete(V)

    def __init__(self, prompt, costs):
        self.prompt, self.costs = prompt, costs

    def observe(self):
        return np.concatenate([self.prompt, self.answer, np.full(N - len(self.answer), -1)]).astype(np.int32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.answer = []
        return self.observe(), {}

    def step(self, action):
        self.answer.append(int(action))
        ended = action == END or len(self.answer) == N
        reward = -PRICE * self.costs[len(self.answer) - 1] + (score(self.answer) if ended else 0.0)
        return self.observe(), reward, ended, False, {}


class Reader(eqx.Module):
    """A language model as a torso: what it makes of the last token of an observation."""

    model: LanguageModel

    def __init__(self, observation_space, key):
        self.model = init_model(CONFIG, key)

    def __call__(self, obs):
        mask = obs >= 0
        hidden = hidden_states(self.model, jnp.maximum(obs, 0)[None], mask[None])[0]
        return hidden[jnp.sum(mask) - 1]


def large(key):
    return jax.tree.map(lambda x: 4.0 * x, init_model(CONFIG, jax.random.key(key)))


@pytest.fixture(scope="module")
def both():
    """The task by both paths: (policy, critic, estimates, rollout) and (settings, critic, answers)."""
    policy_model, reference, critic_model = large(0), large(1), large(2)
    value_head = 0.3 * jax.random.normal(jax.random.key(3), (16,))
    # As text.
    config = text.PPO(num_prompts=B, minibatch_size=B, max_new_tokens=N, gamma=0.9, gae_lambda=0.8, kl_coef=PRICE, entropy_coef=0.02)
    tokens = np.concatenate([PROMPTS, ANSWERS], axis=1)
    ends = [int(np.argmax(answer == END)) + 1 if END in answer else N for answer in ANSWERS]
    response_mask = np.arange(N) < np.array(ends)[:, None]
    mask = np.concatenate([np.ones((B, P), bool), response_mask], axis=1)
    scores = [score(answer[:end]) for answer, end in zip(ANSWERS, ends, strict=True)]
    log_prob, ref_log_prob = (text.log_probs(config, model, tokens, mask)[0] for model in (policy_model, reference))
    critic = Critic(critic_model, Head(value_head, jnp.zeros(())))
    value = text.values(None, critic, tokens, mask, N)
    answers = text.Answers(tokens, mask, response_mask, np.float32(scores), np.ones(B, bool), log_prob, ref_log_prob, value)
    # As an environment, played by a script.
    costs = np.asarray(log_prob - ref_log_prob)
    waiting = iter(zip(PROMPTS, costs, strict=True))
    environment = gymnasium_environment(lambda: Tokens(*next(waiting)), B)
    script = jnp.asarray(ANSWERS)

    def act(acting, obs, action_mask, carry, key):
        return jnp.take_along_axis(acting, jnp.minimum(jnp.sum(obs[:, P:] >= 0, axis=1), N - 1)[:, None], axis=1)[:, 0], carry

    rollout = HostCollector(environment, act, N, 0).collect(script, 0.0, jax.random.key(0))
    environment.close()
    # Streams that have ended go on with an episode of their own, which text has not.
    rollout = rollout._replace(valid=response_mask.T)
    network, shape = sf.PPO(network=Reader).network, {"hidden": (), "activation": "tanh"}
    actor = Actor(network, Tokens.observation_space, Tokens.action_space, jax.random.key(0), **shape)
    actor = eqx.tree_at(
        lambda actor: (actor.torso.model, actor.head.weight, actor.head.bias), actor, (policy_model, policy_model.head, jnp.zeros(V))
    )
    judge = ControlCritic(network, Tokens.observation_space, jax.random.key(0), **shape)
    judge = eqx.tree_at(lambda judge: (judge.torso.model, judge.head.weight), judge, (critic_model, value_head[None]))
    policy = StochasticPolicy(actor, None)
    settings = sf.PPO(gamma=0.9, gae_lambda=0.8, entropy_coef=0.02, clip_value=0.2, normalise_observation=False, normalise_reward=False)
    estimates = jax.jit(partial(estimate, settings))(policy, judge, None, rollout)
    return (settings, policy, judge, estimates, rollout), (config, critic, answers)


def test_rewards_advantages_and_targets_are_the_same(both):
    (_, _, _, estimates, rollout), (config, _, answers) = both
    advantage, target = text.advantages(config, jnp.float32(PRICE), answers)
    valid = answers.response_mask
    np.testing.assert_array_equal(rollout.action.T[valid], answers.tokens[:, P:][valid])
    np.testing.assert_allclose(estimates.value.T[valid], answers.value[valid], atol=1e-5)
    np.testing.assert_allclose(estimates.advantage.T[valid], advantage[valid], atol=1e-4)
    np.testing.assert_allclose(estimates.value_target.T[valid], target[valid], atol=1e-4)
    assert np.abs(np.asarray(advantage)[valid]).max() > 1


def test_losses_and_their_gradients_are_the_same(both):
    (settings, policy, judge, estimates, rollout), (config, critic, answers) = both
    valid, count = answers.response_mask, answers.response_mask.sum()
    batch = control.Batch(
        inputs=estimates.inputs,
        action=rollout.action,
        old_log_prob=estimates.old.log_prob(rollout.action) - 0.1,  # so that ratios are not 1
        old_value=estimates.value + 0.1,
        advantage=estimates.advantage,
        value_target=estimates.value_target,
        valid=rollout.valid,
    )
    by_control, of_control = jax.jit(jax.grad(partial(control.loss, batch=batch, clip=0.2, config=settings), has_aux=True))(
        (policy.actor, judge)
    )
    advantage, target = text.advantages(config, jnp.float32(PRICE), answers)
    shifted = answers._replace(log_prob=answers.log_prob - 0.1, value=answers.value + 0.1)
    judged = text.Judged(shifted, valid, text.standardise(advantage, valid), target)

    def actor_loss(model):
        loss, metrics = text.policy_loss(config, jnp.float32(0.0), *text.log_probs(config, model, answers.tokens, answers.mask), judged)
        return loss / count, metrics

    def critic_loss(critic):
        value = text.values(None, critic, answers.tokens, answers.mask, N)
        return jnp.sum(text.clipped_value_loss(value, shifted.value, target, clip=0.2), where=valid) / count

    by_text, of_text = jax.jit(jax.grad(actor_loss, has_aux=True))(policy.actor.torso.model)
    for_values = jax.jit(jax.grad(critic_loss))(critic)
    entropy = jnp.mean(text.log_probs(config, policy.actor.torso.model, answers.tokens, answers.mask)[1], where=valid)
    np.testing.assert_allclose(of_text["policy_loss"] / count, of_control["policy_loss"] - 0.02 * entropy, rtol=1e-4)
    assert of_text["clip_fraction"] / count == pytest.approx(float(of_control["clip_fraction"]))
    # As text the head is in the model; as an environment it stands on top.
    of_model, of_head = by_control[0].torso.model, by_control[0].head.weight
    np.testing.assert_allclose(by_text.head, of_head, atol=1e-5)
    for a, b in zip(jax.tree.leaves(by_text.layers), jax.tree.leaves(of_model.layers), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(for_values.head.weight, by_control[1].head.weight[0] / settings.value_coef, atol=1e-4)
    for a, b in zip(jax.tree.leaves(for_values.backbone.layers), jax.tree.leaves(by_control[1].torso.model.layers), strict=True):
        np.testing.assert_allclose(a, b / settings.value_coef, atol=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(by_text.layers)) > 1e-2
