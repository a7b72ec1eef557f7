"""A run killed at any moment and resumed ends with the same bits as one process that was never stopped."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import bits

DYING = Path(__file__).parent / "dying.py"
STEPS = 8192


@pytest.mark.parametrize("environment", ["CartPole-v1", "gymnasium:Pendulum-v1"])
def test_ten_kills_and_resumes_end_in_the_bits_of_one_process(environment: str, surefoot: Callable[..., object], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = ["train", "ppo", environment, "--seed", "3", "--steps", str(STEPS), "--num-steps", "64", "--checkpoint-seconds", "0"]
    surefoot(*start, "--out", whole)

    draw = random.Random(f"moments {environment}")
    on_host = environment.startswith("gymnasium:")
    phases = ["compiling", "compiling", *["collecting", "updating"] * 2, "saving", "saving", "saving", "evaluating"]
    seconds = {"compiling": 0.3, "collecting": 0.01 if on_host else 0.0, "updating": 0.03, "saving": 0.004, "evaluating": 0.4}
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
        moment = draw.uniform(0.0, seconds[phase])
        dying = [sys.executable, DYING, phase, str(calls), str(moment), *map(str, command)]
        done = subprocess.run(dying, capture_output=True, text=True, check=False)
        assert done.returncode == -9, f"{phase}: {done.stdout}\n{done.stderr}"
        kills += 1
    assert kills == 10

    surefoot("train", "--resume", killed)
    assert len(bits(whole)[2]) == STEPS // (64 * 8)
    for what, expected, got in zip(("tensors", "info", "metrics"), bits(whole), bits(killed), strict=True):
        assert got == expected, what
