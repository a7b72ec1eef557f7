"""Data of language models: JSONL under the names that everyone uses, and errors that name the line.

One JSON object on each line. What is answered is text, or chat messages such as [{"role": "user", "content": "..."}]:

    demonstrations   prompt and completion, or messages that end with the assistant's
    preferences      prompt, chosen and rejected; in chat the prompt may stand before both replies instead
    prompts          prompt, or messages that end with the user's; further columns reach reward functions by name
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, NoReturn, Protocol, TypeVar

from ..config import nearest

MAX_LINE_BYTES = 16 * 2**20  # a file without line ends must not fill the memory
NUM_LINES_NAMED = 5  # of those that a message is about
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin a file in UTF-8 with it
OTHER_FORMATS = {
    b"\x1f\x8b": "compressed by gzip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
KNOWN = {"prompt", "completion", "messages", "chosen", "rejected"}
RESERVED_COLUMNS = ("prompts", "completions")  # what reward functions call the other things that they are given

Message = dict[str, Any]
Text = str | list[Message]
Record = dict[str, Any]


class Prompt(NamedTuple):
    """What is to be answered, and the further columns of its line."""

    prompt: Text
    columns: dict[str, Any]
    line: int


class Demonstration(NamedTuple):
    """A prompt with the answer that one should give."""

    prompt: Text
    completion: str
    line: int


class Preference(NamedTuple):
    """A prompt with two answers, the better one first."""

    prompt: Text
    chosen: str
    rejected: str
    line: int


class _Row(Protocol):
    @property
    def line(self) -> int: ...


Row = TypeVar("Row", bound=_Row)
NewRow = TypeVar("NewRow", bound=_Row)


@dataclass(frozen=True)
class Dataset(Generic[Row]):
    """The records of one file, and why which of its lines were left out."""

    path: Path
    sha256: str  # of the file
    rows: list[Row]
    dropped: dict[str, list[int]] = field(default_factory=dict)  # lines by reason

    def __str__(self) -> str:
        """What was read, in one line for the user: nothing is left out in silence."""
        sentence = f"{self.path}: {len(self.rows):,} record{'s' * (len(self.rows) != 1)}"
        if not self.dropped:
            return sentence
        reasons = "; ".join(f"{len(lines):,} {why} ({_named(lines)})" for why, lines in self.dropped.items())
        return f"{sentence}; dropped {sum(map(len, self.dropped.values())):,}: {reasons}"


def read_demonstrations(path: str | Path) -> Dataset[Demonstration]:
    """The prompts and completions of a JSONL file; ValueError with the line of what cannot be one."""
    return _read(path, _demonstration)


def read_preferences(path: str | Path) -> Dataset[Preference]:
    """The preferences of a JSONL file, without those between equal answers; ValueError with the line of what cannot be one."""
    return without(_read(path, _preference), lambda row: row.chosen == row.rejected, "whose chosen equals rejected")


def read_prompts(path: str | Path) -> Dataset[Prompt]:
    """The prompts of a JSONL file with their further columns, the same on every line; ValueError with the line of what cannot be one."""
    data = _read(path, _prompt)
    first = data.rows[0]
    for row in data.rows:
        if odd := row.columns.keys() ^ first.columns.keys():
            has, lacks = (row, first) if odd & row.columns.keys() else (first, row)
            raise ValueError(
                f"{path}: line {has.line} has {sorted(odd & has.columns.keys())[0]!r}, which line {lacks.line} has not; reward functions "
                "receive whole columns, so give every line the same ones, with null where there is nothing to say."
            )
    return data


def without(data: Dataset[Row], is_dropped: Callable[[Row], bool], why: str) -> Dataset[Row]:
    """`data` without some rows, whose lines are kept under `why`; ValueError where none is left."""
    flags = [is_dropped(row) for row in data.rows]
    if not any(flags):
        return data
    lines = [row.line for row, flag in zip(data.rows, flags, strict=True) if flag]
    rest = replace(data, rows=[row for row, flag in zip(data.rows, flags, strict=True) if not flag], dropped=data.dropped | {why: lines})
    if not rest.rows:
        raise ValueError(f"{rest}. Nothing is left to learn from.")
    return rest


def mapped(data: Dataset[Row], rows: list[NewRow]) -> Dataset[NewRow]:
    """The same file with other rows, such as its tokens."""
    return Dataset(data.path, data.sha256, rows, data.dropped)


def refuse_changed(data: Dataset[Any], sha256: str) -> None:
    """Raise where the file is not the one that a run began with."""
    if data.sha256 != sha256:
        raise ValueError(
            f"{data.path} has changed since this run began (SHA-256 was {sha256[:12]}..., is {data.sha256[:12]}...), so the run cannot "
            "go on as it would have; bring the old file back, or start a new run."
        )


# From bytes to records.


def _read(path: str | Path, convert: Callable[[Record], NamedTuple]) -> Dataset[Any]:
    path, digest, rows = Path(path), hashlib.sha256(), []
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            digest.update(line)
            try:
                if number == 1:
                    line = _jsonl(line)
                if line.strip():
                    rows.append(convert(_parse(line))._replace(line=number))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; it should hold one JSON object on each line.")
    return Dataset(path, digest.hexdigest(), rows)


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        known = [other.name for other in path.parent.glob("*.json*")] if path.parent.is_dir() else []
        raise ValueError(f"There is no file {str(path)!r}{nearest(path.name, known)}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give a JSONL file.") from error


def _jsonl(first_line: bytes) -> bytes:
    """The first line without a byte order mark; ValueError where the file is plainly something else than JSONL."""
    for start, what in OTHER_FORMATS.items():
        if first_line.startswith(start):
            raise ValueError(f"the file is {what}; give JSONL in UTF-8, one JSON object on each line.")
    line = first_line.removeprefix(BYTE_ORDER_MARK)
    if line.lstrip().startswith(b"["):
        raise ValueError("the file is one JSON array; put each of its objects on a line of its own, as `jq -c '.[]'` does.")
    return line


def _parse(line: bytes) -> Record:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB; put each JSON object on a line of its own.")
    try:
        text = line.decode()
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20].strip()
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}, near {near!r}; a line holds one whole JSON object.") from error
    except RecursionError:
        raise ValueError("not a record: it is nested too deeply.") from None
    if not isinstance(record, dict):
        raise ValueError(f'{_kind(record)}, but a line holds one JSON object with names, such as {{"prompt": ...}}.')
    return record


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice; name it once.")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null, or leave the line out.")


# From records to what they say.


def _demonstration(record: Record) -> Demonstration:
    if "messages" in record:
        _refuse_both(record, "prompt", "completion")
        messages = _messages(record, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("'messages' must end with the assistant's, which is the completion, after at least one other.")
        return Demonstration(messages[:-1], messages[-1]["content"], 0)
    prompt, (completion,) = _exchange(record, "completion", form="prompt and completion, or messages")
    return Demonstration(prompt, completion, 0)


def _preference(record: Record) -> Preference:
    prompt, (chosen, rejected) = _exchange(record, "chosen", "rejected", form="prompt, chosen and rejected")
    return Preference(prompt, chosen, rejected, 0)


def _prompt(record: Record) -> Prompt:
    name = "messages" if "messages" in record else "prompt"
    if name == "messages":
        _refuse_both(record, "prompt")
    prompt = _messages(record, name) if name == "messages" else _text(record, name, form="prompt, or messages")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError(f"{name!r} ends with the assistant's message, so nothing is left to answer; end it with the user's.")
    columns = {column: value for column, value in record.items() if column != name}
    for column in RESERVED_COLUMNS:
        if column in columns:
            raise ValueError(f"a column cannot be called {column!r}, as reward functions are given something else by that name; rename it.")
    return Prompt(prompt, columns, 0)


def _exchange(record: Record, *names: str, form: str) -> tuple[Text, list[str]]:
    """(prompt, the reply under each name): all are text, or all are chat, in which the prompt may stand before each reply."""
    replies = [_text(record, name, form) for name in names]
    chats = [reply for reply in replies if not isinstance(reply, str)]
    is_chat = len(chats) == len(replies)
    if is_chat and "prompt" not in record and len(chats[0]) > 1:
        prompt: Text = chats[0][:-1]
    else:
        prompt = _text(record, "prompt", form)
    if is_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if is_chat == isinstance(prompt, str) or 0 < len(chats) < len(replies):
        kinds = ", ".join(f"{name!r} is {'text' if isinstance(record[name], str) else 'chat'}" for name in ("prompt", *names))
        raise ValueError(f"{kinds}; give all of them as text, or all as chat messages.")
    for name, chat in zip(names, chats, strict=False):
        if chat[-1]["role"] != "assistant" or chat[:-1] not in ([], prompt):
            raise ValueError(f"{name!r} must be one message of the assistant's, alone or after the messages of the prompt.")
    return prompt, [reply if isinstance(reply, str) else reply[-1]["content"] for reply in replies]


def _text(record: Record, name: str, form: str) -> Text:
    """Text or chat messages under a name."""
    if name not in record:
        raise ValueError(f"no {name!r} among {sorted(record)}{nearest(name, record.keys() - KNOWN)} A line here has {form}.")
    value = record[name]
    if isinstance(value, list):
        return _messages(record, name)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {_kind(value)}; give text, or a list of chat messages.")
    return _encodable(value, repr(name))


def _messages(record: Record, name: str) -> list[Message]:
    messages = record[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name!r} is {_kind(messages)}; give a list of chat messages, at least one.")
    for index, message in enumerate(messages):
        where = f"message {index + 1} of {name!r}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'{where} is not of the form {{"role": "user", "content": "..."}}: {_kind(message)}.')
        for part in ("role", "content"):
            if not isinstance(message[part], str):
                raise ValueError(f"the {part} of {where} is {_kind(message[part])}; only text is learned from here.")
        _encodable(message["content"], where)
    return messages


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character, \\u{ord(text[error.start]):04x} at {error.start + 1}; mend it.") from error
    return text


def _refuse_both(record: Record, *others: str) -> None:
    for other in others:
        if other in record:
            raise ValueError(f"both 'messages' and {other!r}; give one or the other.")


def _kind(value: Any) -> str:
    """A JSON value in a few words."""
    if isinstance(value, dict):
        return f"an object with {sorted(value)}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return {type(None): "null", bool: "true or false", str: f"the text {value!r:.40}"}.get(type(value), f"the number {value!r:.40}")


def _named(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - NUM_LINES_NAMED:,} more" if len(lines) > NUM_LINES_NAMED else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:NUM_LINES_NAMED]))}{more}"
