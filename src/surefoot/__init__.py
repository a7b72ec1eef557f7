"""Surefoot: policy optimisation where every step is measured against its trust region."""

from importlib.metadata import version

from .algorithms.a2c import A2C
from .algorithms.a2c_trust_region import A2CTrustRegion
from .algorithms.actor_critic import ActorCritic
from .algorithms.cem import CEM
from .algorithms.ddpg import DDPG
from .algorithms.dqn import DQN, Rainbow
from .algorithms.off_policy_actor_critic import OffPolicyActorCritic
from .algorithms.ppo import PPO
from .algorithms.ppo_penalty import PPOPenalty
from .algorithms.q_learning import QLearning
from .algorithms.reinforce import REINFORCE
from .algorithms.sac import SAC
from .algorithms.td3 import TD3
from .algorithms.trpo import TRPO
from .algorithms.trpo_penalty import TRPOPenalty
from .algorithms.vpg_adaptive import VPGAdaptive
from .api import Run, iterate, load, resume, train
from .training.checkpoint import CheckpointError
from .training.engine import NonFiniteError
from .training.session import Report
from .training.signals import Stopped

__version__ = version("surefoot")
__all__ = [
    "A2C",
    "CEM",
    "DDPG",
    "DQN",
    "PPO",
    "REINFORCE",
    "SAC",
    "TD3",
    "TRPO",
    "A2CTrustRegion",
    "ActorCritic",
    "CheckpointError",
    "NonFiniteError",
    "OffPolicyActorCritic",
    "PPOPenalty",
    "QLearning",
    "Rainbow",
    "Report",
    "Run",
    "Stopped",
    "TRPOPenalty",
    "VPGAdaptive",
    "iterate",
    "load",
    "resume",
    "train",
]
