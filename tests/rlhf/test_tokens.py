"""What is trained on is what the sampler sees, whatever the tokenizer has or lacks; what cannot work is refused with the remedy."""

import importlib
import json
import shutil
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from surefoot.rlhf import tokens
from surefoot.rlhf.batches import sequence_batch
from surefoot.rlhf.data import Dataset, Demonstration, Preference, Prompt
from surefoot.rlhf.tokens import (
    check_vocabulary,
    load_tokens,
    make_tokens,
    save_tokens,
    tokenise_demonstrations,
    tokenise_preferences,
    tokenise_prompts,
)

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|start|>", "<|end|>"]
PAD, BOS, EOS, START, END = range(5)
CHAT = "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
ASK = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def make():
    """A byte-level tokenizer of `transformers` that puts `template` around a text and has these special tokens."""
    library = tokens.import_library("transformers")
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )

    def built(template="<bos> $A", roles=("bos", "eos", "pad"), chat_template=None, **options):
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        backend.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(zip(SPECIAL, range(5), strict=True)))
        names = {f"{role}_token": f"<{role}>" for role in roles}
        extra = {"additional_special_tokens": SPECIAL[3:]}
        return library.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **names, **extra, **options)

    return built


def dataset(*rows):
    return Dataset("data.jsonl", "", [row._replace(line=index + 1) for index, row in enumerate(rows)])


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_prompt_is_the_same_for_sampler_and_training_and_the_end_token_follows_the_completion(make):
    tokenizer = make()
    found = make_tokens(tokenizer)
    (prompt,) = tokenise_prompts(dataset(Prompt("the c", {"x": 1}, 0)), found, max_prompt_length=9, overlong="error").rows
    (sequence,) = tokenise_demonstrations(dataset(Demonstration("the c", "at", 0)), found, max_length=9, overlong="error").rows
    assert (prompt.prompt, prompt.columns, prompt.line) == ("the c", {"x": 1}, 1)
    assert prompt.ids.tolist() == [BOS, *ids(tokenizer, "the c")]
    assert sequence.ids.tolist() == [*prompt.ids, *ids(tokenizer, "at"), EOS]
    assert sequence.ids.tolist() != [BOS, *ids(tokenizer, "the cat"), EOS]  # which is what joining as text would give
    assert sequence.num_prompt == len(prompt.ids)
    assert prompt.ids.dtype == sequence.ids.dtype == np.int32


@pytest.mark.parametrize(
    ("template", "prefix"), [("$A", []), ("$A <eos>", []), ("<bos> $A <eos>", [BOS]), ("<bos> <|start|> $A", [BOS, START])]
)
def test_what_a_tokenizer_puts_after_a_text_does_not_come_between_prompt_and_completion(make, template, prefix):
    tokenizer = make(template)
    (prompt,) = make_tokens(tokenizer).encode_prompts(["the mat"])
    assert prompt.tolist() == [*prefix, *ids(tokenizer, "the mat")]


def test_chat_is_rendered_up_to_the_assistants_turn_and_ends_as_its_template_ends_turns(make):
    tokenizer = make(chat_template=CHAT)
    found = make_tokens(tokenizer)
    rows = dataset(Demonstration(ASK, "sat", 0), Demonstration("the cat", "sat", 0))
    chat, text = tokenise_demonstrations(rows, found, max_length=99, overlong="error").rows
    opened = [BOS, START, *ids(tokenizer, "user\nthe cat"), END, *ids(tokenizer, "\n"), START, *ids(tokenizer, "assistant\n")]
    assert chat.ids.tolist() == [*opened, *ids(tokenizer, "sat"), END]
    assert chat.num_prompt == len(opened)
    assert text.ids.tolist() == [BOS, *ids(tokenizer, "the cat"), *ids(tokenizer, "sat"), EOS]
    assert found.stop_ids == (EOS, END)
    assert make_tokens(make()).stop_ids == (EOS,)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m.content }} <eos>{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.content }}the end{% endfor %}", EOS),
        ("{{ raise_exception('only tools') }}", EOS),
        ("{% for m in messages %}<|start|>{{ m.content }}\n<|end|>{% endfor %}<pad>", END),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(make, template, end):
    assert make_tokens(make(chat_template=template)).turn_end_id == end


