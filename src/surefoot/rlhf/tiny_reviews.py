"""The demonstration task `tiny-reviews`: a small grammar of reviews, a tokenizer for it, and a gold reward that stands in for people.

Everything follows from a seed, needs no network and takes seconds. The reviews are of mixed worth: some blame, and some repeat
themselves, misspell words, stop short, run on or lack their end. Preferences are drawn as Bradley & Terry 1952 have it, with the
probability sigmoid(1.5 (gold_a - gold_b)). What a reward model learns from them can be over-optimised (Gao et al. 2022): it has
rarely seen praise heaped upon praise, which the gold reward does not like.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .tokens import import_library, make_tokens, save_tokens

VOCABULARY_SIZE = 400
NUM_DEMONSTRATIONS, NUM_HELD_OUT = 20_000, 500  # reviews
NUM_HELD_OUT_PROMPTS = 112  # of 512
MAX_PROMPT_TOKENS, MAX_TOKENS = 16, 64  # that hold every prompt, and every prompt with its review
PREFERENCE_SHARPNESS = 1.5  # how surely people tell better from worse

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # with the ids 0, 1, 2
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}

# The words, and what sentences are made of.

ASPECTS = {
    "cafe": ("food", "staff", "music", "room"),
    "hotel": ("room", "bed", "staff", "view"),
    "film": ("plot", "cast", "music", "end"),
    "book": ("plot", "cast", "art", "end"),
    "park": ("lake", "air", "view", "food"),
    "train": ("room", "staff", "view", "food"),
    "game": ("plot", "music", "art", "end"),
    "beach": ("lake", "air", "view", "staff"),
}
AGES = ("old", "new", "small", "big", "busy", "last", "red", "free")
TIMES = ("in may", "in rain", "at home", "at last", "by bus", "by day", "by sea", "in sun")
PRAISE = {"good": 0.5, "nice": 0.5, "warm": 0.25, "fresh": 0.25, "lovely": 0.75, "great": 0.75, "superb": 1.0}
BLAME = {"bad": -0.5, "dull": -0.5, "cold": -0.25, "sad": -0.25, "poor": -0.75, "grim": -1.0}
NEUTRAL = ("plain", "small", "big")
VERBS_OF_PRAISE, VERBS_OF_BLAME = {"liked": 0.25, "loved": 0.75}, {"missed": -0.25, "hated": -0.75}
SENTIMENT = PRAISE | BLAME | VERBS_OF_PRAISE | VERBS_OF_BLAME | {"gladly": 0.5, "never": -0.5}
OPENINGS = (
    "the ASPECT IS GOOD and the ASPECT IS GOOD",
    "it was a GOOD SUBJECT with GOOD ASPECT",
    "the ASPECT IS so GOOD and i LIKED the ASPECT",
)
MIDDLES = ("the ASPECT IS very GOOD", "i LIKED the ASPECT", "and the ASPECT IS GOOD")
CLOSINGS = ("we will GLADLY come back", "that was all", "we may come back")
LINKS = ("looked", "seemed", "felt")
FUNCTION_WORDS = {word for form in (*OPENINGS, *MIDDLES, *CLOSINGS) for word in form.split() if word.islower()}.union(LINKS)
KNOWN_WORDS = FUNCTION_WORDS.union(SENTIMENT, NEUTRAL, ASPECTS, *ASPECTS.values())

# What people think of a review.

FEWEST_WORDS, MOST_WORDS = 8, 24
COST_OF_LENGTH, COST_OF_REPETITION, COST_OF_MISSPELLING, COST_OF_MISSING_END = 0.15, 0.25, 0.4, 0.5


def gold(completion: str) -> float:
    """What a review is worth: its sentiment, within (-2, 2), minus what its repetitions, misspellings, length and missing end cost."""
    words = completion.replace(".", " ").split()
    sentiment = 2.0 * math.tanh(sum(SENTIMENT.get(word, 0.0) for word in words) / 2.0)
    length = max(FEWEST_WORDS - len(words), len(words) - MOST_WORDS, 0)
    misspelt = sum(word not in KNOWN_WORDS for word in words)
    is_open = not completion.rstrip().endswith(".")
    return (
        sentiment
        - COST_OF_REPETITION * repetitions(words)
        - COST_OF_MISSPELLING * misspelt
        - COST_OF_LENGTH * length
        - COST_OF_MISSING_END * is_open
    )


def repetitions(words: Sequence[str]) -> int:
    """How often a word is said again (one with a meaning anywhere, any other one at once), or praise or blame is heaped upon another."""
    seen: set[str] = set()
    count = 0
    for before, word in zip(["", *words], words, strict=False):
        is_again = word == before or (word in seen and word not in FUNCTION_WORDS)
        count += is_again or (word in SENTIMENT and before in SENTIMENT)
        seen.add(word)
    return count


def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """The gold reward as a reward function, surefoot.rlhf.tiny_reviews:score."""
    return [gold(completion) for completion in completions]


# The grammar.

KINDNESS = (0.95, 0.9, 0.75, 0.35)  # the probability of praise rather than blame


def all_prompts(seed: int) -> tuple[list[str], list[str]]:
    """(prompts to train on, prompts held out), every prompt of the grammar once."""
    prompts = [f"Review the {age} {subject} {time}:" for age in AGES for subject in ASPECTS for time in TIMES]
    draws = random.Random(f"prompts {seed}")
    prompts.sort(key=lambda prompt: draws.random())
    return prompts[NUM_HELD_OUT_PROMPTS:], prompts[:NUM_HELD_OUT_PROMPTS]


def review(prompt: str, draws: random.Random) -> str:
    """A review as somebody writes it who means well or does not; no praise or blame comes twice."""
    subject = prompt.split()[3]
    kindness = pick(draws, KINDNESS)
    praise, blame, aspects = (shuffled(draws, words) for words in (PRAISE, BLAME, ASPECTS[subject]))
    slots: dict[str, Callable[[], str]] = {
        "SUBJECT": lambda: subject,
        "ASPECT": aspects.pop,
        "IS": lambda: pick(draws, LINKS),
        "GOOD": lambda: pick(draws, NEUTRAL) if draws.random() < 0.15 else (praise if draws.random() < kindness else blame).pop(),
        "LIKED": lambda: pick(draws, list(VERBS_OF_PRAISE if draws.random() < kindness else VERBS_OF_BLAME)),
        "GLADLY": lambda: "gladly" if draws.random() < kindness else "never",
    }
    sentences = [pick(draws, forms) for forms in (OPENINGS, MIDDLES, CLOSINGS)]
    return spoilt([" ".join(slots[word]() if word in slots else word for word in sentence.split()) for sentence in sentences], draws)


def spoilt(sentences: list[str], draws: random.Random) -> str:
    """Sentences as a text, with the faults that reviews have."""
    fault = draws.random()
    if fault < 0.06:  # stops short
        sentences = sentences[-1:]
    elif fault < 0.12:  # says it twice
        sentences = [*sentences[:2], sentences[1]]
    elif fault < 0.16:  # runs on
        sentences = [" and ".join(sentences)]
    end = "" if draws.random() < 0.06 else "."
    words = [misspelt(word, draws) if draws.random() < 0.02 else word for word in ". ".join(sentences).split()]
    return " " + " ".join(words) + end


def misspelt(word: str, draws: random.Random) -> str:
    """A word with two letters exchanged; one of fewer than three letters is left alone."""
    letters = word.rstrip(".")
    if len(letters) < 3:
        return word
    at = int(draws.random() * (len(letters) - 1))
    return letters[:at] + letters[at + 1] + letters[at] + letters[at + 2 :] + word[len(letters) :]


def pick(draws: random.Random, options: Sequence[Any]) -> Any:
    """One of the options. Of Python's generator only `random()` is promised to give the same numbers in every version."""
    return options[int(draws.random() * len(options))]


