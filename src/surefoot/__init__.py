"""Surefoot: policy optimisation where every step is measured against its trust region."""

from importlib.metadata import version

from .algorithms.ppo import PPO
from .api import Run, iterate, load, resume, train
from .training.checkpoint import CheckpointError
from .training.engine import NonFiniteError
from .training.session import Report
from .training.signals import Stopped

__version__ = version("surefoot")
__all__ = ["PPO", "CheckpointError", "NonFiniteError", "Report", "Run", "Stopped", "iterate", "load", "resume", "train"]
