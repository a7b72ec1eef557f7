"""The command line of language models: `surefoot rlhf VERB ...`. Each method's options are its configuration's fields."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from .cli import HELP, fail, parse

USAGE = """usage: surefoot rlhf VERB ...

  demo                 from data to an aligned model in a few minutes, on a CPU and without network
  sft                  fine-tune a model on prompts and completions
  reward               train a reward model on comparisons
  ppo                  optimise a model against rewards: actor, reference, critic, reward
  rloo | grpo          the same with the other answers to a prompt in the critic's place
  sample MODEL         write completions

A stopped run goes on with `surefoot train --resume RUN`. `surefoot rlhf VERB --help` tells more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every run on text needs."""

    model: str
    """The model to begin with: a run, a Hugging Face directory (with a config.json alone the weights are random), or a hub name."""
    held_out: Path | None = None
    """Examples or prompts that are not learned from, to see how it goes."""
    seed: int = 0
    """Everything random in the run follows from it."""
    out: Path | None = None
    """The run directory; by default a new one under runs/."""
    checkpoint_seconds: float = 300.0
    """Time between checkpoints; there is always one at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedOptions(RunOptions):
    """Learn from a file of examples."""

    data: Path
    """JSONL: prompt and completion, or messages; for reward prompt, chosen and rejected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions(SupervisedOptions):
    """Learn from a file of comparisons."""

    demonstrations: Path | None = None
    """Prompts and completions whose mean reward shall be 0; by default those that `model` was fine-tuned on, if it is a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineOptions(RunOptions):
    """Learn from answers to prompts."""

    prompts: Path
    """JSONL: prompt, or messages, and further columns for reward functions."""
    reward: tuple[str, ...]
    """Reward models (directories of runs) and functions (file.py:function, module:function), each with =WEIGHT if it is not 1."""
    gold: tuple[str, ...] = ()
    """Reward functions that are only watched, never learned from."""
    reward_timeout: float | None = None
    """Seconds that a reward function has for one batch."""
    steps: float | None = None
    """Answers in all; by default 100 iterations."""
    force: bool = False
    """Learn from a reward model even if it hardly agrees with people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Write completions of prompts."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run, a Hugging Face directory, or a hub name."""
    prompt: tuple[str, ...]
    """What is to be completed."""
    max_new_tokens: int = 128
    """Longest completion."""
    temperature: float = 1.0
    """0 takes the most likely token every time."""
    seed: int = 0
    """Of what is drawn."""


def main(argv: list[str]) -> None:
    """One command of `surefoot rlhf`."""
    if not argv or argv[0] in HELP:
        print(USAGE)
        sys.exit(0 if argv else 2)
    from .config import nearest
    from .rlhf.runs import METHODS

    verbs: dict[str, Callable[[list[str]], None]] = {"demo": _demo, "sample": _sample} | dict.fromkeys(METHODS, lambda _: None)
    if argv[0] not in verbs:
        fail(f"there is no verb {argv[0]!r}{nearest(argv[0], verbs)}\n\n{USAGE}", code=2)
    if argv[0] in METHODS:
        _train(argv[0], argv[1:])
    else:
        verbs[argv[0]](argv[1:])


def _train(name: str, argv: list[str]) -> None:
    from .rlhf import api
    from .rlhf.runs import METHODS
    from .rlhf.supervised import SFT, SupervisedSettings

    method = METHODS[name]
    options: Any = OnlineOptions
    if issubclass(method, SupervisedSettings):
        options = SupervisedOptions if method is SFT else RewardOptions
    kind = dataclasses.make_dataclass("Arguments", [("run", options), (name, method, method())])
    given = parse(kind, argv, f"rlhf {name}", description=method.__doc__)
    settings, defaults = getattr(given, name), method()
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    config = method(**{setting: value for setting, value in chosen.items() if value != getattr(defaults, setting)})
    run = given.run
    shared: dict[str, Any] = {"seed": run.seed, "out": run.out, "checkpoint_seconds": run.checkpoint_seconds, "held_out": run.held_out}
    if isinstance(run, OnlineOptions):
        watched = {"gold": run.gold, "reward_timeout": run.reward_timeout, "steps": run.steps, "force": run.force}
        finish(api.optimise(config, model=run.model, prompts=run.prompts, rewards=run.reward, **watched, **shared))
    elif isinstance(run, RewardOptions):
        finish(api.train_reward(config, model=run.model, data=run.data, demonstrations=run.demonstrations, **shared))
    else:
        finish(api.fine_tune(config, model=run.model, data=run.data, **shared))


def resume(path: Path, checkpoint_seconds: float) -> None:
    """Continue a run on text to its end."""
    from .rlhf import api

    finish(api.resume(path, checkpoint_seconds=checkpoint_seconds))


def finish(run: Any) -> None:
    """Say where everything is."""
    print(f"run     {run.path}\nmodel   {run.path / 'model'}\nreport  surefoot report {run.path}")


def _sample(argv: list[str]) -> None:
    from .rlhf import api

    options = parse(SampleOptions, argv, "rlhf sample")
    if not options.prompt:
        fail("sample expects at least one --prompt", code=2)
    writer = api.load(options.model)
    how = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    for completion in writer.write(list(options.prompt), **how):
        print(completion)


def _demo(argv: Sequence[str]) -> None:
    from .rlhf.demo import DemoOptions, demo

    demo(parse(DemoOptions, list(argv), "rlhf demo"))
