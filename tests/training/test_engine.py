"""How the engines compile an update: what depends on the size of the networks and not on the algorithm."""

from functools import partial

import jax
import pytest

from surefoot.algorithms.dqn import DQN
from surefoot.algorithms.dqn import init as init_dqn
from surefoot.envs import make
from surefoot.training import engine
from surefoot.training.engine import DeviceEngine, HostEngine, compiler_options

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says how operations are scheduled on a CPU")
SEQUENTIAL = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@pytest.mark.parametrize(("hidden", "options"), [((64, 64), SEQUENTIAL), ((128, 127), SEQUENTIAL), ((128, 128), {})])
def test_only_large_layers_are_worth_more_than_one_thread(hidden, options):
    _, spec = make("CartPole-v1", 2)
    learner = jax.eval_shape(partial(init_dqn, DQN(hidden=hidden), spec), jax.random.key(0))
    assert max(leaf.size for leaf in jax.tree.leaves(learner.replay.rows)) > engine.LARGE  # which is not a layer
    assert compiler_options(learner.acting) == options


@pytest.mark.parametrize("env", ["CartPole-v1", "gymnasium:CartPole-v1"])
def test_an_engine_compiles_by_the_networks_that_act(env, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "compiler_options", lambda acting: asked.append(acting) or {})
    environment, spec = make(env, 2)
    kind = DeviceEngine if env == "CartPole-v1" else HostEngine
    built = kind(DQN(hidden=(8,), num_steps=2, replay_size=100, learning_starts=4), environment, spec, seed=0, total_steps=8)
    assert asked == [built.learner.acting]
