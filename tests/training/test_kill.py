"""A run killed at any moment and resumed ends with the same bits as one process that was never stopped."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import bits, metrics

import surefoot as sf
from surefoot.algorithms import named
from surefoot.training.checkpoint import newest

DYING = Path(__file__).parent / "dying.py"
STEPS = 8192
SECONDS = {"compiling": 0.3, "collecting": 0.01, "updating": 0.03, "saving": 0.004, "evaluating": 0.4}  # in which to kill a phase


def kill(phase: str, calls: int, draw: random.Random, *command: object) -> None:
    """Run a command in a process of its own, which must die as dying.py says, at a moment that is drawn."""
    dying = [sys.executable, DYING, phase, str(calls), str(draw.uniform(0.0, SECONDS[phase])), *map(str, command)]
    done = subprocess.run(dying, capture_output=True, text=True, check=False)
    assert done.returncode == -9, f"{phase}: {done.stdout}\n{done.stderr}"


def assert_same_bits(whole: Path, killed: Path) -> None:
    for what, expected, got in zip(("tensors", "info", "metrics"), bits(whole), bits(killed), strict=True):
        assert got == expected, what


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("environment", ["CartPole-v1", "gymnasium:Pendulum-v1"])
def test_ten_kills_and_resumes_end_in_the_bits_of_one_process(environment: str, surefoot: Callable[..., object], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = ["train", "ppo", environment, "--seed", "3", "--steps", str(STEPS), "--num-steps", "64", "--checkpoint-seconds", "0"]
    surefoot(*start, "--out", whole)

    draw = random.Random(f"moments {environment}")
    on_host = environment.startswith("gymnasium:")
    phases = ["compiling", "compiling", *["collecting", "updating"] * 2, "saving", "saving", "saving", "evaluating"]
    if not on_host:  # collecting is a part of the one compiled call
        phases = ["updating" if phase == "collecting" else phase for phase in phases]
    kills = 0
    for phase in phases:
        calls = 1 if phase in ("compiling", "evaluating") else draw.randint(1, 3)
        if phase == "evaluating":
            command = ["eval", killed, "--episodes", "100"]
        elif (killed / "run.json").exists():
            command = ["train", "--resume", killed, "--checkpoint-seconds", "0"]
        else:
            command = [*start, "--out", killed]
        if phase == "evaluating":  # there must be a policy to evaluate
            assert (killed / "policy.safetensors").exists()
        kill(phase, calls, draw, *command)
        kills += 1
    assert kills == 10

    surefoot("train", "--resume", killed)
    assert len(bits(whole)[2]) == STEPS // (64 * 8)
    assert_same_bits(whole, killed)


# Batches of such a length that episodes end on both sides of the kill: a cheetah's after 1000 steps, an ant's when it falls.
@pytest.mark.parametrize(("environment", "num_steps"), [("HalfCheetah-v5", 256), ("Ant-v5", 64)])
@pytest.mark.parametrize(("algorithm", "phase"), [("ppo", "collecting"), ("trpo", "updating"), ("reinforce", "saving")])
def test_every_algorithm_resumes_in_the_bits_of_one_process_on_mujoco(
    algorithm: str, phase: str, environment: str, num_steps: int, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = 8 * 8 * num_steps
    config = named(algorithm).config(num_steps=num_steps)
    start = ["train", algorithm, environment, "--no-preset", "--num-steps", num_steps, "--steps", steps, "--checkpoint-seconds", 0]

    kill(phase, 6, random.Random(f"moment {algorithm} {environment}"), *start, "--out", killed)
    checkpoint = newest(killed / "checkpoints")
    assert checkpoint is not None
    sf.resume(killed, progress=False)
    sf.train(config, environment, steps=steps, out=whole, progress=False, preset=False)
    assert 0 < checkpoint.info["episodes"]["episodes"] < metrics(whole)[-1]["episodes"]
    assert_same_bits(whole, killed)


# Of a replay so small that its rings are written over before the kill and after it.
TINY = {"hidden": (8,), "replay_size": 640, "learning_starts": 64, "minibatch_size": 16, "update_to_data": 0.125}


@pytest.mark.parametrize(
    ("algorithm", "environment", "phase", "calls", "settings"),
    [
        ("dqn", "CartPole-v1", "updating", 3, {}),
        ("rainbow", "CartPole-v1", "saving", 3, {"num_atoms": 5}),
        ("off-policy-actor-critic", "CartPole-v1", "saving", 3, {"critic_target": "retrace", "sequence_length": 4}),
        ("sac", "gymnasium:Pendulum-v1", "collecting", 150, {}),
        ("td3", "gymnasium:Pendulum-v1", "saving", 3, {}),
        ("ddpg", "gymnasium:Pendulum-v1", "collecting", 150, {"collect_beside_learning": True}),
    ],
)
def test_a_replay_is_resumed_in_the_bits_of_one_process(
    algorithm: str, environment: str, phase: str, calls: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps, config = 5 * 512, named(algorithm).config(**TINY | settings)
    given = {f"--{name}".replace("_", "-"): value for name, value in (TINY | {"hidden": 8} | settings).items()}
    options = [word for name, value in given.items() for word in ([name] if value is True else [name, value])]
    start = ["train", algorithm, environment, "--no-preset", "--steps", steps, "--checkpoint-seconds", 0, *options]

    kill(phase, calls, random.Random(f"moment {algorithm} {environment}"), *start, "--out", killed)
    checkpoint = newest(killed / "checkpoints")
    assert checkpoint is not None
    assert 640 < checkpoint.step < steps
    sf.resume(killed, progress=False)
    sf.train(config, environment, steps=steps, out=whole, progress=False, preset=False)
    assert_same_bits(whole, killed)
    last = newest(killed / "checkpoints")
    assert last is not None
    stored = {name: array for name, array in last.arrays("learner").items() if name.startswith("replay.")}
    assert stored["replay.rows.obs"].shape[0] == 640
    assert int(stored["replay.written"].sum()) == steps
    assert (stored["replay.expired"] > 0).all()
    assert ("replay.sums.0" in stored) == (algorithm == "rainbow")
    assert ("replay.rows.old_log_prob" in stored) == (algorithm == "off-policy-actor-critic")
