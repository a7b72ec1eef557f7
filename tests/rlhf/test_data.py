"""JSONL is read under everyone's names, what is wrong is named by its line, and a resumed run goes on with the very next example."""

import json
import re

import numpy as np
import pytest

from surefoot.rlhf import data
from surefoot.rlhf.batches import Cursor, TokenSequence, bucket_lengths, epoch_order, pad, sequence_batch, take
from surefoot.rlhf.data import read_demonstrations, read_preferences, read_prompts, refuse_changed, without

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a sea."}]
NORTH, DEAD = {"role": "assistant", "content": "The North Sea."}, {"role": "assistant", "content": ""}
READERS = {"demonstrations": read_demonstrations, "preferences": read_preferences, "prompts": read_prompts}


def write(tmp_path, *lines, name="data.jsonl"):
    """A file of these lines: bytes and text as they are, anything else as JSON."""
    parts = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines]
    path = tmp_path / name
    path.write_bytes(b"\n".join(parts))
    return path


def read(reader, tmp_path, *lines):
    return READERS[reader](write(tmp_path, *lines))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "a", "completion": " b", "source": "web"}, ("a", " b")),
        ({"prompt": "a", "completion": ""}, ("a", "")),
        ({"prompt": ASK, "completion": [NORTH]}, (ASK, "The North Sea.")),
        ({"messages": [*ASK, NORTH]}, (ASK, "The North Sea.")),
        ({"messages": [*ASK, NORTH, ASK[1], DEAD]}, ([*ASK, NORTH, ASK[1]], "")),
        ({"prompt": "a", "completion": [NORTH]}, ([{"role": "user", "content": "a"}], "The North Sea.")),
        ({"prompt": "Überfahrt \U0001f6a2", "completion": "\x00\u2028"}, ("Überfahrt \U0001f6a2", "\x00\u2028")),
    ],
)
def test_demonstrations(tmp_path, line, expected):
    assert read("demonstrations", tmp_path, line).rows == [(*expected, 1)]


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ({"prompt": ASK, "chosen": [NORTH], "rejected": [DEAD]}, ASK),
        ({"prompt": ASK, "chosen": [*ASK, NORTH], "rejected": [*ASK, DEAD]}, ASK),
        ({"chosen": [*ASK, NORTH], "rejected": [*ASK, DEAD]}, ASK),
        ({"prompt": "Name a sea.", "chosen": [ASK[1], NORTH], "rejected": [ASK[1], DEAD]}, ASK[1:]),
        ({"prompt": "Name a sea.", "chosen": "The North Sea.", "rejected": ""}, "Name a sea."),
    ],
)
def test_preferences_in_all_their_forms_say_the_same(tmp_path, line, prompt):
    assert read("preferences", tmp_path, line).rows == [(prompt, "The North Sea.", "", 1)]


def test_prompts_keep_their_further_columns(tmp_path):
    found = read("prompts", tmp_path, {"prompt": "1+1=", "answer": 2, "tags": []}, {"tags": ["x"], "prompt": ASK, "answer": None})
    assert found.rows == [("1+1=", {"answer": 2, "tags": []}, 1), (ASK, {"tags": ["x"], "answer": None}, 2)]
    assert read("prompts", tmp_path, {"messages": ASK, "answer": "x"}).rows == [(ASK, {"answer": "x"}, 1)]


