"""What a run is said to need, against what its compiled programs ask for, and what is refused."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.rlhf import memory, ppo, supervised
from surefoot.rlhf.memory import Plan, check_memory, plan
from surefoot.rlhf.model import ModelConfig, init_model
from surefoot.rlhf.ppo import GRPO, PPO
from surefoot.rlhf.supervised import SFT, RewardTraining

SMALL = ModelConfig(
    vocab_size=400,
    hidden_size=64,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=192,
    max_positions=128,
)


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_parameters_and_moments_are_exact(lora_rank: int) -> None:
    config = PPO(lora_rank=lora_rank, num_prompts=8, minibatch_size=8, max_new_tokens=32)
    model = init_model(SMALL, jax.random.key(0))
    learner = jax.jit(partial(ppo.init, config))(model, model, jax.random.key(1))
    needed = plan(config, SMALL, [SMALL], longest=128)
    assert needed.trained == bytes_of((learner.actor, learner.critic))
    assert needed.moments == bytes_of((learner.moments, learner.critic_moments))
    assert needed.frozen == 2 * bytes_of(model)
    in_half = plan(dataclasses.replace(config, dtype="bfloat16"), SMALL, [SMALL], longest=128)
    assert in_half.frozen == needed.frozen // 2
    assert in_half.trained == needed.trained


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("rows", [8, 32])
def test_a_gradient_needs_about_what_is_said(rows: int, gradient_checkpointing: bool) -> None:
    config = SFT(minibatch_size=rows, gradient_checkpointing=gradient_checkpointing)
    model = dataclasses.replace(init_model(SMALL, jax.random.key(0)), gradient_checkpointing=gradient_checkpointing)
    state = supervised.init(config, model, jax.random.key(0))
    ids, yes = np.zeros((rows, 128), np.int32), np.ones((rows, 128), bool)
    batch = supervised.Sequences(ids, yes, yes, yes[:, 0])
    program = jax.jit(partial(supervised.update, config), donate_argnums=0).lower(state, batch, None, jnp.float32(0.0)).compile()
    asked = program.memory_analysis().temp_size_in_bytes
    assert 0.5 < plan(config, SMALL, longest=128).learning / asked < 2.0


def test_what_helps_is_what_is_advised() -> None:
    whole = plan(GRPO(num_prompts=8, group_size=4, minibatch_size=32), SMALL, longest=128)
    for changed in ({"micro_batch_size": 4}, {"gradient_checkpointing": True}, {"lora_rank": 2}, {"dtype": "bfloat16"}):
        settings: dict[str, Any] = {"num_prompts": 8, "group_size": 4, "minibatch_size": 32} | changed
        assert plan(GRPO(**settings), SMALL, longest=128).total < whole.total, changed
    assert plan(RewardTraining(minibatch_size=32), SMALL, longest=128).learning > plan(SFT(minibatch_size=32), SMALL, longest=128).learning


def test_what_does_not_fit_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Plan(6_000_000_000, 12_000_000_000, 3_000_000_000, 500_000_000, 2_000_000_000)
    assert needed.total == 23_000_000_000
    monkeypatch.setattr(memory, "free_bytes", lambda: 23_000_000_000)
    assert check_memory(needed).endswith("of 23.0 GB that are free")
    monkeypatch.setattr(memory, "free_bytes", lambda: 22_900_000_000)
    with pytest.raises(ValueError, match=r"needs 23.0 GB at most \(trained 6.0 GB, moments 12.0 GB, .*sampling 500 MB.*22.9 GB are free"):
        check_memory(needed)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    check_memory(needed)
