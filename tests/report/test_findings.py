"""What stands out is said, and what does not is not."""

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiBinary

from surefoot.algorithms import ALGORITHMS
from surefoot.report.findings import findings
from surefoot.training.policy import describe
from surefoot.types import EnvironmentSpec

TWO, ARM = Discrete(2), Box(-1.0, 1.0, (3,), np.float32)
QUIET = {
    "kl": [0.01] * 8,
    "effective_sample_size": [0.9] * 8,
    "step_scale": [1.0] * 8,
    "clip_fraction": [0.1] * 8,
    "entropy": [0.5] * 8,
    "explained_variance": [0.7] * 8,
    "episode_return": [10.0 * i for i in range(8)],
    "episodes": [200.0] * 8,
}


def found(algorithm="ppo", space=TWO, config=None, **metrics):
    """What is found in a run in which nothing stands out but these metrics."""
    made = ALGORITHMS[algorithm].config(**(config or {}))
    record = describe(made, EnvironmentSpec("CartPole-v1", Box(-1.0, 1.0, (2,), np.float32), space, 8, False))
    values = {name: np.array(value, float) for name, value in ({"step": range(100, 900, 100)} | QUIET | metrics).items()}
    return [" ".join(finding) for finding in findings(record, values)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kl", [0.0, 0.005])
def test_of_an_ordinary_run_nothing_is_said(algorithm, kl):
    assert found(algorithm, kl=[kl] * 8) == []


def test_metrics_that_are_missing_or_unknown_are_no_findings():
    for name in QUIET.keys() - {"episode_return"}:
        assert found(**{name: [np.nan] * 8}) == []


@pytest.mark.parametrize(
    ("algorithm", "config", "metrics", "expected"),
    [
        ("trpo", {}, {"kl": [0.0] * 6 + [0.04, 0.06]}, ["5.0 times as far as max_kl = 0.01", "Shorten the steps: lower the step size."]),
        ("trpo", {}, {"kl": [0.05] * 8, "constrained_kl": [0.009] * 8}, ["step itself keeps to it", "longer batch (num_steps)"]),
        ("trpo", {}, {"kl": [0.05] * 8, "constrained_kl": [0.05] * 8}, ["5.0 times", "lower the step size"]),
        ("ppo", {"target_kl": 0.02}, {"kl": [0.08] * 8}, ["4.0 times as far as target_kl = 0.02", "lower learning_rate or epochs"]),
        ("ppo", {}, {"kl": [0.3] * 8}, ["Steps are long: lately a KL divergence of 0.3 nats", "lower learning_rate or epochs"]),
        ("a2c", {}, {"effective_sample_size": [0.9] * 6 + [0.4, 0.025]}, ["In 25% of the steps", "once only 2.5%", "lower learning_rate."]),
        ("trpo", {}, {"effective_sample_size": [0.4] * 8}, ["In 100% of the steps", "lower max_kl"]),
        ("trpo", {}, {"step_scale": [1, 1, 1, 1, 0, 1, 1, 0]}, ["In 25% of the iterations the line search accepted no step", "cg_damping"]),
        ("ppo", {}, {"clip_fraction": [0.6] * 8}, ["Lately 60% of the batch leave the clip range", "lower learning_rate or epochs"]),
        ("ppo", {}, {"entropy": [0.5] * 6 + [0.01] * 2}, ["entropy of 0.01 of at most 0.69 nats", "raise entropy_coef, so"]),
        ("trpo", {}, {"entropy": [0.01] * 8}, ["almost deterministic", "take shorter steps"]),
        ("ppo", {}, {"explained_variance": [0.9] * 6 + [-0.5] * 2}, ["explained variance of -0.50", "raise value_coef."]),
        ("trpo", {}, {"explained_variance": [-0.1] * 8}, ["raise critic_epochs or critic_learning_rate."]),
        ("ppo", {}, {"episode_return": [0, 100, 400, 300, 200, 100, 100, 100]}, ["fell from 400 at step 300 to 100", "Shorten"]),
        ("ppo", {}, {"episode_return": [np.nan] * 8}, ["No episode has ended", "time limit"]),
        ("sac", {}, {"entropy": [0.01] * 8}, ["almost deterministic", "raise target_entropy, so"]),
        ("sac", {"temperature": 0.2}, {"entropy": [0.01] * 8}, ["almost deterministic", "raise temperature, so"]),
        ("dqn", {}, {"episode_return": [0, 100, 400, 300, 200, 100, 100, 100]}, ["fell from 400", "lower learning_rate."]),
        ("q-learning", {}, {"episode_return": [0, 100, 400, 300, 200, 100, 100, 100]}, ["fell from 400", "lower learning_rate."]),
        ("td3", {}, {"episode_return": [0, 100, 400, 300, 200, 100, 100, 100]}, ["fell from 400", "lower actor_learning_rate."]),
    ],
)
def test_what_stands_out_is_said_once_with_what_to_do(algorithm, config, metrics, expected):
    (sentence,) = found(algorithm, config=config, **metrics)
    for words in expected:
        assert words in sentence
    named = {name for name in ("learning_rate", "epochs", "max_kl", "target_kl", "entropy_coef", "value_coef") if name in sentence.split()}
    assert all(hasattr(ALGORITHMS[algorithm].config(), name) for name in named)


@pytest.mark.parametrize(
    "metrics",
    [
        {"kl": [5.0] * 4 + [0.01] * 4},
        {"effective_sample_size": [0.51] * 8},
        {"explained_variance": [-9.0] * 5 + [0.1] * 3},
        {"entropy": [0.015] * 8},
        {"episode_return": [500, 499, 498, 497, 496, 495, 494, 493]},
        {"episode_return": [90, 20, 30, 40, 50, 60, 65, 70], "episodes": [1, 100, 200, 300, 400, 500, 600, 700]},
        {"episode_return": [90, 10, 10, 10, 10, 10, 10, 10], "episodes": [1] * 8},
    ],
    ids=["an early KL", "half a sample", "an early critic", "some entropy", "a small loss", "few episodes", "too few episodes"],
)
def test_what_is_over_or_small_is_not_said(metrics):
    assert found(**metrics) == []


def test_the_entropy_of_continuous_actions_is_held_against_their_range():
    def entropy(deviation):
        return [3 * (0.5 * np.log(2 * np.pi * np.e) + np.log(deviation))] * 8

    assert found(space=ARM, entropy=entropy(0.021)) == []
    (sentence,) = found(space=ARM, entropy=entropy(0.019))
    assert "raise entropy_coef or initial_log_std" in sentence
    assert found(space=MultiBinary(3), entropy=[-100.0] * 8) == []