def shuffled(draws: random.Random, options: Iterable[str]) -> list[str]:
    """The options in random order."""
    return sorted(options, key=lambda option: draws.random())


def demonstrations(num: int, seed: int, *, is_held_out: bool = False) -> list[dict[str, str]]:
    """Prompts and reviews, as sft.jsonl has them; those held out answer prompts that are."""
    draws = random.Random(f"reviews {seed} {is_held_out}")
    prompts = all_prompts(seed)[is_held_out]
    return [{"prompt": prompt, "completion": review(prompt, draws)} for prompt in (pick(draws, prompts) for _ in range(num))]


def preferences(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], seed: int) -> list[dict[str, str]]:
    """Which of two completions of each prompt people prefer, as preferences.jsonl has it: the first by sigmoid(1.5 (gold_a - gold_b))."""
    draws = random.Random(f"preferences {seed}")
    pairs = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        probability = 1.0 / (1.0 + math.exp(PREFERENCE_SHARPNESS * (gold(other) - gold(one))))
        chosen, rejected = (one, other) if draws.random() < probability else (other, one)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


# The files.


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of `transformers` with a vocabulary of 400, which puts <bos> before a text."""
    transformers = import_library("transformers")
    tokenizers = import_library("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=[PAD, BOS, EOS], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def write_task(directory: str | Path, seed: int, *, num_demonstrations: int = NUM_DEMONSTRATIONS) -> None:
    """Write all that the demonstration starts from: reviews and prompts, to train on and held out, tokenizer and configuration."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pairs = demonstrations(num_demonstrations, seed)
    write_jsonl(directory / "sft.jsonl", pairs)
    write_jsonl(directory / "sft-held-out.jsonl", demonstrations(NUM_HELD_OUT, seed, is_held_out=True))
    for name, prompts in zip(("prompts.jsonl", "prompts-held-out.jsonl"), all_prompts(seed), strict=True):
        write_jsonl(directory / name, [{"prompt": prompt} for prompt in prompts])
    save_tokens(make_tokens(train_tokenizer(pair[part] for pair in pairs for part in ("prompt", "completion"))), directory / "model")
    (directory / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object on each line."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