def test_chat_without_a_template_and_a_template_that_refuses_are_errors(make):
    with pytest.raises(ValueError, match=r"tokenizer of gpt has no chat template, .* give the data as text, or put a chat_template"):
        make_tokens(make(), "gpt").encode_prompts([ASK])
    with pytest.raises(ValueError, match="chat template of gpt does not take these messages: no system, please"):
        make_tokens(make(chat_template="{{ raise_exception('no system, please') }}"), "gpt").encode_prompts(["text", ASK])


def test_without_a_pad_token_rows_are_filled_with_the_end_token_and_masks_tell_them_apart(make):
    for roles in (("bos", "eos"), ("eos",)):
        found = make_tokens(make("$A", roles=roles))
        assert found.pad_id == found.end_id == EOS
        rows = dataset(Demonstration("the", " cat", 0), Demonstration("the", " cat sat", 0))
        sequences = tokenise_demonstrations(rows, found, max_length=99, overlong="error").rows
        batch = sequence_batch(sequences, (8,), found.pad_id)
        for row, sequence in enumerate(sequences):
            np.testing.assert_array_equal(batch.ids[row][batch.mask[row]], sequence.ids)
            np.testing.assert_array_equal(batch.ids[row][batch.is_completion[row]], sequence.ids[sequence.num_prompt :])
            assert (batch.ids[row][~batch.mask[row]] == EOS).all()
    assert make_tokens(make()).pad_id == PAD


def test_without_an_end_token_a_tokenizer_is_refused(make):
    with pytest.raises(ValueError, match=r"tokenizer of gpt has no end token, .*tokenizer\.eos_token = .*\"eos_token\" in its tokenizer_"):
        make_tokens(make(roles=("bos", "pad")), "gpt")


def test_more_tokens_than_embeddings_are_refused_and_more_embeddings_are_not(make):
    tokenizer = make()
    found = make_tokens(tokenizer, "gpt")
    assert found.vocabulary_size == len(tokenizer)
    check_vocabulary(found, len(tokenizer))
    check_vocabulary(found, len(tokenizer) + 64)
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    with pytest.raises(ValueError, match=rf"gpt has 1 token beyond the model's {len(tokenizer) - 1} embeddings: '{last}' .*; use the"):
        check_vocabulary(found, len(tokenizer) - 1)
    with pytest.raises(ValueError, match=r"tokens beyond the model's 100 embeddings: '.+' \(100\), '.+' \(101\), '.+' \(102\), \.\.\."):
        check_vocabulary(found, 100)


def test_an_end_token_within_a_completion_is_an_error_and_one_at_its_end_is_not_doubled(make):
    found = make_tokens(make(chat_template=CHAT))
    for text in ("sat<eos>", "sat<|end|>"):
        (row,) = tokenise_demonstrations(dataset(Demonstration("the", text, 0)), found, max_length=9, overlong="error").rows
        assert row.ids[-1] in (EOS, END)
        assert not np.isin(row.ids[:-1], (EOS, END)).any()
    good = Demonstration("the", "cat", 0)
    for text in ("sat<eos> on", "<|end|>sat", "<eos><eos>"):
        with pytest.raises(ValueError, match=r"data\.jsonl, line 2: 'completion' goes on after an end token; end it there"):
            tokenise_demonstrations(dataset(good, Demonstration("the", text, 0)), found, max_length=9, overlong="error")
    with pytest.raises(ValueError, match="line 1: 'rejected' goes on after an end token"):
        tokenise_preferences(dataset(Preference("the", "cat", "<eos>mat", 0)), found, max_length=9, overlong="error")


def test_what_is_too_long_is_an_error_or_counted_and_never_cut(make):
    tokenizer = make()
    found = make_tokens(tokenizer)
    length = len([BOS, *ids(tokenizer, "the cat")])
    prompts = dataset(*(Prompt(text, {}, 0) for text in ("the", "the cat", "the cat sat on the mat")))
    with pytest.raises(ValueError, match=rf"line 3: prompt of \d+ tokens, more than max_prompt_length = {length}; raise it, .*overlong"):
        tokenise_prompts(prompts, found, max_prompt_length=length, overlong="error")
    with pytest.raises(ValueError, match=rf"line 2: prompt of {length} tokens, more than max_prompt_length = {length - 1}"):
        tokenise_prompts(prompts, found, max_prompt_length=length - 1, overlong="error")
    kept = tokenise_prompts(prompts, found, max_prompt_length=length, overlong="drop")
    assert [row.line for row in kept.rows] == [1, 2]
    assert str(kept).endswith(f"2 records; dropped 1: 1 whose prompt is longer than max_prompt_length = {length} (line 3)")
    pair = Preference("the", " cat", " cat sat on the mat", 0)
    rows = dataset(pair, pair._replace(chosen=pair.rejected, rejected=pair.chosen), pair._replace(rejected=" mat"))
    length = len([BOS, *ids(tokenizer, "the"), *ids(tokenizer, " cat"), EOS])
    kept = tokenise_preferences(rows, found, max_length=length, overlong="drop")
    assert [row.line for row in kept.rows] == [3]
    chosen, rejected = kept.rows[0][:2]
    assert chosen.ids.tolist() == [BOS, *ids(tokenizer, "the"), *ids(tokenizer, " cat"), EOS]
    assert rejected.ids.tolist() == [BOS, *ids(tokenizer, "the"), *ids(tokenizer, " mat"), EOS]
    with pytest.raises(ValueError, match="Nothing is left to learn from"):
        tokenise_demonstrations(dataset(Demonstration("the", " cat", 0)), found, max_length=length - 1, overlong="drop")


