"""Runs on text from files to a model on the disk: what they report, resume, refuse, and stop for."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

from surefoot.rlhf import api, runs, tiny_reviews
from surefoot.rlhf.heads import HEAD_FILE, load_reward_model
from surefoot.rlhf.online import RunAstray
from surefoot.rlhf.ppo import GRPO, PPO
from surefoot.rlhf.runs import METHODS, Sources, TextSession
from surefoot.rlhf.supervised import SFT, RewardTraining
from surefoot.training.cache import use_compilation_cache
from surefoot.training.checkpoint import CheckpointError, newest, save_file
from surefoot.training.session import kind_of

use_compilation_cache()
DYING = Path(__file__).parents[1] / "training" / "dying.py"
REWARDS = """
def length(prompts, completions, **columns):
    return [min(len(c), 40) / 40 for c in completions]

def half(prompts, completions):
    return [None if i % 2 else 1.0 for i in range(len(completions))]

def broken(prompts, completions):
    return [1 / (len(c) - len(completions[0])) for c in completions]
"""
ONLINE: dict[str, Any] = {"num_prompts": 8, "minibatch_size": 8, "max_new_tokens": 24, "learning_rate": 1e-3}
PPO_ARGUMENTS = ["ppo", "--model", "MODEL", "--prompts", "PROMPTS", "--max-new-tokens", "24"]
CONFIGS: dict[str, Any] = {
    "sft": SFT(minibatch_size=16, learning_rate=3e-3, epochs=2),
    "reward": RewardTraining(minibatch_size=8, learning_rate=1e-3, held_out_share=0.2),
    "ppo": PPO(**ONLINE, epochs=2, critic_learning_rate=1e-3, kl_target=2.0),
    "grpo": GRPO(**ONLINE | {"num_prompts": 2}, lora_rank=2, dtype="bfloat16", gradient_checkpointing=True),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, demonstrations, comparisons, prompts and reward functions."""
    path = tmp_path_factory.mktemp("task")
    tiny_reviews.write_task(path, 0, num_demonstrations=128)
    config = json.loads((path / "model" / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    (path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    rows = [json.loads(line) for line in (path / "sft.jsonl").read_text().splitlines()]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " bad"} for row in rows[:48]]
    tiny_reviews.write_jsonl(path / "preferences.jsonl", pairs)
    (path / "text_rewards.py").write_text(REWARDS)
    return path


def sources(name: str, task: Path, **changes: Any) -> Sources:
    data = {"sft": "sft.jsonl", "reward": "preferences.jsonl"}.get(name, "prompts.jsonl")
    given = Sources(str(task / "model"), str(task / data))
    if name == "reward":
        given = given._replace(demonstrations=str(task / "sft.jsonl"))
    if name in ("ppo", "grpo"):
        given = given._replace(rewards=(f"{task / 'text_rewards.py'}:length",))
    return given._replace(**changes)


def run(name: str, task: Path, out: Path, steps: float | None = None, config: Any = None, **changes: Any) -> TextSession:
    session = TextSession.start(config or CONFIGS[name], sources(name, task, **changes), steps=steps, seed=0, out=out)
    for _ in session.reports(checkpoint_seconds=1e9):
        pass
    return session


@pytest.fixture(scope="module")
def finished(task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each method."""
    path = tmp_path_factory.mktemp("runs")
    run("sft", task, path / "sft", held_out=str(task / "sft-held-out.jsonl"))
    run("reward", task, path / "reward")
    run(
        "ppo",
        task,
        path / "ppo",
        steps=24,
        rewards=(str(path / "reward"), f"{task / 'text_rewards.py'}:length=0.5"),
        held_out=str(prompts(task)),
    )
    run("grpo", task, path / "grpo", steps=24)
    return {name: path / name for name in CONFIGS}


def prompts(task: Path) -> Path:
    """A few that are not learned from."""
    few = task / "few.jsonl"
    few.write_text("".join((task / "prompts-held-out.jsonl").read_text().splitlines(keepends=True)[:5]))
    return few


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def bits(path: Path) -> Any:
    """Everything a run leaves but the time it took."""
    checkpoint = newest(path / "checkpoints")
    assert checkpoint is not None
    info = {key: value for key, value in checkpoint.info.items() if key not in ("seconds", "metrics_size")}
    rows = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in metrics(path)]
    files = {file.name: file.read_bytes() for file in sorted((path / "model").glob("*.safetensors"))}
    tensors = {file.name: file.read_bytes() for file in checkpoint.path.rglob("*.safetensors")}
    samples = (path / "samples.jsonl").read_text() if (path / "samples.jsonl").exists() else None
    return info, rows, files, tensors, samples


def test_fine_tuning_lowers_the_loss_of_data_not_learned_from(finished: dict[str, Path]) -> None:
    losses = [row["held_out_loss"] for row in metrics(finished["sft"]) if "held_out_loss" in row]
    assert losses[-1] < losses[0] - 0.5
    writer = api.load(finished["sft"])
    greedy = writer.write(["Review the old cafe in may:"] * 3, max_new_tokens=12, temperature=0)
    assert len(set(greedy)) == 1
    with pytest.raises(ValueError, match=r"tokens; 1 to \d+ fit beside 12 new ones"):
        writer.write(["Review " * 60], max_new_tokens=12)


def test_a_reward_model_agrees_with_plain_preferences_and_scores_demonstrations_zero(finished: dict[str, Path], task: Path) -> None:
    model, info = load_reward_model(finished["reward"] / "model")
    assert info["accuracy"] == metrics(finished["reward"])[-1]["held_out_accuracy"] > 0.9
    session = TextSession.resume(finished["reward"])
    batch = session.engine.arrays(session.demonstrations, len(session.demonstrations))  # type: ignore[attr-defined]
    session.close()
    assert abs(float(np.mean(model(batch.tokens, batch.mask)))) < 1e-4


def test_a_reward_model_does_not_care_on_which_side_a_text_is_padded(finished: dict[str, Path]) -> None:
    model, _ = load_reward_model(finished["reward"] / "model")
    text = np.array([[5, 9, 11, 2]], np.int32)
    alone = model(text, np.ones((1, 4), bool))
    for before, after in ((3, 0), (0, 3), (2, 5)):
        padded, mask = (np.pad(x, ((0, 0), (before, after))) for x in (text, np.ones((1, 4), bool)))
        np.testing.assert_allclose(model(padded, mask), alone, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_policy_begins_as_its_reference_and_leaves_it(name: str, finished: dict[str, Path]) -> None:
    rows = metrics(finished[name])
    assert rows[0]["reference_kl"] == 0.0
    assert rows[-1]["reference_kl"] != 0.0
    assert len(rows) == 3
    assert {"score", "kl", "ratio_max", "predicted_improvement", "response_length", "time/generating"} <= rows[0].keys()
    assert rows[0].get("realised_improvement") is None
    assert rows[1]["realised_improvement"] is not None
    assert (finished[name] / "samples.jsonl").read_text().count("\n") == 3 * runs.NUM_SAMPLES


def test_rewards_are_mixed_by_their_weights_and_a_missing_end_is_taken_off_the_worth(finished: dict[str, Path]) -> None:
    for row in metrics(finished["ppo"]):
        parts = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("reward/")}
        function, model = (next(value for name, value in parts.items() if word in name) for word in ("length", "reward"))
        assert row["score"] == pytest.approx(model + 0.5 * function, abs=1e-5)
    held_out = [row["held_out_score"] for row in metrics(finished["ppo"]) if "held_out_score" in row]
    assert len(held_out) == 3
    assert metrics(finished["ppo"])[0]["start_score"] is not None


def test_what_cannot_be_scored_is_left_out(task: Path, tmp_path: Path) -> None:
    config = GRPO(**ONLINE | {"num_prompts": 2}, missing_end_penalty=0)
    run("grpo", task, tmp_path / "run", steps=8, config=config, rewards=(f"{task / 'text_rewards.py'}:half",))
    (row,) = metrics(tmp_path / "run")
    assert row["unscored"] == 0.5
    assert row["score"] == 1.0
    assert row["flat_groups"] == 1.0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_that_was_killed_ends_in_the_bits_of_one_that_was_not(name: str, task: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = None if name in ("sft", "reward") else 40
    run(name, task, whole, steps=steps)
    config, given = CONFIGS[name], sources(name, task)
    options = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in settings_of(config).items()]
    where = "--data" if steps is None else "--prompts"
    command = ["rlhf", name, "--model", given.model, where, given.data, *options, "--out", str(killed), "--checkpoint-seconds", "0"]
    command += ["--demonstrations", given.demonstrations] if given.demonstrations else []
    command += ["--reward", *given.rewards, "--steps", str(steps)] if steps else []
    moment = str(random.Random(name).uniform(0, 0.02))
    done = subprocess.run([sys.executable, DYING, "text", "3", moment, *command], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stdout + done.stderr
    checkpoint = newest(killed / "checkpoints")
    assert checkpoint is not None
    assert 0 < checkpoint.step < json.loads((killed / "run.json").read_text())["steps"]
    resumed = subprocess.run(
        [sys.executable, "-m", "surefoot", "train", "--resume", str(killed)], capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    for expected, got in zip(bits(whole), bits(killed), strict=True):
        assert got == expected


def settings_of(config: Any) -> dict[str, Any]:
    default = type(config)()
    return {name: getattr(config, name) for name in config.explicit if getattr(config, name) != getattr(default, name)}


def test_a_resume_refuses_other_data_and_another_reference(finished: dict[str, Path], task: Path, tmp_path: Path) -> None:
    copied = tmp_path / "task"
    shutil.copytree(task, copied)
    run("sft", copied, tmp_path / "sft")
    (copied / "sft.jsonl").write_text((copied / "sft.jsonl").read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(CheckpointError, match="SHA-256 of data was"):
        TextSession.resume(tmp_path / "sft")
    record = json.loads((finished["ppo"] / "run.json").read_text())
    other = tmp_path / "ppo"
    shutil.copytree(finished["ppo"], other)
    (other / "run.json").write_text(json.dumps(record | {"sources": record["sources"] | {"model": str(finished["sft"])}}))
    with pytest.raises(CheckpointError, match="SHA-256 of model was"):
        TextSession.resume(other)


def test_a_run_that_strays_too_far_stops_and_keeps_its_answers(task: Path, tmp_path: Path) -> None:
    config = PPO(**ONLINE | {"learning_rate": 0.3}, epochs=2, max_kl=3.0)
    with pytest.raises(RunAstray, match=r"nats per sequence away from the reference, above the limit of 3.*evidence.json"):
        run("ppo", task, tmp_path / "run", steps=800, config=config)
    evidence = json.loads((tmp_path / "run" / "evidence.json").read_text())
    assert len(evidence["answers"]) == 8
    assert {"prompt", "completion", "score", "kl"} == evidence["answers"][0].keys()


def test_weights_that_are_not_finite_are_noticed_before_anything_is_learned(task: Path, tmp_path: Path) -> None:
    session = TextSession.start(CONFIGS["ppo"], sources("ppo", task), steps=8, seed=0, out=tmp_path / "run")
    trainer: Any = session.engine
    broken = trainer.frozen.reference.layers.up.weight.at[0, 0, 0].set(np.nan)
    trainer.learner = trainer.learner._replace(actor=with_weight(trainer.learner.actor, broken))
    with pytest.raises(RunAstray, match="not finite"):
        next(iter(session.reports(checkpoint_seconds=1e9)))


def with_weight(model: Any, weight: Any) -> Any:
    return eqx.tree_at(lambda model: model.layers.up.weight, model, weight)


def test_answers_that_are_all_the_same_teach_nothing(task: Path, tmp_path: Path) -> None:
    session = TextSession.start(CONFIGS["ppo"], sources("ppo", task), steps=8, seed=0, out=tmp_path / "run")
    trainer: Any = session.engine
    before = jax.tree.map(np.array, trainer.learner.actor)  # its own arrays are written over
    trainer.tokens = SameText(trainer.tokens)
    (report,) = session.reports(checkpoint_seconds=1e9)
    assert trainer.warnings
    assert report.metrics["gradient_norm"] == 0.0
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(trainer.learner.actor), strict=True))


class SameText:
    """A tokenizer for which every answer reads the same."""

    def __init__(self, tokens: Any):
        self.pad_id, self.stop_ids = tokens.pad_id, tokens.stop_ids

    def decode(self, rows: Any) -> list[str]:
        return ["good good"] * len(rows)


def test_a_reward_model_no_better_than_chance_is_refused_unless_forced(finished: dict[str, Path], task: Path, tmp_path: Path) -> None:
    weak = tmp_path / "weak"
    shutil.copytree(finished["reward"], weak)
    model, info = load_reward_model(weak / "model")
    save_file(weak / "model" / HEAD_FILE, model.head, info | {"accuracy": 0.51})
    with pytest.raises(ValueError, match=r"agrees with 51.0% of held-out comparisons.*--force"):
        run("ppo", task, tmp_path / "run", steps=8, rewards=(str(weak),))
    assert not (tmp_path / "run").exists()
    session = TextSession.start(
        CONFIGS["ppo"], sources("ppo", task, rewards=(str(weak),)), steps=8, seed=0, out=tmp_path / "run", force=True
    )
    session.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft", "--model", "MODEL", "--data", "nowhere.jsonl"], "There is no file"),
        (["sft", "--model", "MODEL", "--data", "SFT", "--max-length", "99"], "leave room for 64 tokens"),
        (["ppo", "--model", "MODEL", "--prompts", "PROMPTS", "--reward", "text_rewards.py:length"], "max_new_tokens=128 leaves no room"),
        ([*PPO_ARGUMENTS, "--reward", "text_rewards.py:lenght"], "did you mean 'length'"),
        ([*PPO_ARGUMENTS, "--reward", "MODEL"], "holds no reward_head.safetensors"),
        (["poo"], "there is no verb 'poo', did you mean 'ppo'"),
        (["sample", "MODEL"], "Missing from surefoot rlhf sample"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(arguments: list[str], message: str, task: Path, tmp_path: Path, surefoot: Any) -> None:
    places = {"MODEL": str(task / "model"), "SFT": str(task / "sft.jsonl"), "PROMPTS": str(task / "prompts.jsonl")}
    (tmp_path / "text_rewards.py").write_text(REWARDS)
    words = [places.get(word, word) for word in arguments]
    done = surefoot("rlhf", *words, code=2 if arguments[0] in ("poo", "sample") else 1)
    assert message in done.stderr.replace("\n", " ")


def test_a_finished_run_has_a_page_and_writes_completions(finished: dict[str, Path], surefoot: Any) -> None:
    assert kind_of(finished["ppo"]) == "text"
    for path in finished.values():
        surefoot("report", path)
    page = (finished["ppo"] / "report.html").read_text()
    for word in ("score of the answers", "KL from the reference", "Answers", "SHA-256 of data", "generating"):
        assert word in page
    assert "score of the answers" not in (finished["sft"] / "report.html").read_text()
    done = surefoot("rlhf", "sample", finished["ppo"], "--prompt", "Review the old cafe in may:", "--max-new-tokens", "8")
    assert done.stdout.strip()


def test_every_method_has_a_verb(surefoot: Any) -> None:
    usage = surefoot("rlhf", "--help").stdout
    assert all(name in usage for name in METHODS)
