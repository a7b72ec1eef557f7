"""The demonstration task is the same wherever it is made, its gold reward says what it should, and its files are what the readers want."""

import hashlib
import json
import math
import random
import re
import time

import numpy as np
import pytest

from surefoot.rlhf import tiny_reviews
from surefoot.rlhf.data import read_demonstrations, read_preferences, read_prompts
from surefoot.rlhf.rewards import load_rewards, score
from surefoot.rlhf.tiny_reviews import KNOWN_WORDS, all_prompts, demonstrations, gold, preferences, repetitions, write_jsonl, write_task
from surefoot.rlhf.tokens import check_vocabulary, load_tokens, tokenise_demonstrations, tokenise_prompts

NEUTRAL_REVIEW = " the food looked plain and the room felt small."  # nine words


def squashed(sentiment):
    return 2.0 * math.tanh(sentiment / 2.0)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (NEUTRAL_REVIEW, 0.0),
        (NEUTRAL_REVIEW.replace("plain", "good"), squashed(0.5)),
        (NEUTRAL_REVIEW.replace("plain", "grim"), squashed(-1.0)),
        (NEUTRAL_REVIEW.replace("plain", "superb").replace("small", "lovely") + " i loved the view.", squashed(1.0 + 0.75 + 0.75)),
        (NEUTRAL_REVIEW + " we will gladly come back.", squashed(0.5)),
        (NEUTRAL_REVIEW + " we will never come back.", squashed(-0.5)),
        # Repetition: a word with a meaning, a word said twice in a row, praise heaped upon praise.
        (NEUTRAL_REVIEW.replace("small", "plain"), -0.25),
        (NEUTRAL_REVIEW.replace("plain", "good").replace("small", "good"), squashed(1.0) - 0.25),
        (NEUTRAL_REVIEW.replace("the room", "the the room"), -0.25),
        (NEUTRAL_REVIEW.replace("plain", "great superb"), squashed(1.75) - 0.25),
        (NEUTRAL_REVIEW.replace("plain", "great great"), squashed(1.5) - 0.25),
        # Misspelling: a word that is none of the grammar's.
        (NEUTRAL_REVIEW.replace("room", "romo"), -0.4),
        (NEUTRAL_REVIEW.replace("room", "Room"), -0.4),
        (NEUTRAL_REVIEW.replace("food", "foood").replace("room", "!"), -0.8),
        # Length: fewer than 8 words, more than 24.
        (" the food looked plain and the room.", -0.15),
        (" the food looked plain and the room felt.", 0.0),
        (" we may come back.", 4 * -0.15),
        (" the it" * 12 + ".", 0.0),
        (" the it" * 12 + " the.", -0.15),
        (" the it" * 15 + ".", 6 * -0.15),
        # The missing end.
        (NEUTRAL_REVIEW[:-1], -0.5),
        (NEUTRAL_REVIEW[:-1] + ". we", -0.5),
        (NEUTRAL_REVIEW + " \n", 0.0),
        ("", 8 * -0.15 - 0.5),
        (".", 8 * -0.15),
    ],
)
def test_the_gold_reward_by_hand(completion, expected):
    assert gold(completion) == pytest.approx(expected, abs=1e-12)


def test_what_a_learned_reward_can_be_fooled_by_is_worth_little():
    praise = list(tiny_reviews.PRAISE)
    assert gold(" " + " ".join(praise * 3) + ".") < -2.0
    assert gold(" superb" * 16 + ".") < -1.0
    assert gold(" " + " and ".join(["superb"] * 8) + ".") < 0.5
    assert gold("") < -1.5
    best = gold(" the food felt so superb and i loved the room. the staff looked very great. we will gladly come back.")
    assert best > 1.75
    assert gold(" the food felt so superb and i loved the room. the staff looked very great. we will gladly") < best - 0.4


def test_scores_are_quick_and_served_as_a_reward_function():
    completions = [pair["completion"] for pair in demonstrations(1000, 0)]
    (reward,) = load_rewards(["surefoot.rlhf.tiny_reviews:score"], ["answer"])
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        result = score([reward], [""] * 1000, completions, [{"answer": 0}] * 1000)
        seconds.append(time.process_time() - begin)
    np.testing.assert_allclose(result.score, [gold(completion) for completion in completions], rtol=1e-6)
    assert min(seconds) < 0.1  # ten thousand in a second


@pytest.fixture(scope="module")
def pairs():
    return demonstrations(4000, 0)


def test_demonstrations_follow_from_the_seed_alone(pairs):
    digest = hashlib.sha256(json.dumps(pairs[:100]).encode()).hexdigest()
    assert digest[:16] == "2a167ccff802372d"
    assert demonstrations(100, 0) == pairs[:100]
    assert demonstrations(100, 1) != pairs[:100]
    assert demonstrations(100, 0, is_held_out=True) != pairs[:100]


def test_prompts_held_out_are_held_out(pairs):
    train, held_out = all_prompts(0)
    assert (len(train), len(held_out), len({*train, *held_out})) == (400, 112, 512)
    assert all_prompts(1) != (train, held_out)
    assert {pair["prompt"] for pair in pairs} <= set(train)
    assert {pair["prompt"] for pair in demonstrations(500, 0, is_held_out=True)} <= set(held_out)


def test_demonstrations_are_of_mixed_worth_and_there_is_room_above(pairs):
    worth = np.array([gold(pair["completion"]) for pair in pairs])
    assert 0.25 < worth.mean() < 0.45
    assert 0.8 < worth.std() < 1.1
    assert np.quantile(worth, 0.75) < 1.2
    assert worth.max() > 1.6
    assert np.mean(worth > 1.3) < 0.2