def test_an_empty_completion_is_its_end_token_and_an_empty_prompt_needs_a_prefix(make):
    empty = dataset(Demonstration("", "", 0))
    (row,) = tokenise_demonstrations(empty, make_tokens(make()), max_length=9, overlong="error").rows
    assert (row.ids.tolist(), row.num_prompt) == ([BOS, EOS], 1)
    with pytest.raises(ValueError, match="line 1: the prompt has no tokens"):
        tokenise_demonstrations(empty, make_tokens(make("$A")), max_length=9, overlong="error")


def test_decoding_gives_the_text_back_without_special_and_unknown_tokens(make):
    forced = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    tokenizer = make(clean_up_tokenization_spaces=True, **forced)
    found = make_tokens(tokenizer)
    texts = ["the cat , sat .", "", " é \U0001f6a2\n", "do n't"]
    assert found.decode(found.encode(texts)) == texts
    unknown = len(tokenizer) + 9
    assert found.decode([np.array([BOS, *ids(tokenizer, "the"), unknown, *ids(tokenizer, " cat"), EOS, PAD])]) == ["the cat"]


def test_what_is_saved_is_loaded_and_code_beside_it_is_not_run(make, tmp_path):
    before = make_tokens(make(chat_template=CHAT))
    save_tokens(before, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    shutil.copytree(tmp_path / "model", tmp_path / "evil")
    (tmp_path / "evil" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Tokenizer: pass\n")
    after = load_tokens(tmp_path / "model")
    for one, other in zip(before.encode_prompts(["the é", ASK]), after.encode_prompts(["the é", ASK]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (after.stop_ids, after.pad_id, after.prefix_ids) == ((EOS, END), PAD, (BOS,))
    with pytest.raises(ValueError, match=r"The tokenizer of '.*evil' cannot be loaded: .*custom code"):
        load_tokens(tmp_path / "evil")
    assert not (tmp_path / "was run").exists()


def test_a_directory_that_is_not_there_or_holds_no_tokenizer_is_an_error_at_once(make, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"There is no directory '.*modle', did you mean 'model'\?"):
        load_tokens(tmp_path / "modle")
    with pytest.raises(ValueError, match=r"The tokenizer of '.*model' cannot be loaded: "):
        load_tokens(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"The tokenizer of '.*model' cannot be loaded: "):
        load_tokens(tmp_path / "model")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match=r"There is no directory '.*/modle', did you mean 'model'"):  # and no model of the hub
        load_tokens(f"{tmp_path.name}/modle")


def test_where_the_hub_cannot_be_reached_that_is_said_without_a_wait(monkeypatch):
    def look_up(*_):
        raise socket.gaierror("no such name")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(tokens.urllib.request, "getproxies", dict)
    with pytest.raises(ValueError, match="There is no directory 'nobody/has-this', and the Hugging Face hub cannot be reached"):
        load_tokens("nobody/has-this")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert tokens.hub_is_reachable()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not tokens.hub_is_reachable()


def test_without_the_extra_the_error_names_it(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'need transformers, which is not installed: pip install "surefoot\[rlhf\]"'):
        load_tokens("gpt")


def test_loading_and_long_texts_are_quiet_even_without_pytorch(make, tmp_path):
    save_tokens(make_tokens(make(model_max_length=4)), tmp_path)
    program = f"""
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
        from surefoot.rlhf.tokens import load_tokens
        tokens = load_tokens({str(tmp_path)!r})
        assert len(tokens.encode_prompts(["the cat sat on the mat"])[0]) > 4
        import os, transformers
        assert not transformers.is_torch_available() and "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
