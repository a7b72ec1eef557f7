"""The whole way from data to an aligned model on the task `tiny-reviews`: minutes on a CPU, without network, everything from one seed.

Fine-tuning on reviews of mixed worth, a reward model from comparisons of the fine-tuned model's own answers, and PPO against it. The study
adds what happens without the penalty on divergence, and with a reward model that has hardly learned anything: the proxy rises further,
and what it stands for falls (Gao et al. 2022, arXiv:2210.10760).
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..report import curves
from ..report.curves import COLOURS, INK, read_metrics
from . import api, tiny_reviews
from .page import write_report
from .ppo import PPO
from .supervised import SFT, RewardTraining
from .tiny_reviews import MAX_PROMPT_TOKENS, MAX_TOKENS, preferences, write_jsonl, write_task

GOLD = "surefoot.rlhf.tiny_reviews:score"
MAX_NEW_TOKENS = MAX_TOKENS - MAX_PROMPT_TOKENS
NUM_COMPARISONS, NUM_WEAK = 4_000, 200
FINE_TUNING = SFT(learning_rate=3e-3, minibatch_size=64, epochs=0.5)
REWARDING = RewardTraining(learning_rate=1e-3, minibatch_size=64, epochs=1.0, overlong="drop")
WEAK = RewardTraining(learning_rate=1e-4, minibatch_size=32, epochs=1.0, held_out_share=0.5, overlong="drop")
OPTIMISING = PPO(
    num_prompts=64,
    minibatch_size=64,
    epochs=2,
    max_new_tokens=MAX_NEW_TOKENS,
    learning_rate=5e-4,
    critic_learning_rate=1e-3,
    kl_coef=0.1,
    max_kl=float("inf"),
)
STEPS, STEPS_OF_STUDY = 64 * 24, 64 * 90


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Fine-tune, learn what people prefer, optimise, and say what came of it."""

    out: Path = Path("runs/rlhf-demo")
    """Where everything goes; a demonstration that was stopped goes on there."""
    seed: int = 0
    """Everything random follows from it."""
    study: bool = False
    """Also optimise without the penalty on divergence, and against a reward model that has hardly learned, and draw what came of it."""


def demo(options: DemoOptions) -> None:
    """Run the parts that are not complete yet; print and draw what came of them."""
    out, seed, began = options.out, options.seed, time.monotonic()
    if not (out / "task" / "model" / "config.json").exists():
        print("writing the task: reviews, prompts, a tokenizer, the configuration of a model", flush=True)
        write_task(out / "task", seed)
    task = out / "task"
    held_out = task / "prompts-held-out.jsonl"

    def part(name: str, title: str, start: Any) -> api.TextRun:
        """A run of the demonstration: started, continued, or complete already."""
        path = out / name
        print(f"\n{title}", flush=True)
        return api.resume(path) if (path / "run.json").exists() else start(path)

    sft = part(
        "sft",
        "1. Fine-tuning on reviews",
        lambda path: api.fine_tune(
            FINE_TUNING, model=task / "model", data=task / "sft.jsonl", held_out=task / "sft-held-out.jsonl", seed=seed, out=path
        ),
    )
    if not (out / "preferences.jsonl").exists():
        write_comparisons(sft, task, out / "preferences.jsonl", seed)

    def rewarded(name: str, title: str, config: RewardTraining, data: Path) -> api.TextRun:
        return part(name, title, lambda path: api.train_reward(config, model=sft.path, data=data, seed=seed, out=path))

    def optimised(name: str, title: str, config: PPO, reward: api.TextRun, steps: int) -> api.TextRun:
        how = {"held_out": held_out, "gold": (GOLD,), "steps": steps, "seed": seed, "force": True}
        rewards = (str(reward.path),)
        return part(
            name,
            title,
            lambda path: api.optimise(config, model=sft.path, prompts=task / "prompts.jsonl", rewards=rewards, out=path, **how),
        )

    reward = rewarded(
        "reward", "2. A reward model from comparisons of the fine-tuned model's answers", REWARDING, out / "preferences.jsonl"
    )
    runs = {"ppo": optimised("ppo", "3. PPO against the reward model", OPTIMISING, reward, STEPS)}
    if options.study:
        few = out / "preferences-few.jsonl"
        few.write_text("".join((out / "preferences.jsonl").read_text().splitlines(keepends=True)[:NUM_WEAK]))
        weak = rewarded("reward-weak", "4. A reward model from a few comparisons", WEAK, few)
        free = dataclasses.replace(OPTIMISING, kl_coef=0.0)
        runs["ppo-free"] = optimised("ppo-free", "5. PPO without a penalty on divergence", free, reward, STEPS_OF_STUDY)
        runs["ppo-weak"] = optimised("ppo-weak", "6. PPO without a penalty, against the weak reward model", free, weak, STEPS_OF_STUDY)
    judges = [run for name in ("reward", "reward-weak") if (run := api.TextRun(out / name)).path.exists()]
    accuracies = {run.path.name: run.metrics[-1]["held_out_accuracy"] for run in judges}
    summary = {name: dict(zip(("before", "after"), ends_of(run), strict=True)) for name, run in runs.items()}
    print()
    for name, accuracy in accuracies.items():
        print(f"{name} agrees with {accuracy:.1%} of held-out comparisons")
    print(f"{'on held-out prompts':<22}{'gold':>16}{'learned reward':>16}{'KL, nats':>10}")
    for name, (start, end) in ((name, ends.values()) for name, ends in summary.items()):
        if name == "ppo":
            print(f"{'sft':<22}{start['gold']:>+9.2f} +- {start['gold_error']:.2f}{start['score']:>+16.2f}{0.0:>10.1f}")
        print(f"{name:<22}{end['gold']:>+9.2f} +- {end['gold_error']:.2f}{end['score']:>+16.2f}{end['reference_kl']:>10.1f}")
    for run in (sft, *judges, *runs.values()):
        write_report(run.path, run.path / "report.html")
    (out / "summary.json").write_text(json.dumps({"accuracies": accuracies, "runs": summary}, indent=2) + "\n")
    draw(runs).savefig(out / "over-optimisation.png", dpi=160)
    print(f"\npicture {out / 'over-optimisation.png'}\nreport  {runs['ppo'].path / 'report.html'}")
    print(f"try it  surefoot rlhf sample {runs['ppo'].path} --prompt {tiny_reviews.all_prompts(seed)[1][0]!r}")
    print(f"all of it took {time.monotonic() - began:.0f} s")


