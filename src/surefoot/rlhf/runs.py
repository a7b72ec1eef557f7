"""Runs on text: started from files, resumed from their record, and what comes out of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from ..training.checkpoint import Checkpoint, read_json
from ..training.seeding import key_for
from ..training.session import Report, Session, fresh_directory, new_record, read_record, whole_number, write_json
from .batches import bucket_lengths, epoch_order, pad
from .data import Dataset, Text, read_demonstrations, read_preferences, read_prompts
from .heads import HEAD_FILE, RewardModel, load_reward_model, save_reward_model, scores_at_end
from .memory import check_memory, plan
from .model import LanguageModel, init_model
from .online import Judges, OnlineTrainer, RunAstray
from .optimisation import TextSettings
from .ppo import GRPO, PPO, RLOO, OnlineSettings
from .pretrained import FILES_OF_A_MODEL, from_hugging_face, load_model, local_directory, save_model
from .rewards import is_function, load_rewards, parse_weighted
from .sampling import generate
from .supervised import SFT, RewardTraining, SupervisedSettings
from .tokens import (
    Tokens,
    check_vocabulary,
    load_tokens,
    save_tokens,
    tokenise_demonstrations,
    tokenise_preferences,
    tokenise_prompts,
)
from .trainers import SupervisedTrainer, TextTrainer

METHODS: dict[str, type] = {"sft": SFT, "reward": RewardTraining, "ppo": PPO, "rloo": RLOO, "grpo": GRPO}
NUM_SAMPLES = 4  # answers of an iteration that are kept
LEAST_ACCURACY = 0.55  # of a reward model
NUM_CENTRED = 256  # demonstrations whose mean score is made 0


class Sources(NamedTuple):
    """What a run was given, by path or name; JSON in its record."""

    model: str
    data: str
    held_out: str | None = None
    demonstrations: str | None = None  # of a reward model: what scores 0 on average
    rewards: tuple[str, ...] = ()
    gold: tuple[str, ...] = ()
    reward_timeout: float | None = None


class TextSession(Session):
    """One run in one process: fine-tuning, a reward model, or policy optimisation on tokens."""

    engine: TextTrainer

    def __init__(self, path: Path, record: dict[str, Any], config: Any, sources: Sources):
        self.config, self.sources = config, sources
        super().__init__(path, record)

    @classmethod
    def start(cls, config: Any, sources: Sources, *, steps: float | None, seed: int, out: str | Path | None, force: bool = False) -> Self:
        """Make a new run directory; ValueError where it exists already or something it needs cannot be used.

        With `force` a reward model may be one that hardly agrees with people.
        """
        seed = whole_number("seed", seed, minimum=0)
        method = method_of(config)
        with fresh_directory(out, f"{method}-{Path(sources.data).stem}") as path:
            record = new_record(0 if steps is None else whole_number("steps", steps, minimum=1), seed) | {"kind": "text", "forced": force}
            session = cls(path, record, config, sources)
            session.record["steps"] = session.engine.num_iterations * session.engine.batch
            session._begin()
        return session

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Continue the run in `path`; CheckpointError where it is no such run, or what it was given has changed."""
        record = read_text_record(path)
        session = cls(path, record, METHODS[record["algorithm"]](**record["config"]), Sources(**record["sources"]))
        session._continue()
        return session

    def prepare(self, opened: ExitStack) -> TextTrainer:
        """Read what the run was given."""
        config, sources, seed = self.config, self.sources, self.record["seed"]
        directory = local_directory(model_directory(sources.model))
        self.tokens = load_tokens(directory)
        self.notes: list[str] = []  # of the start, for the screen
        self._check_memory(config, directory)
        model = load_or_init(directory, key_for(seed, "model"), config)
        check_vocabulary(self.tokens, model.config.vocab_size)
        self.hashes = {"SHA-256 of model": hash_of_model(directory)}
        if isinstance(config, SupervisedSettings):
            return self._prepare_supervised(config, model)
        return self._prepare_online(config, model)

    def _check_memory(self, config: Any, directory: Path) -> None:
        """Look at configurations alone; ValueError where what they describe does not fit."""
        judges = [Path(model_directory(source)) for source, _ in map(parse_weighted, self.sources.rewards) if not is_function(source)]
        shapes = [from_hugging_face(read_json(path / "config.json")) for path in (directory, *judges) if (path / "config.json").exists()]
        longest = min(getattr(config, "max_length", None) or shapes[0].max_positions, shapes[0].max_positions)
        if isinstance(config, OnlineSettings) and config.max_prompt_length:
            longest = min(config.max_prompt_length + config.max_new_tokens, longest)
        self.notes.append(check_memory(plan(config, shapes[0], shapes[1:], longest=longest)))

    def _keep(self, name: str, data: Dataset[Any]) -> Dataset[Any]:
        """Note what a file held."""
        self.hashes[f"SHA-256 of {name}"] = data.sha256
        self.notes.append(str(data))
        return data

    def _prepare_supervised(self, config: SupervisedSettings, model: LanguageModel) -> TextTrainer:
        longest = within(config.max_length, "max_length", model.config.max_positions)
        limits: dict[str, Any] = {"max_length": longest, "overlong": config.overlong}

        def demonstrations(name: str, path: str) -> Dataset[Any]:
            return self._keep(name, tokenise_demonstrations(read_demonstrations(path), self.tokens, **limits))

        self.demonstrations: list[Any] = []
        if isinstance(config, SFT):
            data = demonstrations("data", self.sources.data).rows
            held_out = demonstrations("held_out", self.sources.held_out).rows if self.sources.held_out else []
        else:
            pairs = self._keep("data", tokenise_preferences(read_preferences(self.sources.data), self.tokens, **limits)).rows
            if self.sources.held_out:
                data = pairs
                held_out = self._keep("held_out", tokenise_preferences(read_preferences(self.sources.held_out), self.tokens, **limits)).rows
            else:
                assert isinstance(config, RewardTraining)
                data, held_out = split(pairs, config.held_out_share, self.record["seed"])
            if self.sources.demonstrations:
                self.demonstrations = demonstrations("demonstrations", self.sources.demonstrations).rows[:NUM_CENTRED]
        return SupervisedTrainer(config, model, data, held_out, self.tokens, max_length=longest, seed=self.record["seed"])

    def _prepare_online(self, config: OnlineSettings, model: LanguageModel) -> TextTrainer:
        room = model.config.max_positions - config.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in {model.config.max_positions} positions; "
                "choose less."
            )
        longest = within(config.max_prompt_length, "max_prompt_length", room, f" beside {config.max_new_tokens} new tokens")
        limits: dict[str, Any] = {"max_prompt_length": longest, "overlong": config.overlong}

        def prompts(name: str, path: str) -> Dataset[Any]:
            return self._keep(name, tokenise_prompts(read_prompts(path), self.tokens, **limits))

        data = prompts("data", self.sources.data)
        held_out = prompts("held_out", self.sources.held_out) if self.sources.held_out else None
        columns = data.rows[0].columns
        models = []
        for text in self.sources.rewards:
            source, weight = parse_weighted(text)
            if not is_function(source):
                directory = Path(model_directory(source))
                judge, info = load_reward_model(directory, config.dtype)
                judge = dataclasses.replace(judge, backbone=for_training(judge.backbone, config))
                check_vocabulary(self.tokens, judge.backbone.config.vocab_size)
                self.hashes[f"SHA-256 of {source}"] = hash_of_model(directory)
                self.notes.append(f"{source}: agrees with {info['accuracy']:.1%} of held-out comparisons")
                if info["accuracy"] < LEAST_ACCURACY and not self.record["forced"]:
                    raise ValueError(
                        f"The reward model {source} agrees with {info['accuracy']:.1%} of held-out comparisons, hardly more than chance; "
                        "train a better one, or learn from it all the same with force (--force)."
                    )
                models.append((Path(source).name, judge, weight))
        functions = load_rewards([text for text in self.sources.rewards if is_function(parse_weighted(text)[0])], columns)
        judges = Judges(models, functions, load_rewards(self.sources.gold, columns), self.sources.reward_timeout)
        steps = self.record["steps"] or config.answers * 100
        where = {"longest_prompt": longest, "seed": self.record["seed"], "steps": steps}
        return OnlineTrainer(config, model, judges, data, held_out, self.tokens, **where)

    @property
    def identity(self) -> dict[str, Any]:
        config = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self.config).items()}
        sources = {name: list(value) if isinstance(value, tuple) else value for name, value in self.sources._asdict().items()}
        return {
            "algorithm": method_of(self.config),
            "config": config,
            "sources": sources,
            "hashes": self.hashes,
            "seed": self.record["seed"],
        }

    @property
    def policy(self) -> Writer:
        """The language model as it stands."""
        return Writer(self.engine.model, self.tokens)

    def save_policy(self) -> None:
        """Write the model as a Hugging Face directory, `model` in the run; of a reward model with its head."""
        with replaced(self.path / "model") as directory:
            model = self.engine.model
            if isinstance(self.config, RewardTraining):
                reward_model, info = self._reward_model(model)
                save_reward_model(reward_model, directory, info)
            else:
                save_model(model, directory)
            save_tokens(self.tokens, directory)

    def _reward_model(self, model: LanguageModel) -> tuple[RewardModel, dict[str, Any]]:
        """The reward model with the bias at which demonstrations score 0 on average, and what is to be known of it."""
        trainer = self.engine
        assert isinstance(trainer, SupervisedTrainer)
        head = trainer.learner.trained.head
        found = trainer.judge(trainer.held_out)
        if self.demonstrations:
            batch = trainer.arrays(self.demonstrations, len(self.demonstrations))
            scores = jax.jit(scores_at_end)(model, head, batch.tokens, batch.mask)
            head = dataclasses.replace(head, bias=head.bias - scores.mean())
        return RewardModel(model, head), {"accuracy": found["accuracy"], "centred_on": len(self.demonstrations)}

    def reports(self, **how: Any) -> Iterator[Report]:  # type: ignore[override]
        """Reports of `Session`, with some answers of each iteration kept; where a run goes astray all of its last ones."""
        inner = super().reports(**how)
        try:
            for report in inner:
                self._keep_samples(report.step)
                yield report
        except RunAstray as error:
            write_json(self.path / "evidence.json", {"problem": str(error), "answers": [sample._asdict() for sample in error.samples]})
            raise RunAstray(f"{error} What it answered is in {self.path / 'evidence.json'}.", error.samples) from None
        finally:
            inner.close()

    def _keep_samples(self, step: int) -> None:
        samples = getattr(self.engine, "samples", [])[:NUM_SAMPLES]
        if samples:
            with suppress(OSError), open(self.path / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step} | sample._asdict(), ensure_ascii=False) + "\n" for sample in samples)

    def _restore(self, checkpoint: Checkpoint) -> None:
        super()._restore(checkpoint)
        path = self.path / "samples.jsonl"
        if path.exists():  # what came after the checkpoint will be written again
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.engine.step]
            path.write_text("".join(kept), encoding="utf-8")


