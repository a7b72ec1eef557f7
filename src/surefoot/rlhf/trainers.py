"""The moving parts of a run on text: from examples or prompts to a gradient step, one iteration at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..training.checkpoint import Checkpoint
from ..training.engine import NonFiniteError
from ..training.seeding import key_for
from ..types import PyTree
from . import supervised
from .batches import Cursor, TokenPreference, TokenSequence, bucket_lengths, sequence_batch, take
from .devices import device_mesh, place_rows, place_weights, weight_shardings
from .model import LanguageModel
from .optimisation import model_of
from .tokens import Tokens

EVALUATIONS = 10  # of held-out data in a run


class TextTrainer:
    """Counters, the place in the data, and the learner's state; `advance` runs one iteration."""

    def __init__(self, config: Any, *, seed: int, steps: int, batch: int, data_size: int):
        self.config, self.seed, self.batch, self.data_size = config, seed, batch, data_size
        self.iteration = 0
        self.num_iterations = max(1, -(-steps // batch))
        self.cursor = Cursor()
        self.mesh = device_mesh(config.weight_devices)
        self.learner: Any = None
        self.steps_advanced = batch
        self.seconds: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Sequences so far."""
        return self.iteration * self.batch

    @property
    def total_steps(self) -> int:
        """Sequences of the whole run: whole batches."""
        return self.num_iterations * self.batch

    @property
    def finished(self) -> bool:
        return self.iteration >= self.num_iterations

    @property
    def progress(self) -> np.float32:
        """The fraction of the run that is over."""
        return np.float32(self.iteration / self.num_iterations)

    @property
    def evaluates(self) -> bool:
        """Whether held-out data is looked at after this iteration."""
        done = self.iteration + 1
        return done * EVALUATIONS // self.num_iterations > self.iteration * EVALUATIONS // self.num_iterations

    def advance(self) -> dict[str, Any]:
        """One iteration; its metrics, as numbers (None where there is nothing to report)."""
        began = time.perf_counter()
        self.seconds = {}
        metrics = self.iterate()
        self.iteration += 1
        self.seconds["total"] = time.perf_counter() - began
        return {name: None if value is None or not np.isfinite(value) else float(value) for name, value in metrics.items()}

    def iterate(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def compile(self, init: Callable[..., PyTree], update: Callable[..., tuple[PyTree, Any]], *arguments: Any) -> None:
        """Make the state that learning begins with, `init(*arguments)`, and a program of `update`, which writes it in place."""
        place = None if self.mesh is None else weight_shardings(jax.eval_shape(init, *arguments), self.mesh)
        self.learner = jax.jit(init, out_shardings=place)(*arguments)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=None if place is None else (place, None))

    def take(self, num: int) -> list[int]:
        """The numbers of the next examples."""
        index, self.cursor = take(self.cursor, num, size=self.data_size, seed=self.seed)
        return [int(i) for i in index]

    def timed(self, part: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """What the function gives, once it is there; its time is added to a part of the iteration's."""
        began = time.perf_counter()
        result = jax.block_until_ready(function(*arguments, **keywords))
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began
        return result

    def snapshot(self) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """(trees of arrays, JSON) from which `restore` continues to the bit."""
        return {"learner": self.learner}, {"iteration": self.iteration, "cursor": list(self.cursor)}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from what `snapshot` gave."""
        self.learner = place_weights(checkpoint.restore("learner", self.learner), self.mesh)
        self.iteration, self.cursor = checkpoint.info["iteration"], Cursor(*checkpoint.info["cursor"])


class SupervisedTrainer(TextTrainer):
    """Gradient steps on a file of demonstrations or comparisons."""

    def __init__(
        self,
        config: supervised.SupervisedSettings,
        model: LanguageModel,
        data: Sequence[Any],
        held_out: Sequence[Any],
        tokens: Tokens,
        *,
        max_length: int,
        seed: int,
    ):
        steps = round(config.epochs * len(data))
        super().__init__(config, seed=seed, steps=max(steps, 1), batch=config.minibatch_size, data_size=len(data))
        self.data, self.held_out, self.tokens, self.lengths = data, held_out, tokens, bucket_lengths(max_length)
        model = place_weights(model, self.mesh)
        self.base = model if config.lora_rank else None
        self.compile(partial(supervised.init, config), partial(supervised.update, config), model, key_for(seed, "parameters"))
        self._judge = jax.jit(self._judged)

    def arrays(self, examples: Sequence[Any], rows: int) -> Any:
        """Examples as `Sequences` of `rows` rows, or as a pair of them; rows that are too many do not count."""
        if isinstance(examples[0], TokenPreference):
            longest = max(len(answer.ids) for pair in examples for answer in (pair.chosen, pair.rejected))
            width = [min(length for length in self.lengths if length >= longest)]
            return tuple(self._sequences(answers, rows, width) for answers in zip(*((p.chosen, p.rejected) for p in examples), strict=True))
        return self._sequences(examples, rows, self.lengths)

    def _sequences(self, examples: Sequence[TokenSequence], rows: int, lengths: Sequence[int]) -> supervised.Sequences:
        filled = [*examples, *[examples[0]] * (rows - len(examples))]
        batch = sequence_batch(filled, lengths, self.tokens.pad_id)
        counts = np.arange(rows) < len(examples)
        return place_rows(supervised.Sequences(batch.ids, batch.mask, batch.is_completion, counts), self.mesh)

    def iterate(self) -> Mapping[str, Any]:
        batch = self.arrays([self.data[i] for i in self.take(self.batch)], self.batch)
        self.learner, metrics = self.timed("learning", self._update, self.learner, batch, self.base, self.progress)
        metrics = jax.device_get(metrics)
        if not metrics.pop("finite"):
            raise NonFiniteError(
                f"Iteration {self.iteration} (after {self.step} sequences) was not finite: loss = {metrics['loss']}. The step was not "
                "taken; the parameters are those from before it. Try a smaller learning_rate or max_grad_norm."
            )
        if self.held_out and self.evaluates:
            metrics |= {f"held_out_{name}": value for name, value in self.judge(self.held_out).items()}
        return metrics

    @property
    def model(self) -> LanguageModel:
        """The language model, with what was trained in it."""
        trained = self.learner.trained
        return model_of(self.base, trained.backbone if isinstance(trained, supervised.Scorer) else trained)

    def _judged(self, trained: Any, base: LanguageModel | None, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        if isinstance(trained, supervised.Scorer):
            _, metrics = supervised.comparison_loss(model_of(base, trained.backbone), trained.head, batch)
            return metrics, jnp.sum(batch[0].counts)
        loss, count = supervised.completion_loss(model_of(base, trained), batch)
        return {"loss": loss}, count

    def judge(self, examples: Sequence[Any]) -> dict[str, float]:
        """Mean loss, and what else there is, on examples that are not learned from."""
        totals: dict[str, float] = {}
        number = 0.0
        for begin in range(0, len(examples), self.batch):
            batch = self.arrays(examples[begin : begin + self.batch], self.batch)
            sums, count = jax.device_get(self._judge(self.learner.trained, self.base, batch))
            number += float(count)
            totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
        return {name: total / number for name, total in totals.items()}
