"""Several devices, which a CPU can pretend to be: the gradients are those of one, and the arrays are really divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from surefoot.rlhf import tiny_reviews
from surefoot.rlhf.devices import device_mesh
from surefoot.training.checkpoint import newest

ON_DEVICES = Path(__file__).parent / "on_devices.py"
ONLINE: dict[str, Any] = {"max_new_tokens": 8, "micro_batch_size": 8, "minibatch_size": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"minibatch_size": 16, "epochs": 0.25},
    "ppo": ONLINE | {"num_prompts": 16},
    "grpo": ONLINE | {"num_prompts": 4, "group_size": 4, "lora_rank": 2},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task")
    tiny_reviews.write_task(path, 0, num_demonstrations=64)
    config = json.loads((path / "model" / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    (path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    (path / "text_rewards.py").write_text("def length(prompts, completions, **columns):\n    return [len(c) / 40 for c in completions]\n")
    return path


def learned(task: Path, out: Path, method: str, devices: int, weight_devices: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(where a weight is, metrics, Adam's means of the gradients) after an iteration."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}
    settings = json.dumps(SETTINGS[method] | {"weight_devices": weight_devices})
    command = [sys.executable, str(ON_DEVICES), str(task), str(out), method, settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checkpoint = newest(out / "checkpoints")
    assert checkpoint is not None
    arrays = load_file(checkpoint.path / "learner.safetensors")
    metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return json.loads(done.stdout), metrics, {name: array for name, array in arrays.items() if "mu" in name.replace("/", ".").split(".")}


@pytest.mark.parametrize(("method", "weight_devices"), [("sft", 1), ("ppo", 2), ("grpo", 8)])
def test_gradients_on_eight_devices_are_those_on_one(method: str, weight_devices: int, task: Path, tmp_path: Path) -> None:
    _, metrics, alone = learned(task, tmp_path / "one", method, 1, 1)
    where, metrics_of_eight, together = learned(task, tmp_path / "eight", method, 8, weight_devices)
    assert where["devices"] == 8
    assert np.prod(where["whole"]) == weight_devices * np.prod(where["here"])
    assert len(alone) > 5
    for name, expected in alone.items():
        assert np.abs(together[name] - expected).max() <= 1e-5 * max(np.abs(array).max() for array in alone.values()), name
    assert max(np.abs(array).max() for array in alone.values()) > 1e-4
    names = [name for name in metrics if not name.startswith("time/") and metrics[name] is not None]
    np.testing.assert_allclose([metrics_of_eight[n] for n in names], [metrics[n] for n in names], rtol=1e-4, atol=1e-5)


def test_a_number_that_does_not_divide_the_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_devices=3 does not divide the number of devices, 1; choose a divisor"):
        device_mesh(3)
