"""`surefoot check`: each thing that can be wrong with an environment is found, and nothing is said of a sound one."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from surefoot.envs.check import check, print_findings


class Walk(gymnasium.Env):
    """A random walk until |x| reaches 3, with what is wrong given by keyword."""

    def __init__(self, scale=1.0, reward=None, ends=True, seeded=True, late_noise=False, nan_at=None, action_space=None, length=None):
        self.observation_space = spaces.Box(-4 * scale, 4 * scale, (1,), np.float32)
        self.action_space = action_space or spaces.Discrete(2)
        self.scale, self.reward, self.ends, self.seeded, self.late_noise = scale, reward, ends, seeded, late_noise
        self.nan_at, self.length, self.count = nan_at, length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        generator = self.np_random if self.seeded else np.random.default_rng()
        self.x, self.count = generator.uniform(-1, 1), 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.scale * self.x], np.float32)

    def step(self, action):
        generator = np.random.default_rng() if self.late_noise else self.np_random
        self.count += 1
        self.x = np.clip(self.x + generator.normal(), -3.0, 3.0)
        if self.count == self.nan_at:
            self.x = np.nan
        terminated = bool(abs(self.x) >= 3.0) and self.ends
        if self.length is not None:
            terminated = self.count >= self.length
        return self.observe(), float(self.x > 0) if self.reward is None else self.reward, terminated, False, {}


def levels(findings):
    return {finding.level for finding in findings}


def found(findings, level, text):
    return any(finding.level == level and text in finding.sentence for finding in findings)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Taxi-v4", "Blackjack-v1"])
def test_sound_environments_have_nothing_but_notes(name):
    findings = check(name, num_steps=300)
    assert levels(findings) == {"note"}
    assert found(findings, "note", "resumed exactly")
    assert found(findings, "note", "episodes ended")
    assert found(findings, "note", "A step takes")


def test_of_minatar_there_is_nothing_to_find_out():
    (finding,) = check("MinAtar/Breakout-v1")
    assert finding.level == "note"
    assert any(finding.level == "error" for finding in check("MinAtar/Brekout-v1"))


def test_a_sound_environment_of_ones_own():
    findings = check(Walk, num_steps=300)
    assert levels(findings) == {"note"}
    assert found(findings, "note", "episodes restart")
    assert not found(findings, "note", "large scale")


@pytest.mark.parametrize(
    ("level", "text", "wrong"),
    [
        ("error", "nan", {"nan_at": 2}),
        ("error", "unbounded", {"action_space": spaces.Box(-np.inf, np.inf, (1,))}),
        ("error", "reward is None", {"reward": [None]}),
        ("warning", "ignores its seed", {"seeded": False}),
        ("warning", "cannot be repeated", {"late_noise": True}),
        ("warning", "No episode ended", {"ends": False}),
        ("warning", "lasts one step", {"length": 1}),
        ("warning", "made a difference", {"reward": 1.0, "length": 4}),
        ("note", "no reward but 0", {"reward": 0.0}),
        ("note", "reward is on a large scale", {"reward": 1000.0}),
        ("note", "observation is on a large scale", {"scale": 100.0}),
    ],
)
def test_each_wrong_is_found(level, text, wrong):
    if wrong.get("reward") == [None]:
        wrong, text = {"reward": [None]}, "reward is a list"
    assert found(check(lambda: Walk(**wrong), num_steps=200), level, text)
    assert not found(check(Walk, num_steps=200), level, text)


def test_an_observation_outside_its_space_is_found():
    class Outside(Walk):
        def observe(self):
            return super().observe() + 4.0

    assert found(check(Outside, num_steps=50), "warning", "outside its space")


def test_numbers_that_never_change_are_counted():
    class Still(Walk):
        def observe(self):
            return np.zeros(1, np.float32)

    assert found(check(Still, num_steps=50), "note", "1 of 1 numbers that never changed")


def test_an_unknown_name_is_an_error_and_not_a_traceback():
    findings = check("CartPole-v99")
    assert levels(findings) == {"error"}


def test_a_vector_environment_is_played_in_all_its_streams():
    findings = check(lambda: gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point"), num_steps=100)
    assert levels(findings) == {"note"}
    assert found(findings, "note", "episodes restart")


def test_findings_are_printed_with_their_remedies(capsys):
    print_findings("walk", check(lambda: Walk(ends=False), num_steps=50))
    out = capsys.readouterr().out
    assert "walk: 0 errors, 1 warning, " in out
    assert "-> If it has no time limit" in out