def test_byte_order_mark_carriage_returns_and_blank_lines_are_no_faults(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf", b'{"prompt": "a"}\r', b"", b"  \r", b'{"prompt": "b"}')
    assert read_prompts(path).rows == [("a", {}, 2), ("b", {}, 5)]
    assert read("prompts", tmp_path, b'\xef\xbb\xbf{"prompt": "a"}').rows == [("a", {}, 1)]


GOOD = {"prompt": "a", "completion": "b"}
BYTES_FAULTS = [
    (b'{"prompt": "caf\xe9"}', r"byte 16 \(0xe9\) is not UTF-8; save the file as UTF-8"),
    (b'{"prompt": "a" "b"}', r"not JSON: Expecting ',' delimiter at column 16, near .*one whole JSON object"),
    (b"{", "not JSON: Expecting property name"),
    (b'{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data at column 17"),
    (b'{"prompt": NaN}', "NaN is not JSON; write null"),
    (b'{"prompt": "a", "n": -Infinity}', "-Infinity is not JSON"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
    (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "'y' is there twice"),
    (b'{"prompt": "\\ud83d"}', r"'prompt' holds half a character, \\ud83d at 1"),
    (b'"text"', "the text 'text', but a line holds one JSON object"),
    (b"null", "null, but a line holds one JSON object"),
    (b"[" * 100_000, "not a record: it is nested too deeply"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "message"), BYTES_FAULTS, ids=lambda value: repr(value[:30]))
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 812: {message}"):
        read("prompts", tmp_path, *[{"prompt": "fine"}] * 811, line)


@pytest.mark.parametrize(
    ("reader", "line", "message"),
    [
        ("demonstrations", {"prompt": "a"}, r"no 'completion' among \['prompt'\]\. A line here has prompt and completion, or messages\.$"),
        ("demonstrations", {"prompt": "a", "Completion": "b"}, r"no 'completion' .*, did you mean 'Completion'\?"),
        ("demonstrations", {"completion": "b"}, r"no 'prompt' among \['completion'\]"),
        ("demonstrations", {}, r"no 'completion' among \[\]"),
        ("demonstrations", {"prompt": 3, "completion": "b"}, "'prompt' is the number 3; give text, or a list of chat messages"),
        ("demonstrations", {"prompt": None, "completion": "b"}, "'prompt' is null"),
        ("demonstrations", {"prompt": "a", "completion": {"text": "b"}}, r"'completion' is an object with \['text'\]"),
        ("demonstrations", {"prompt": ASK, "completion": "b"}, "'prompt' is chat, 'completion' is text; give all of them as text, or"),
        ("demonstrations", {"prompt": ASK, "completion": [ASK[1]]}, "'completion' must be one message of the assistant's"),
        ("demonstrations", {"prompt": ASK, "completion": []}, "'completion' is an empty list; give a list of chat messages"),
        ("demonstrations", {"messages": ASK}, "'messages' must end with the assistant's"),
        ("demonstrations", {"messages": [NORTH]}, "'messages' must end with the assistant's, .* after at least one other"),
        ("demonstrations", {"messages": "hello"}, "'messages' is the text 'hello'; give a list of chat messages"),
        ("demonstrations", {"messages": [*ASK, NORTH], "prompt": "a"}, "both 'messages' and 'prompt'"),
        (
            "demonstrations",
            {"messages": [{"from": "human", "value": "a"}]},
            r"message 1 of 'messages' is not of the form .*\['from', 'value'\]",
        ),
        (
            "demonstrations",
            {"messages": [ASK[1], {"role": "assistant", "content": None}]},
            "the content of message 2 of 'messages' is null; only",
        ),
        ("demonstrations", {"messages": [ASK[1], {"role": 1, "content": "a"}]}, "the role of message 2 of 'messages' is the number 1"),
        ("demonstrations", {"messages": [{"role": "user", "content": "\udc00"}, NORTH]}, r"message 1 of 'messages' holds half a character"),
        ("preferences", {"prompt": "a", "chosen": "b"}, "no 'rejected'"),
        ("preferences", {"chosen": "b", "rejected": "c"}, "no 'prompt'"),
        (
            "preferences",
            {"prompt": "a", "chosen": "b", "rejected": [NORTH]},
            "'prompt' is text, 'chosen' is text, 'rejected' is chat; give all",
        ),
        ("preferences", {"prompt": ASK, "chosen": "b", "rejected": "c"}, "'prompt' is chat, 'chosen' is text"),
        ("preferences", {"chosen": [*ASK, NORTH], "rejected": [ASK[1], DEAD]}, "'rejected' must be one message of the assistant's"),
        ("preferences", {"prompt": "Name a lake.", "chosen": [ASK[1], NORTH], "rejected": [ASK[1], DEAD]}, "'chosen' must be one message"),
        ("preferences", {"chosen": [NORTH], "rejected": [DEAD]}, "no 'prompt'"),
        ("prompts", {"question": "a"}, r"no 'prompt' among \['question'\]\. A line here has prompt, or messages\."),
        ("prompts", {"messages": [*ASK, NORTH]}, "'messages' ends with the assistant's message, so nothing is left to answer"),
        ("prompts", {"messages": "hello"}, "'messages' is the text 'hello'; give a list of chat messages"),
        ("prompts", {"messages": ASK, "prompt": "a"}, "both 'messages' and 'prompt'"),
        ("prompts", {"prompt": "a", "completions": []}, "a column cannot be called 'completions'"),
    ],
)
def test_a_record_of_the_wrong_form_is_named_with_what_to_do(tmp_path, reader, line, message):
    good = {
        "demonstrations": GOOD,
        "preferences": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "prompts": {"prompt": "a"},
    }
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: {message}"):
        read(reader, tmp_path, good[reader], line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.jsonl is empty; it should hold one JSON object on each line"),
        (b"\n \r\n", "data.jsonl is empty"),
        (b'[\n{"prompt": "a"}]', "line 1: the file is one JSON array; put each of its objects on a line of its own"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 1: the file is UTF-16; give JSONL in UTF-8"),
        (b"\x1f\x8b\x08\x00", "line 1: the file is compressed by gzip"),
        (b"PAR1\x15\x04", "line 1: the file is Parquet"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read("prompts", tmp_path, content)


def test_a_huge_line_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 2**20)
    longest = {"prompt": "a" * (2**20 - len('{"prompt": ""}'))}
    assert len(read("prompts", tmp_path, longest).rows) == 1  # the last line of a file has no line end
    with pytest.raises(ValueError, match="line 2: longer than 1 MiB; put each JSON object on a line of its own"):
        read("prompts", tmp_path, {"prompt": "a"}, {"prompt": "a" * 2**22})


def test_a_missing_file_is_refused_with_the_nearest(tmp_path):
    write(tmp_path, {"prompt": "a"}, name="prompts.jsonl")
    with pytest.raises(ValueError, match=r"There is no file '.*prompt\.jsonl', did you mean 'prompts\.jsonl'\?"):
        read_prompts(tmp_path / "prompt.jsonl")
    with pytest.raises(ValueError, match=r"There is no file '.*a\.jsonl'\.$"):
        read_prompts(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(ValueError, match="cannot be read: Is a directory; give a JSONL file"):
        read_prompts(tmp_path)


def test_columns_are_the_same_on_every_line(tmp_path):
    with pytest.raises(ValueError, match=r"line 1 has 'answer', which line 3 has not; .* null where there is nothing to say"):
        read("prompts", tmp_path, {"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 1}, {"prompt": "a"})
    with pytest.raises(ValueError, match="line 2 has 'b', which line 1 has not"):
        read("prompts", tmp_path, {"prompt": "a"}, {"prompt": "a", "b": 1})


def test_what_is_left_out_is_counted_and_said(tmp_path):
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    found = read("preferences", tmp_path, *[equal] * 6, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "aa"} | equal)
    assert found.rows == [("a", "b", "c", 7)]
    assert str(found).endswith("data.jsonl: 1 record; dropped 7: 7 whose chosen equals rejected (lines 1, 2, 3, 4, 5 and 2 more)")
    prompts = read("prompts", tmp_path, {"prompt": "a"}, {"prompt": "bb"}, {"prompt": "ccc"})
    assert re.search(r"data\.jsonl: 3 records$", str(prompts))
    shorter = without(without(prompts, lambda row: len(row.prompt) > 2, "too long"), lambda row: row.prompt == "a", "dull")
    assert str(shorter).endswith("1 record; dropped 2: 1 too long (line 3); 1 dull (line 1)")
    assert len(prompts.rows) == 3
    with pytest.raises(ValueError, match=r"dropped 3: .* Nothing is left to learn from"):
        without(shorter, lambda row: True, "all")


def test_a_changed_file_is_refused(tmp_path):
    before = read("prompts", tmp_path, {"prompt": "a"}, {"prompt": "b"})
    refuse_changed(read("prompts", tmp_path, {"prompt": "a"}, {"prompt": "b"}), before.sha256)
    for lines in ([{"prompt": "a"}, {"prompt": "c"}], [{"prompt": "a"}, {"prompt": "b"}, ""], [{"prompt": "a"}, " " + '{"prompt": "b"}']):
        with pytest.raises(ValueError, match=rf"data\.jsonl has changed since this run began \(SHA-256 was {before.sha256[:12]}"):
            refuse_changed(read("prompts", tmp_path, *lines), before.sha256)


# Order.


@pytest.mark.parametrize(("size", "num"), [(1, 1), (7, 3), (6, 3), (5, 12), (4, 4)])
def test_every_epoch_has_each_example_once_however_it_is_cut(size, num):
    cursor, taken = Cursor(), []
    for _ in range(3 * size):
        indices, cursor = take(cursor, num, size=size, seed=1)
        assert indices.shape == (num,)
        taken += indices.tolist()
        assert (cursor.epoch, cursor.position) == divmod(len(taken), size)
    for epoch in range(len(taken) // size):
        part = taken[epoch * size : (epoch + 1) * size]
        assert sorted(part) == list(range(size))
        assert part == epoch_order(epoch, size, 1).tolist()
    singly = []
    cursor = Cursor()
    for _ in range(len(taken)):
        index, cursor = take(cursor, 1, size=size, seed=1)
        singly += index.tolist()
    assert singly == taken


def test_a_resumed_run_goes_on_with_the_next_example():
    cursor = Cursor()
    for _ in range(5):
        _, cursor = take(cursor, 7, size=16, seed=3)
    saved = json.loads(json.dumps(cursor._asdict()))
    expected = take(cursor, 40, size=16, seed=3)
    epoch_order.cache_clear()  # another process knows nothing
    indices, after = take(Cursor(**saved), 40, size=16, seed=3)
    np.testing.assert_array_equal(indices, expected[0])
    assert after == expected[1] == Cursor(4, 11)


def test_the_order_is_the_same_on_every_machine_and_another_for_another_seed_or_epoch():
    assert epoch_order(0, 8, 0).tolist() == [1, 2, 6, 3, 0, 5, 4, 7]
    orders = [epoch_order(epoch, 1000, seed).tolist() for epoch in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 8, 0)[0] = 1


def test_every_place_is_equally_likely():
    """A chi-squared test of where 8 examples stand in 4000 epochs: 49 degrees of freedom, the bound is at a probability of 1e-6."""
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), epoch_order(epoch, 8, 5)] += 1
    assert np.sum((counts - 500) ** 2 / 500) < 111.0


def test_a_cursor_of_other_data_is_refused():
    for cursor in (Cursor(0, 8), Cursor(0, -1), Cursor(-1, 0)):
        with pytest.raises(ValueError, match=r"Cursor\(.*\) does not lie in data of 8 examples; resume with the data and limits"):
            take(cursor, 1, size=8, seed=0)


# Shapes.


def test_few_lengths_hold_everything():
    assert bucket_lengths(44) == (16, 24, 32, 44)
    assert bucket_lengths(64) == (16, 24, 32, 48, 64)
    assert bucket_lengths(9) == (9,)
    assert bucket_lengths(16) == (16,)
    assert bucket_lengths(17) == (16, 17)
    assert bucket_lengths(10, shortest=4) == (4, 6, 8, 10)


ROWS = [np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.empty(0, np.int32)]


def test_prompts_are_padded_left_and_sequences_right():
    ids, mask = pad(ROWS, (2, 4, 8), 7, side="left")
    np.testing.assert_array_equal(ids, [[7, 5, 6, 7], [7, 7, 7, 8], [7] * 4])
    np.testing.assert_array_equal(mask, [[False, True, True, True], [False, False, False, True], [False] * 4])
    ids, mask = pad(ROWS, (3, 4), 7, side="right")
    np.testing.assert_array_equal(ids, [[5, 6, 7], [8, 7, 7], [7] * 3])
    np.testing.assert_array_equal(mask, [[True] * 3, [True, False, False], [False] * 3])
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
    with pytest.raises(AssertionError, match=r"a row of 3 tokens does not fit into \(1, 2\)"):
        pad(ROWS, (1, 2), 7, side="right")


def test_the_completion_of_a_sequence_is_marked_up_to_its_end_token_and_not_in_the_padding():
    end = 2  # which is also what is padded with
    sequences = [TokenSequence(np.array([5, 6, 9, end], np.int32), 2, 1), TokenSequence(np.array([end, 5, end], np.int32), 2, 2)]
    batch = sequence_batch(sequences, (6,), end)
    np.testing.assert_array_equal(batch.ids, [[5, 6, 9, 2, 2, 2], [2, 5, 2, 2, 2, 2]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.is_completion, [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]])