def write_comparisons(sft: api.TextRun, task: Path, path: Path, seed: int) -> None:
    """Pairs of answers of the fine-tuned model, and which of them people prefer."""
    print("\ncomparing answers of the fine-tuned model", flush=True)
    prompts = [json.loads(line)["prompt"] for line in (task / "prompts.jsonl").read_text().splitlines()]
    asked = [prompts[i % len(prompts)] for i in range(NUM_COMPARISONS)]
    writer = sft.policy
    how = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 512}
    first, second = (writer.write(asked, seed=2 * seed + which, **how) for which in (0, 1))
    write_jsonl(path, preferences(asked, first, second, seed))


def ends_of(run: api.TextRun) -> tuple[dict[str, float], dict[str, float]]:
    """What answers to the held-out prompts were worth before and after."""
    metrics = read_metrics(run.path / "metrics.jsonl")

    def at(kind: str, index: int) -> dict[str, float]:
        names = ("gold", "gold_error", "score", "score_error")
        return {name: float(values[np.isfinite(values)][index]) for name in names for values in [metrics[f"{kind}_{name}"]]}

    return at("start", 0), at("held_out", -1) | {"reference_kl": float(metrics["reference_kl"][-1])}


def draw(runs: dict[str, api.TextRun]) -> Figure:
    """Learned and gold reward of held-out prompts against the square root of the divergence (Gao et al. 2022, eq. 1)."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
        metrics = read_metrics(run.path / "metrics.jsonl")
        known = np.isfinite(metrics["held_out_gold"])
        start = ends_of(run)[0]
        distance = np.sqrt(np.maximum(np.concatenate([[0.0], metrics["reference_kl"][known]]), 0.0))
        order = np.argsort(distance, kind="stable")
        for kind, dash in (("gold", "solid"), ("score", "dashed")):
            value = np.concatenate([[start[kind]], metrics[f"held_out_{kind}"][known]])
            label = f"{name}, {'gold' if kind == 'gold' else 'learned'}"
            axes.plot(distance[order], value[order], color=colour, linestyle=dash, marker=".", label=label)
    axes.set_xlabel("square root of KL(policy || reference), nats per answer", color=INK)
    title = "A learned reward goes on rising where gold falls" if len(runs) > 1 else "The reward that is learned from, and the gold one"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    curves.tidy(axes)
    axes.set_xlim(left=0)
    return figure