class Writer:
    """A language model to hold in one's hand: prompts in, completions out."""

    def __init__(self, model: LanguageModel, tokens: Tokens):
        self.model, self.tokens = model, tokens

    def write(
        self, prompts: Sequence[Text], *, max_new_tokens: int = 128, temperature: float = 1.0, seed: int = 0, batch_size: int = 64
    ) -> list[str]:
        """A completion of each prompt; temperature 0 always takes the most likely token."""
        completions: list[str] = []
        ids = self.tokens.encode_prompts(prompts)
        longest = self.model.config.max_positions - max_new_tokens
        for prompt, row in zip(prompts, ids, strict=True):
            if not 0 < len(row) <= longest:
                raise ValueError(f"The prompt {prompt!r:.80} has {len(row)} tokens; 1 to {longest} fit beside {max_new_tokens} new ones.")
        for begin in range(0, len(ids), batch_size):
            part = ids[begin : begin + batch_size]
            rows = [*part, *[part[0]] * (batch_size - len(part))]
            generated = generate(
                self.model,
                *pad(rows, bucket_lengths(longest), self.tokens.pad_id, side="left"),
                jax.random.fold_in(key_for(seed, "writing"), begin),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_token=self.tokens.stop_ids,
                pad_token=self.tokens.pad_id,
                done=np.arange(batch_size) >= len(part),
            )
            new, mask = (np.asarray(x)[: len(part), -max_new_tokens:] for x in (generated.tokens, generated.response_mask))
            completions += self.tokens.decode([row[kept] for row, kept in zip(new, mask, strict=True)])
        return completions


