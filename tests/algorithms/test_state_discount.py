"""state_discount: with it the first gradient of every method on a batch is that of the discounted return, summed over all trajectories."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from batches import Table, ValueTable, oracle_rollout, table_spec
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import named
from surefoot.critics import critic_optimiser
from surefoot.math.returns import gae
from surefoot.minibatches import clipped_adam
from surefoot.policies import StochasticPolicy

pytestmark = pytest.mark.usefixtures("x64")

S, A, H = 3, 2, 3
D = S * A
RNG = np.random.default_rng(0)
# Every action leads to one state, and the policy is uniform: all trajectories are equally likely, and a batch of each once is the mean.
MDP = oracle.MDP(
    transition=np.eye(S)[RNG.integers(S, size=(S, A))],
    reward=RNG.uniform(-3.0, 3.0, size=(S, A, S)),
    start=np.full(S, 1 / S),
    terminal=np.zeros(S, bool),
    horizon=H,
    discount=0.5,
)
ROLLOUT = oracle_rollout(MDP, oracle.trajectories(MDP))
N = ROLLOUT.time.shape[1]
BATCH = {"num_steps": H, "minibatch_size": H * N}
TOGETHER = {"max_grad_norm": np.inf, "entropy_coef": 0.0}  # one gradient for actor and critic
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": BATCH | TOGETHER | {"epochs": 1},
    "ppo-penalty": BATCH | TOGETHER | {"epochs": 1},
    "a2c": TOGETHER | {"num_steps": H, "optimiser": "adam"},
    "a2c-trust-region": TOGETHER | {"num_steps": H, "optimiser": "adam", "max_kl_slope": np.inf},
    "vpg-adaptive": BATCH,
    "actor-critic": {"num_steps": H, "fit_first": False},
    "actor-critic, control variate": {"num_steps": H, "fit_first": False, "critic": "both", "control_variate": True},
    "trpo": BATCH,
    "trpo-penalty": BATCH | {"inner_steps": 1},
}
NEVER_NORMALISED = "actor-critic", "actor-critic, control variate"
ALWAYS_NORMALISED = "trpo", "trpo-penalty"


class ActionTable(eqx.Module):
    values: jax.Array

    def __call__(self, obs: jax.Array, features: Any) -> jax.Array:
        return self.values[obs]


def values() -> jax.Array:
    """[H + 1, S]"""
    return oracle.values(MDP, jnp.zeros((S, A)))[0]


def first_state(name: str, config: Any) -> Any:
    """A uniform policy, exact values of states, and any values of actions."""
    actor, critic = Table(jnp.zeros((S, A))), ValueTable(values().ravel())
    action_critic = ActionTable(jnp.asarray(np.random.default_rng(3).normal(size=(len(critic.values), A))))
    state = named(name).init(config, table_spec(len(critic.values), A, N), jax.random.key(0))
    new = {"acting": StochasticPolicy(actor, None), "critic": critic, "average": actor}
    new["optimiser"] = optax.scale_by_adam().init(jnp.zeros(D))
    if hasattr(config, "max_grad_norm"):
        new["optimiser"] = clipped_adam(config).init(ravel_pytree((actor, critic))[0])
    else:
        new["critic_optimiser"] = critic_optimiser(config, critic)
    if getattr(state, "action_critic", None) is not None:
        new |= {"action_critic": action_critic, "action_critic_optimiser": critic_optimiser(config, action_critic)}
    return state._replace(**{field: value for field, value in new.items() if hasattr(state, field)})


def ascent(name: str, **settings: Any) -> Any:
    """The gradient of the first step of an iteration; of a method that keeps no moments of it, the norm."""
    algorithm = named(name.partition(",")[0])
    shared = {"gamma": MDP.discount, "normalise_reward": False, "normalise_observation": False}
    config = algorithm.config(**shared | SETTINGS[name] | settings)
    update = jax.jit(lambda state, rollout: algorithm.update(config, state, rollout, None, jax.random.key(0)))
    after, metrics = update(first_state(algorithm.name, config), ROLLOUT)
    if not hasattr(after, "optimiser"):
        return metrics["gradient_norm"]
    moments = after.optimiser if hasattr(after.optimiser, "mu") else after.optimiser[1]
    return -10.0 * moments.mu[:D]  # the first moment of Adam, begun anew, is a tenth of the gradient


def expected(name: str) -> Any:
    """The gradient of the discounted return as a mean over the steps of an episode; its norm where `ascent` gives that."""
    gradient = oracle.objective_gradient(MDP, jnp.zeros((S, A))) / H
    return jnp.linalg.norm(gradient) if name in ALWAYS_NORMALISED else gradient


def spread() -> float:
    """Standard deviation of the batch's advantages: what normalisation divides by. The mean that it subtracts has no gradient."""
    rows = ROLLOUT.reward, values().ravel()[ROLLOUT.obs], values().ravel()[ROLLOUT.final_obs]
    return float(jnp.std(gae(*rows, ROLLOUT.terminated, ROLLOUT.truncated, discount=MDP.discount, gae_lambda=0.95)))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ALWAYS_NORMALISED])
def test_the_gradient_is_that_of_the_discounted_return(name: str) -> None:
    plain = {} if name in NEVER_NORMALISED else {"normalise_advantage": False}
    np.testing.assert_allclose(ascent(name, state_discount=True, **plain), expected(name), **TOLERANCE)


@pytest.mark.parametrize("name", ["ppo", *ALWAYS_NORMALISED])
def test_of_normalised_advantages_it_is_a_multiple_of_that(name: str) -> None:
    gradient = ascent(name, state_discount=True)
    np.testing.assert_allclose(gradient * (spread() + 1e-8), expected(name), **TOLERANCE)


def test_without_it_the_gradient_is_another_one() -> None:
    assert np.max(np.abs(ascent("ppo", normalise_advantage=False) - expected("ppo"))) > 0.01
