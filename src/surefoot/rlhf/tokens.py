"""Tokenizers, and the seam between prompt and completion: a model is trained on the very tokens that the sampler sees.

A prompt and its completion are turned into tokens apart and joined as tokens, as sampling joins them; the end token follows.
Special tokens that are written out in a text count as such, as prompts made by hand need it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import nearest
from .batches import Ids, TokenPreference, TokenPrompt, TokenSequence
from .data import Dataset, Demonstration, Preference, Prompt, Row, Text, mapped, without

Overlong = Literal["error", "drop"]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
REPLY = "reply"  # in a conversation that is rendered to see how it ends


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenizer of `transformers`, and what training needs to know of it."""

    tokenizer: Any
    source: str  # as the user named it
    prefix_ids: tuple[int, ...]  # that text begins with, such as the beginning-of-sequence token
    end_id: int  # ends a completion of text
    pad_id: int  # fills rows; never looked at, so that it may be the end token

    @cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(map(int, self.tokenizer.get_vocab().values()))

    @cached_property
    def turn_end_id(self) -> int:
        """Ends a completion in chat: the special token that the template writes after a reply, else `end_id`."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": REPLY}]
        try:
            after = self.render(turns, is_open=False).rpartition(REPLY)[2].strip()
        except ValueError:  # a template for other roles
            return self.end_id
        first = next(iter(self.encode([after])[0].tolist()), self.end_id)
        return first if first in special_ids(self.tokenizer) else self.end_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token after which a completion is over."""
        return (self.end_id,) if self.tokenizer.chat_template is None else tuple(dict.fromkeys((self.end_id, self.turn_end_id)))

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text, with nothing added."""
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
        return [np.array(row, np.int32) for row in rows]

    def encode_prompts(self, prompts: Sequence[Text]) -> list[Ids]:
        """The tokens of each prompt: text after the prefix, chat messages by the template, up to where the assistant's turn begins."""
        texts = [prompt if isinstance(prompt, str) else self.render(prompt, is_open=True) for prompt in prompts]
        prefix = np.array(self.prefix_ids, np.int32)
        return [
            np.concatenate([prefix, ids]) if isinstance(prompt, str) else ids
            for prompt, ids in zip(prompts, self.encode(texts), strict=True)
        ]

    def encode_completions(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[Ids]:
        """The tokens of each completion up to its end token, which is that of the kind of its prompt."""
        ends = [self.end_id if isinstance(prompt, str) else self.turn_end_id for prompt in prompts]
        return [
            ids if len(ids) and ids[-1] in self.stop_ids else np.append(ids, np.int32(end))
            for ids, end in zip(self.encode(completions), ends, strict=True)
        ]

    def decode(self, rows: Sequence[Ids]) -> list[str]:
        """The text of each row of tokens, without special ones; tokens that the tokenizer does not know are left out."""
        return [self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in rows]

    def render(self, messages: Sequence[dict[str, Any]], *, is_open: bool) -> str:
        """Chat messages by the tokenizer's template; if `is_open`, up to where the assistant's turn begins."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {self.source} has no chat template, and the data is chat messages; give the data as text, or put a "
                "chat_template into its tokenizer_config.json."
            )
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=is_open))
        except ImportError:
            raise ValueError(_needs("jinja2")) from None
        except Exception as error:  # whatever a template refuses, it refuses in its own words
            raise ValueError(f"The chat template of {self.source} does not take these messages: {error}.") from error


def load_tokens(source: str | Path) -> Tokens:
    """The tokenizer in a directory, or of a model on the Hugging Face hub; its code is never run. ValueError says what is missing."""
    AutoTokenizer = import_library("transformers").AutoTokenizer
    directory = Path(source).expanduser()
    if directory.is_dir():
        return make_tokens(_from_pretrained(AutoTokenizer, directory, local_files_only=True), source)
    if not HUB_NAME.fullmatch(str(source)) or ("/" in str(source) and directory.parent.is_dir()):
        known = [other.name for other in directory.parent.iterdir()] if directory.parent.is_dir() else []
        raise ValueError(f"There is no directory {str(source)!r}{nearest(directory.name, known)}")
    try:
        tokenizer = _from_pretrained(AutoTokenizer, source, local_files_only=True)  # what was fetched once is there
    except ValueError:
        if not hub_is_reachable():
            raise ValueError(f"There is no directory {str(source)!r}, and the Hugging Face hub cannot be reached.") from None
        tokenizer = _from_pretrained(AutoTokenizer, source, local_files_only=False)
    return make_tokens(tokenizer, source)


def make_tokens(tokenizer: Any, source: str | Path = "this model") -> Tokens:
    """What training needs to know of a tokenizer of `transformers`; ValueError with the remedy where it does not suffice."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {source} has no end token, so that no completion could end; name one of its special tokens: "
            'tokenizer.eos_token = "..." and tokenizer.save_pretrained(...) in Python, or "eos_token" in its tokenizer_config.json.'
        )
    bare, dressed = (tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"] for added in (False, True))
    starts = [start for start in range(len(dressed)) if dressed[start : start + len(bare)] == bare]
    if not bare or not starts:
        raise ValueError(f"The tokenizer of {source} encodes 'a' as {bare}, and as {dressed} with special tokens; it cannot be used.")
    # A token that it puts after a text is left away: what comes after a prompt is the completion.
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Tokens(tokenizer, str(source), tuple(dressed[: starts[0]]), int(tokenizer.eos_token_id), int(pad_id))


def save_tokens(tokens: Tokens, directory: str | Path) -> None:
    """Write the tokenizer as `transformers` and vLLM load it."""
    with _quiet():
        tokens.tokenizer.save_pretrained(directory)


def check_vocabulary(tokens: Tokens, num_embeddings: int) -> None:
    """Raise where the tokenizer has ids that the model has no embedding for. More embeddings than tokens are common, and no fault."""
    if tokens.vocabulary_size > num_embeddings:
        beyond = sorted((number, token) for token, number in tokens.tokenizer.get_vocab().items() if number >= num_embeddings)
        named = ", ".join(f"{token!r} ({number})" for number, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
        raise ValueError(
            f"The tokenizer of {tokens.source} has {len(beyond)} token{'s' * (len(beyond) > 1)} beyond the model's {num_embeddings} "
            f"embeddings: {named}; use the tokenizer that belongs to the model, or give the model more embeddings "
            "(resize_token_embeddings in transformers)."
        )


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of all special tokens, those that have no role among them."""
    return {*tokenizer.all_special_ids, *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)}


# Whole files.


def tokenise_prompts(data: Dataset[Prompt], tokens: Tokens, *, max_prompt_length: int, overlong: Overlong) -> Dataset[TokenPrompt]:
    """The prompts of a file as tokens; one of more than `max_prompt_length` is an error or counted as dropped, never cut."""
    encoded = _prompt_ids(data, tokens)
    found = mapped(data, [TokenPrompt(ids, row.prompt, row.columns, row.line) for row, ids in zip(data.rows, encoded, strict=True)])
    return _fitting(found, "prompt", "max_prompt_length", max_prompt_length, overlong, lambda row: len(row.ids))


def tokenise_demonstrations(data: Dataset[Demonstration], tokens: Tokens, *, max_length: int, overlong: Overlong) -> Dataset[TokenSequence]:
    """Prompts and completions of a file as tokens; longer ones than `max_length` are an error or counted as dropped, never cut."""
    sequences = _sequences(data, tokens, _prompt_ids(data, tokens), [row.completion for row in data.rows], "completion")
    return _fitting(mapped(data, sequences), "prompt and completion", "max_length", max_length, overlong, lambda row: len(row.ids))


def tokenise_preferences(data: Dataset[Preference], tokens: Tokens, *, max_length: int, overlong: Overlong) -> Dataset[TokenPreference]:
    """Pairs of completions of a file as tokens; pairs of which one is longer than `max_length` are an error or counted as dropped."""
    prompts = _prompt_ids(data, tokens)
    chosen = _sequences(data, tokens, prompts, [row.chosen for row in data.rows], "chosen")
    rejected = _sequences(data, tokens, prompts, [row.rejected for row in data.rows], "rejected")
    pairs = [TokenPreference(better, worse, better.line) for better, worse in zip(chosen, rejected, strict=True)]
    return _fitting(
        mapped(data, pairs),
        "prompt and completion",
        "max_length",
        max_length,
        overlong,
        lambda row: max(len(row.chosen.ids), len(row.rejected.ids)),
    )


def _prompt_ids(data: Dataset[Any], tokens: Tokens) -> list[Ids]:
    encoded = tokens.encode_prompts([row.prompt for row in data.rows])
    for row, ids in zip(data.rows, encoded, strict=True):
        if not len(ids):
            raise ValueError(f"{data.path}, line {row.line}: the prompt has no tokens, so nothing comes before the first of a completion.")
    return encoded


def _sequences(data: Dataset[Any], tokens: Tokens, prompts: list[Ids], completions: list[str], name: str) -> list[TokenSequence]:
    encoded = tokens.encode_completions([row.prompt for row in data.rows], completions)
    stops = set(tokens.stop_ids)
    for row, ids in zip(data.rows, encoded, strict=True):
        if not stops.isdisjoint(ids[:-1].tolist()):
            raise ValueError(f"{data.path}, line {row.line}: {name!r} goes on after an end token; end it there.")
    return [
        TokenSequence(np.concatenate([prompt, ids]), len(prompt), row.line)
        for row, prompt, ids in zip(data.rows, prompts, encoded, strict=True)
    ]


def _fitting(data: Dataset[Row], what: str, setting: str, limit: int, overlong: Overlong, length: Callable[[Row], int]) -> Dataset[Row]:
    """`data` if all of it fits into the limit, else an error or the rest of it."""
    if overlong == "drop":
        return without(data, lambda row: length(row) > limit, f"whose {what} is longer than {setting} = {limit}")
    for row in data.rows:
        if length(row) > limit:
            raise ValueError(
                f"{data.path}, line {row.line}: {what} of {length(row)} tokens, more than {setting} = {limit}; raise it, shorten the line, "
                'or leave such lines out with overlong = "drop".'
            )
    return data


# The library.


def import_library(package: str) -> Any:
    """A package of the extra `rlhf`, without the notice of `transformers` that PyTorch is missing, which nothing here needs."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(_needs(package)) from None
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _needs(package: str) -> str:
    return f'Language models need {package}, which is not installed: pip install "surefoot[rlhf]".'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither the logger of `transformers` nor its warnings: what matters here is an error."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _from_pretrained(AutoTokenizer: Any, source: str | Path, *, local_files_only: bool) -> Any:
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)
    except Exception as error:  # the library underneath raises Exception itself for a file that it cannot read
        raise ValueError(f"The tokenizer of {str(source)!r} cannot be loaded: {error}") from error


def hub_is_reachable() -> bool:
    """Can the hub's name be looked up? Where it cannot, asking for a file would be tried again for most of a minute."""
    constants = importlib.import_module("huggingface_hub").constants
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # behind a proxy names are looked up elsewhere
        return not constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(constants.ENDPOINT.rpartition("/")[2].partition(":")[0], 443)
    except OSError:
        return False
    return True