def test_every_fault_that_is_punished_is_there_and_none_is_the_rule(pairs):
    words = [pair["completion"].replace(".", " ").split() for pair in pairs]
    shares = {
        "repeats": np.mean([repetitions(each) > 0 for each in words]),
        "misspells": np.mean([not KNOWN_WORDS.issuperset(each) for each in words]),
        "short": np.mean([len(each) < tiny_reviews.FEWEST_WORDS for each in words]),
        "open": np.mean([not pair["completion"].endswith(".") for pair in pairs]),
        "runs on": np.mean([" and we " in pair["completion"] or " and that " in pair["completion"] for pair in pairs]),
    }
    assert all(0.02 < share < 0.35 for share in shares.values()), shares


def test_reviews_say_what_their_grammar_says_and_are_about_their_prompt():
    draws = random.Random(3)
    for _ in range(300):
        subject = tiny_reviews.pick(draws, list(tiny_reviews.ASPECTS))
        words = set(re.findall(r"[a-z]+", tiny_reviews.review(f"Review the old {subject} in may:", draws)))
        others = KNOWN_WORDS.intersection(*[words]) & {aspect for aspects in tiny_reviews.ASPECTS.values() for aspect in aspects}
        assert others <= set(tiny_reviews.ASPECTS[subject])
    assert tiny_reviews.misspelt("ab", draws) == "ab"
    assert tiny_reviews.misspelt("at.", draws) == "at."
    assert {tiny_reviews.misspelt("food.", draws) for _ in range(99)} == {"ofod.", "fodo.", "food."}


def test_preferences_are_drawn_with_the_probability_of_bradley_and_terry():
    better, worse = NEUTRAL_REVIEW.replace("plain", "good"), NEUTRAL_REVIEW
    num = 20_000
    first = preferences(["p"] * num, [better] * num, [worse] * num, 0)
    second = preferences(["p"] * num, [worse] * num, [better] * num, 1)
    probability = 1.0 / (1.0 + math.exp(-1.5 * squashed(0.5)))
    bound = 5.0 * math.sqrt(probability * (1.0 - probability) / num)  # five standard errors
    for drawn in (first, second):
        assert {pair["prompt"] for pair in drawn} == {"p"}
        assert {frozenset((pair["chosen"], pair["rejected"])) for pair in drawn} == {frozenset((better, worse))}
        assert abs(np.mean([pair["chosen"] == better for pair in drawn]) - probability) < bound
    assert preferences(["p"] * 50, [better] * 50, [worse] * 50, 0) == first[:50]
    assert preferences(["p"] * 50, [better] * 50, [worse] * 50, 1) != first[:50]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task with a tenth of its demonstrations."""
    directory = tmp_path_factory.mktemp("task")
    write_task(directory, 0, num_demonstrations=2000)
    return directory


def test_the_task_is_written_as_the_readers_want_it_and_fits_its_lengths(task):
    assert sorted(path.name for path in task.iterdir()) == [
        "model",
        "prompts-held-out.jsonl",
        "prompts.jsonl",
        "sft-held-out.jsonl",
        "sft.jsonl",
    ]
    tokens = load_tokens(task / "model")
    for name, num in (("sft", 2000), ("sft-held-out", 500)):
        data = read_demonstrations(task / f"{name}.jsonl")
        assert len(data.rows) == num
        rows = tokenise_demonstrations(data, tokens, max_length=tiny_reviews.MAX_TOKENS, overlong="error").rows
        assert np.quantile([len(row.ids) - row.num_prompt for row in rows], 0.9) <= 32
        assert tokens.decode([row.ids[row.num_prompt :] for row in rows]) == [row.completion for row in data.rows]
    for name, num in (("prompts", 400), ("prompts-held-out", 112)):
        data = read_prompts(task / f"{name}.jsonl")
        assert len(data.rows) == num
        tokenise_prompts(data, tokens, max_prompt_length=tiny_reviews.MAX_PROMPT_TOKENS, overlong="error")


def test_preferences_are_written_as_the_reader_wants_them(tmp_path):
    texts = [pair["completion"] for pair in demonstrations(20, 0)]
    write_jsonl(tmp_path / "preferences.jsonl", preferences(["é"] * 10, texts[:10], texts[10:], 0))
    rows = read_preferences(tmp_path / "preferences.jsonl").rows
    assert [{row.chosen, row.rejected} for row in rows] == [{one, other} for one, other in zip(texts[:10], texts[10:], strict=True)]
    assert {row.prompt for row in rows} == {"é"}


def test_tokenizer_and_configuration_belong_together(task):
    tokens, config = load_tokens(task / "model"), json.loads((task / "model" / "config.json").read_text())
    assert tokens.vocabulary_size == config["vocab_size"] == 400
    check_vocabulary(tokens, config["vocab_size"])
    assert (tokens.pad_id, tokens.prefix_ids, tokens.end_id) == (0, (1,), 2)
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    assert config["max_position_embeddings"] >= tiny_reviews.MAX_TOKENS
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokens.decode(tokens.encode([every_byte])) == [every_byte]
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    attention = 2 * width * config["head_dim"] * (config["num_attention_heads"] + config["num_key_value_heads"])
    size = 400 * width + layers * (attention + 3 * width * config["intermediate_size"] + 2 * width) + width
    assert size == 904_320


def test_the_task_is_written_the_same_again(task, tmp_path):
    write_task(tmp_path, 0, num_demonstrations=2000)
    for path in sorted(path for path in task.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(task)).read_bytes() == path.read_bytes(), path.name