def load(source: str | Path) -> Writer:
    """The language model of a run, of a Hugging Face directory, or of a name on the hub."""
    directory = local_directory(model_directory(source))
    tokens, (model, _) = load_tokens(directory), load_model(directory)
    check_vocabulary(tokens, model.config.vocab_size)
    return Writer(model, tokens)


def method_of(config: Any) -> str:
    """The name of the method that `config` configures."""
    for name, kind in METHODS.items():
        if type(config) is kind:
            return name
    raise ValueError(f"Expected a configuration ({', '.join(kind.__name__ for kind in METHODS.values())}), got {config!r}.")


def model_directory(source: str | Path) -> str | Path:
    """The model in a run, or `source` itself: a Hugging Face directory, or a name on the hub."""
    return Path(source) / "model" if (Path(source) / "run.json").exists() else source


def load_or_init(directory: Path, key: jax.Array, config: TextSettings) -> LanguageModel:
    """The weights in a directory; random ones where there is but a config.json."""
    if any(path.name != HEAD_FILE for path in directory.glob("*.safetensors*")):
        return for_training(load_model(directory, dtype=config.dtype)[0], config)
    return for_training(init_model(from_hugging_face(read_json(directory / "config.json")), key), config)


def for_training(model: LanguageModel, config: TextSettings) -> LanguageModel:
    """The model as the settings want its gradients to be taken."""
    return dataclasses.replace(model, gradient_checkpointing=config.gradient_checkpointing)


def hash_of_model(directory: Path) -> str:
    """SHA-256 over configuration, weights and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in FILES_OF_A_MODEL for path in directory.glob(pattern)):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def within(wanted: int | None, name: str, room: int, beside: str = "") -> int:
    """A length that the positions of a model allow: `wanted`, or all there are."""
    if (wanted or 0) > room:
        raise ValueError(f"The positions of the model leave room for {room} tokens{beside}; {name} is {wanted}: choose less.")
    return room if wanted is None else wanted


def split(rows: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(most of the rows, the held-out rest), at least one in each."""
    order = epoch_order(0, len(rows), seed)
    num = min(max(1, round(share * len(rows))), len(rows) - 1)
    held_out = set(order[:num].tolist())
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """A directory to write in, which takes the place of `directory` when it is complete."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            os.rename(directory, old)
        os.rename(temporary, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_text_record(path: Path) -> dict[str, Any]:
    """The run.json of a run on text; CheckpointError where there is none that can be used."""

    def check(record: dict[str, Any]) -> None:
        try:
            METHODS[record["algorithm"]](**record["config"])
            Sources(**record["sources"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is not the record of a run on text: {error!r}.") from error

    return read_record(path, check, "algorithm", "config", "sources", "hashes", "forced")
