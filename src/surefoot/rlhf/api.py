"""What a user calls for language models: fine-tune, train a reward model, optimise, resume, load."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.cache import use_compilation_cache
from ..training.signals import catch_signals
from .ppo import OnlineSettings
from .progress import TextProgress
from .runs import Sources, TextSession, Writer, load
from .supervised import SFT, RewardTraining

__all__ = ["TextRun", "fine_tune", "load", "optimise", "resume", "train_reward"]


class TextRun:
    """A run directory, and the language model that came out of it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def policy(self) -> Writer:
        """The model of the newest save."""
        return load(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary for each iteration."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def __repr__(self) -> str:
        return f"TextRun({str(self.path)!r})"


def fine_tune(config: SFT, *, model: str | Path, data: str | Path, held_out: str | Path | None = None, **how: Any) -> TextRun:
    """Supervised fine-tuning on a JSONL file of prompts and completions; arguments and errors as for `optimise`."""
    return _run(config, Sources(str(model), str(data), _text(held_out)), steps=None, **how)


def train_reward(
    config: RewardTraining,
    *,
    model: str | Path,
    data: str | Path,
    held_out: str | Path | None = None,
    demonstrations: str | Path | None = None,
    **how: Any,
) -> TextRun:
    """A reward model from a JSONL file of comparisons, which scores `demonstrations` 0 on average; else as for `optimise`."""
    if demonstrations is None and (record := Path(model) / "run.json").exists():
        sources = json.loads(record.read_text()).get("sources", {})
        demonstrations = sources.get("data") if sources else None
    return _run(config, Sources(str(model), str(data), _text(held_out), _text(demonstrations)), steps=None, **how)


def optimise(
    config: OnlineSettings,
    *,
    model: str | Path,
    prompts: str | Path,
    rewards: Sequence[str],
    held_out: str | Path | None = None,
    gold: Sequence[str] = (),
    reward_timeout: float | None = None,
    steps: float | None = None,
    **how: Any,
) -> TextRun:
    """PPO, RLOO or GRPO, as `config` says, of a language model on prompts.

    Args:
        model: a run, a Hugging Face directory or a name on the hub; it is also the reference.
        prompts: a JSONL file.
        rewards: directories of reward models and names of functions (`file.py:function`), with `=weight` where it is not 1.
        held_out: prompts that are not learned from, answered ten times in the run.
        gold: functions that are only watched.
        steps: answers in all; by default 100 iterations.
        how: `seed`, `out`, `checkpoint_seconds`, `progress` and `force`, as for `surefoot.train`.

    Raises:
        ValueError: a setting, a file or a model that cannot be used, and what to do about it.
        RunAstray: answers that nothing good can be learned from any more; they are kept in the run.
    """
    sources = Sources(str(model), str(prompts), _text(held_out), None, tuple(map(str, rewards)), tuple(gold), reward_timeout)
    return _run(config, sources, steps=steps, **how)


def resume(path: str | Path, *, checkpoint_seconds: float = 300.0, progress: bool = True) -> TextRun:
    """Continue a run on text from its newest valid checkpoint to its end, as if it had never stopped."""
    use_compilation_cache()
    return _to_the_end(TextSession.resume(Path(path)), checkpoint_seconds, progress)


def _run(
    config: Any,
    sources: Sources,
    *,
    steps: float | None,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_seconds: float = 300.0,
    progress: bool = True,
    force: bool = False,
) -> TextRun:
    use_compilation_cache()
    return _to_the_end(TextSession.start(config, sources, steps=steps, seed=seed, out=out, force=force), checkpoint_seconds, progress)


def _to_the_end(session: TextSession, checkpoint_seconds: float, progress: bool) -> TextRun:
    with catch_signals() as stop, TextProgress(session, sys.stderr if progress else None) as display:
        for report in session.reports(checkpoint_seconds=checkpoint_seconds, stop=stop):
            display.update(report)
    return TextRun(session.path)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
