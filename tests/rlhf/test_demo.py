"""The demonstration and its study from beginning to end, with a model and numbers that are too small to learn anything."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from surefoot.rlhf import demo, tiny_reviews
from surefoot.rlhf.ppo import PPO
from surefoot.rlhf.supervised import SFT, RewardTraining

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_reviews, "MODEL_CONFIG", tiny_reviews.MODEL_CONFIG | SIZES | {"intermediate_size": 32})
    monkeypatch.setattr(demo, "write_task", partial(tiny_reviews.write_task, num_demonstrations=64))
    monkeypatch.setattr(demo, "FINE_TUNING", SFT(minibatch_size=32))
    monkeypatch.setattr(demo, "REWARDING", RewardTraining(minibatch_size=32))
    monkeypatch.setattr(demo, "WEAK", RewardTraining(minibatch_size=8, held_out_share=0.5))
    monkeypatch.setattr(demo, "OPTIMISING", PPO(num_prompts=16, minibatch_size=16, max_new_tokens=demo.MAX_NEW_TOKENS, max_kl=float("inf")))
    for name, value in {"NUM_COMPARISONS": 96, "NUM_WEAK": 16, "STEPS": 32, "STEPS_OF_STUDY": 32}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("small")
def test_the_demonstration_goes_on_with_its_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.demo(demo.DemoOptions(out=tmp_path / "demo"))
    shown = capsys.readouterr().out
    assert "reward agrees with" in shown
    assert shown.count("\nppo ") == 1
    assert "ppo-free" not in shown
    learned = (tmp_path / "demo" / "ppo" / "metrics.jsonl").read_bytes()
    demo.demo(demo.DemoOptions(out=tmp_path / "demo", study=True))
    shown = capsys.readouterr().out
    assert (tmp_path / "demo" / "ppo" / "metrics.jsonl").read_bytes() == learned  # it was complete
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert list(summary["runs"]) == ["ppo", "ppo-free", "ppo-weak"]
    assert summary["accuracies"].keys() == {"reward", "reward-weak"}
    for name, ends in summary["runs"].items():
        assert f"\n{name} " in shown
        assert ends["before"]["gold"] == summary["runs"]["ppo"]["before"]["gold"]  # of one model, by one key
        assert f"{ends['after']['gold']:+.2f} +- " in shown
    assert (tmp_path / "demo" / "over-optimisation.png").stat().st_size > 10_000
    for name in ("sft", "reward", "reward-weak", "ppo", "ppo-free", "ppo-weak"):
        assert (tmp_path / "demo" / name / "report.html").exists()
