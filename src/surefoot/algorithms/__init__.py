"""The registry of algorithms: a name, its configuration, and the three functions that are the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import nearest
from . import (
    a2c,
    a2c_trust_region,
    actor_critic,
    cem,
    ddpg,
    dqn,
    off_policy_actor_critic,
    ppo,
    ppo_penalty,
    q_learning,
    reinforce,
    sac,
    td3,
    trpo,
    trpo_penalty,
    vpg_adaptive,
)


class Algorithm(NamedTuple):
    """`init(config, spec, key) -> state`, whose `.acting` is what `act` needs; `act` and `update` as ARCHITECTURE.md has them."""

    name: str
    config: type
    init: Callable[..., Any]
    act: Callable[..., Any]
    update: Callable[..., Any]


ALGORITHMS = {
    "reinforce": Algorithm("reinforce", reinforce.REINFORCE, reinforce.init, reinforce.act, reinforce.update),
    "vpg-adaptive": Algorithm("vpg-adaptive", vpg_adaptive.VPGAdaptive, vpg_adaptive.init, vpg_adaptive.act, vpg_adaptive.update),
    "actor-critic": Algorithm("actor-critic", actor_critic.ActorCritic, actor_critic.init, actor_critic.act, actor_critic.update),
    "a2c": Algorithm("a2c", a2c.A2C, a2c.init, a2c.act, a2c.update),
    "a2c-trust-region": Algorithm(
        "a2c-trust-region", a2c_trust_region.A2CTrustRegion, a2c_trust_region.init, a2c_trust_region.act, a2c_trust_region.update
    ),
    "trpo": Algorithm("trpo", trpo.TRPO, trpo.init, trpo.act, trpo.update),
    "trpo-penalty": Algorithm("trpo-penalty", trpo_penalty.TRPOPenalty, trpo_penalty.init, trpo_penalty.act, trpo_penalty.update),
    "ppo-penalty": Algorithm("ppo-penalty", ppo_penalty.PPOPenalty, ppo_penalty.init, ppo_penalty.act, ppo_penalty.update),
    "ppo": Algorithm("ppo", ppo.PPO, ppo.init, ppo.act, ppo.update),
    "cem": Algorithm("cem", cem.CEM, cem.init, cem.act, cem.update),
    "q-learning": Algorithm("q-learning", q_learning.QLearning, q_learning.init, q_learning.act, q_learning.update),
    "off-policy-actor-critic": Algorithm(
        "off-policy-actor-critic",
        off_policy_actor_critic.OffPolicyActorCritic,
        off_policy_actor_critic.init,
        off_policy_actor_critic.act,
        off_policy_actor_critic.update,
    ),
    "dqn": Algorithm("dqn", dqn.DQN, dqn.init, dqn.act, dqn.update),
    "rainbow": Algorithm("rainbow", dqn.Rainbow, dqn.init, dqn.act, dqn.update),
    "ddpg": Algorithm("ddpg", ddpg.DDPG, ddpg.init, ddpg.act, ddpg.update),
    "td3": Algorithm("td3", td3.TD3, td3.init, td3.act, td3.update),
    "sac": Algorithm("sac", sac.SAC, sac.init, sac.act, sac.update),
}


def named(name: str) -> Algorithm:
    """The algorithm called `name`; ValueError with the nearest name otherwise."""
    if name not in ALGORITHMS:
        raise ValueError(f"There is no algorithm {name!r}{nearest(name, ALGORITHMS)} Algorithms: {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[name]


def of(config: Any) -> Algorithm:
    """The algorithm that `config` configures."""
    for algorithm in ALGORITHMS.values():
        if type(config) is algorithm.config:
            return algorithm
    names = ", ".join(algorithm.config.__name__ for algorithm in ALGORITHMS.values())
    raise ValueError(f"Expected a configuration ({names}), got {config!r}; write for example sf.PPO(clip=0.2).")
