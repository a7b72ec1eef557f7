"""Hugging Face directories: there and back for every family, what is refused by its name, and files that are not what they seem."""

import dataclasses
import json
import re
import shutil
import struct
import sys
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import CONFIGURATIONS, ONE_OF_EACH, loaded, random_model, saved, small, torch_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from surefoot import CheckpointError
from surefoot.rlhf import pretrained
from surefoot.rlhf.pretrained import from_hugging_face, load_model, save_model, to_hugging_face
from surefoot.training.checkpoint import SaveError

TOKENS = torch.arange(10).reshape(2, 5)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def torch_logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


@pytest.fixture
def llama(tmp_path):
    """A directory with a small model, to spoil."""
    return save_model(random_model(small()), tmp_path / "llama")


def change(directory, **settings):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_weights(directory, **tensors):
    """None takes a tensor out."""
    path = directory / "model.safetensors"
    changed = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


# There and back.


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_saved_model_is_the_same_here_and_in_transformers(name, tmp_path):
    model = loaded(name)
    directory = save_model(model, tmp_path / "out")
    again, where = load_model(directory)
    assert where == directory
    assert again.config == model.config
    assert_same_bits(again, model)
    theirs, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(torch_logits(theirs.eval()), torch_logits(torch_model(name)))
    read, given = theirs.config.to_dict(), {key: value for key, value in CONFIGURATIONS[name].to_dict().items() if value is not None}
    for key in json.loads((directory / "config.json").read_text()).keys() & given.keys() - {"dtype", "architectures"}:
        assert read[key] == given[key], key


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_older_names_of_settings_say_the_same(name):
    """Before version 5, `transformers` had the parameters of rotary positions beside each other."""
    settings = to_hugging_face(loaded(name).config)
    older = {key: value for key, value in settings.items() if key != "rope_parameters"}
    assert from_hugging_face(older) == from_hugging_face(settings) == loaded(name).config
    if "rope_theta" in settings:
        newer = {key: value for key, value in settings.items() if key not in ("rope_theta", "rope_scaling")}
        assert from_hugging_face(newer) == loaded(name).config


def test_absent_settings_are_what_transformers_takes_for_them():
    needed = {
        "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
        "other": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"),
    }
    for name in ONE_OF_EACH:
        theirs = type(CONFIGURATIONS[name])()
        full = theirs.to_dict()
        short = {key: full[key] for key in needed.get(theirs.model_type, needed["other"])} | {"model_type": theirs.model_type}
        heads = {"num_key_value_heads": full["num_key_value_heads"]} if "num_key_value_heads" in full else {}
        assert from_hugging_face(short | heads) == from_hugging_face(full)


def test_several_stop_tokens_and_none_survive():
    for stops in ((), (2,), (2, 7)):
        config = dataclasses.replace(small(), eos_tokens=stops)
        assert from_hugging_face(json.loads(json.dumps(to_hugging_face(config)))) == config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float64, np.float16, jnp.bfloat16])
def test_weights_may_be_stored_in_another_precision(llama, stored, dtype):
    before, _ = load_model(llama)
    path = llama / "model.safetensors"
    save_file({name: tensor.astype(stored) for name, tensor in load_file(path).items()}, path)
    model, _ = load_model(llama, dtype=dtype)
    expected = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(stored).astype(dtype)), before)
    assert_same_bits(model, expected)
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
    directory = save_model(model, llama.parent / "again")
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype
    assert_same_bits(load_model(directory, dtype=dtype)[0], model)


def test_a_precision_that_is_none_is_refused(llama):
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16', got 'int8'"):
        load_model(llama, dtype="int8")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_checkpoints_of_the_trunk_alone_and_with_old_buffers_are_read(name, tmp_path):
    """As the first GPT-2 has them: no prefix, and masks beside the weights; GPT-NeoX's head has two names."""
    shutil.copytree(saved(name), tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    family = loaded(name).config.family
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(family, "model.")
    tensors = {key.removeprefix(prefix).replace("embed_out", "lm_head"): value for key, value in load_file(path).items()}
    buffers = {"gpt2": ["h.0.attn.bias", "h.1.attn.masked_bias"], "gpt_neox": ["layers.0.attention.bias"]}
    old = dict.fromkeys(buffers.get(family, ["layers.0.self_attn.rotary_emb.inv_freq"]), np.ones(3, np.float32))
    save_file(tensors | old, path)
    assert_same_bits(load_model(path.parent)[0], loaded(name))


# Files of several parts.


def test_a_large_model_is_saved_in_parts(monkeypatch, llama, tmp_path):
    whole, _ = load_model(llama)
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 4000)
    directory = save_model(whole, llama)
    parts = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(parts) > 3
    assert all(re.fullmatch(r"model-0000\d-of-0000\d-[0-9a-f]{8}\.safetensors", part) for part in parts)
    assert all((directory / part).stat().st_size < 4000 + 3000 for part in parts)
    assert_same_bits(load_model(directory)[0], whole)
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    np.testing.assert_array_equal(
        torch_logits(theirs), torch_logits(AutoModelForCausalLM.from_pretrained(save_model_whole(whole, tmp_path)))
    )
    other = random_model(small(), seed=1)
    save_model(other, directory)
    assert not set(parts) & {path.name for path in directory.glob("*.safetensors")}
    assert_same_bits(load_model(directory)[0], other)
    monkeypatch.undo()
    save_model(whole, directory)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_bits(load_model(directory)[0], whole)


def save_model_whole(model, directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "SHARD_BYTES", 2**30)
        return save_model(model, directory / "whole")


@pytest.mark.parametrize("size", [4000, 2**30])
@pytest.mark.parametrize("write", range(12))
def test_a_save_that_is_cut_off_anywhere_leaves_the_old_weights_or_the_new(monkeypatch, tmp_path, size, write):
    monkeypatch.setattr(pretrained, "SHARD_BYTES", size)
    old, new = random_model(small(), seed=1), random_model(small(), seed=2)
    directory = save_model(old, tmp_path / "model")
    writes = iter(range(write))

    def stop(do):
        def once(*arguments, **keywords):
            if next(writes, None) is None:
                raise OSError(28, "No space left on device")
            return do(*arguments, **keywords)

        return once

    monkeypatch.setattr(pretrained.os, "replace", stop(pretrained.os.replace))
    monkeypatch.setattr(pretrained.os, "fsync", stop(pretrained.os.fsync))
    complete = False
    with pytest.raises(SaveError, match=r"was not saved in .*No space left on device") if write < 4 else suppress(SaveError):
        save_model(new, directory)
        complete = True
    monkeypatch.undo()
    found, _ = load_model(directory)
    is_new = bool((found.embedding == new.embedding).all())
    assert is_new or not complete
    assert_same_bits(found, new if is_new else old)
    assert not list(directory.glob(".*.tmp"))


# What is lacking here is refused by its name.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not known, did you mean 'llama'? Known are llama, qwen3, qwen2, gpt2, gpt_neox"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not known"),
        ({"model_type": None}, "model_type None is not known"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config' asks for quantised weights"),
        ({"auto_map": {"AutoModel": "model.Model"}}, "'auto_map' asks for code of its own, which is never run"),
        ({"num_local_experts": 8}, "'num_local_experts' asks for a mixture of experts"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' asks for capped logits"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not known; known are default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope type 'llama3' needs 'low_freq_factor'"),
        ({"rope_scaling": {"rope_type": ["a"]}}, "rope type ['a'] is not known"),
        ({"rope_scaling": 3}, "'rope_parameters' must be a JSON object, got 3"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "nearest family, llama, has rope_fraction 1.0"),
        ({"hidden_act": "mish"}, "ModelConfig.activation expects one of 'silu'"),
        ({"hidden_size": "wide"}, "must be positive integers, got 'wide' and 4"),
        ({"num_hidden_layers": 2.5}, "ModelConfig.num_layers expects int, got 2.5"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'layer_types' asks for 'linear_attention'"),
        ({"num_hidden_layers": 10**9}, "describes 1000000000 layers, and there are 20 tensors in all"),
        ({"hidden_size": 2**40}, "has shape [11, 16], and config.json describes [11, 1099511627776]"),
        ({"vocab_size": 10}, "model.embed_tokens.weight has shape [11, 16], and config.json describes [10, 16]"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "not part of a llama model of this config.json: model.layers.1"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight."),
        ({"model_type": "qwen3"}, "missing: model.layers.0.self_attn.q_norm.weight, model.layers.1.self_attn.q_norm.weight,"),
    ],
)
def test_a_configuration_that_cannot_be_had_is_refused(llama, settings, message):
    change(llama, **settings)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(llama)


def test_settings_of_gpt2_that_cannot_be_had_are_refused():
    settings = to_hugging_face(loaded("gpt2").config)
    for setting, message in (
        ({"scale_attn_by_inverse_layer_idx": True}, "attention scaled by the number of the layer"),
        ({"scale_attn_weights": False}, "attention that is not scaled"),
        ({"add_cross_attention": True}, "an encoder"),
        ({"n_head": 5}, "heads_divide_hidden True"),
    ):
        with pytest.raises(ValueError, match=message):
            from_hugging_face(settings | setting)
    with pytest.raises(ValueError, match="it lacks 'n_embd'"):
        from_hugging_face({key: value for key, value in settings.items() if key != "n_embd"})


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, True),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, True),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, False),  # layers from the third on
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, False),  # no sequence is longer
        ({"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}, False),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2, "max_window_layers": 0}, False),
    ],
)
def test_a_sliding_window_is_refused_where_it_binds(settings, refused):
    given = to_hugging_face(loaded("qwen2 tied").config) | settings
    if refused:
        with pytest.raises(ValueError, match="attention to the last 16 tokens, which is lacking here"):
            from_hugging_face(given)
    else:
        assert from_hugging_face(given) == loaded("qwen2 tied").config


# Weights that are not those of the configuration.


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model__norm__weight": None}, "missing: model.norm.weight."),
        ({"score__weight": np.ones((1, 16), np.float32)}, "not part of a llama model of this config.json: score.weight."),
        ({"model__layers__0__self_attn__q_proj__bias": np.ones(16, np.float32)}, "not part of a llama model"),
        ({"model__norm__weight": np.ones(17, np.float32)}, "model.norm.weight has shape [17], and config.json describes [16]"),
        ({"model__norm__weight": np.ones(16, np.int8)}, "model.norm.weight is stored as I8; only F64, F32, F16, BF16 can be read"),
        ({"lm_head__weight": np.ones((11, 16), np.float32)}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_tensors_that_do_not_belong_are_named(llama, tensors, message):
    change_weights(llama, **tensors)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(llama)


def test_a_head_that_is_a_copy_of_the_embedding_is_no_fault(llama):
    before, _ = load_model(llama)
    change_weights(llama, lm_head__weight=load_file(llama / "model.safetensors")["model.embed_tokens.weight"])
    assert_same_bits(load_model(llama)[0], before)


# Files that are not what they seem.


def shard(directory, **index):
    """One file as two, with an index that can be spoiled."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map | index}))


def test_an_index_of_any_names_is_read(llama):
    before, _ = load_model(llama)
    shard(llama)
    assert_same_bits(load_model(llama)[0], before)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "c.safetensors", "sub/a.safetensors", "config.json"])
def test_an_index_leads_nowhere_outside(llama, name):
    shutil.copy(llama / "model.safetensors", llama.parent / "outside.safetensors")
    (llama / "sub").mkdir()
    shutil.copy(llama / "model.safetensors", llama / "sub" / "a.safetensors")
    shard(llama, **{"model.norm.weight": name})
    with pytest.raises(CheckpointError, match=re.escape(f"names {name!r}, which is not a safetensors file in the directory")):
        load_model(llama)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 3}}', '{"weight_map": ["a"]}', "{", "\xff"])
def test_an_index_that_makes_no_sense_is_refused(llama, text):
    shard(llama)
    (llama / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index\.json is corrupt"):
        load_model(llama)


def test_a_tensor_in_two_files_is_refused(llama):
    shard(llama)
    change = load_file(llama / "a.safetensors")
    save_file(change | load_file(llama / "b.safetensors"), llama / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors holds .*, and so does another file"):
        load_model(llama)


def spoiled(data: bytes, how: str) -> bytes:
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    first = next(name for name in header if name != "__metadata__")
    match how:
        case "empty":
            return b""
        case "cut in the header":
            return data[:100]
        case "cut in the tensors":
            return data[:-100]
        case "absurd header":
            return struct.pack("<Q", 2**62) + data[8:]
        case "header of 10 GB":
            return struct.pack("<Q", 10 * 2**30) + data[8:]
        case "offsets beyond the file":
            header[first]["data_offsets"][1] += 2**40
        case "a shape that lies":
            header[first]["shape"] = [2**31, 2**31]
        case "pickle":
            return b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


WAYS = ["empty", "cut in the header", "cut in the tensors", "absurd header", "header of 10 GB"]
WAYS += ["offsets beyond the file", "a shape that lies", "pickle"]


@pytest.mark.parametrize("how", WAYS)
def test_a_spoiled_weight_file_is_refused(llama, how):
    path = llama / "model.safetensors"
    path.write_bytes(spoiled(path.read_bytes(), how))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt or not a safetensors file"):
        load_model(llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is corrupt"), ("[1]", "it is not a JSON object"), ('{"model_type": ' * 5000, "is corrupt"), ("{", "is corrupt")],
)
def test_a_spoiled_configuration_is_refused(llama, text, message):
    (llama / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_model(llama)


def test_a_pickle_is_never_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"there is no model\.safetensors .*pytorch_model\.bin is a pickle, which can run code"):
        load_model(llama)


def test_what_is_missing_is_named(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no model\.safetensors and no model\.safetensors\.index\.json"):
        load_model(llama)
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_model(llama)


# Names on the hub.


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and a cache of models with one in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_a_model_that_the_hub_has_given_before_is_there_offline(offline):
    model = random_model(small())
    save_model(model, offline)
    found, directory = load_model("owner/small")
    assert_same_bits(found, model)
    assert directory == offline


def test_offline_an_unknown_name_is_an_error_that_says_so(offline):
    with pytest.raises(CheckpointError, match=r"nobody/nothing is not a directory here, and the Hugging Face hub did not give it: "):
        load_model("nobody/nothing")


@pytest.mark.parametrize("name", ["runs/sft/model", "./model", "/no/such", "../x", "owner/.."])
def test_a_path_is_never_asked_of_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match=r"is not a directory: give that of a model, or a name like 'owner/model'"):
        load_model(name)


def test_a_file_is_not_a_directory(llama):
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_model(llama / "config.json")


def test_only_what_cannot_run_is_fetched(monkeypatch, llama):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: asked.update(name=name, **settings) or str(llama))
    load_model("owner/model")
    patterns = asked["allow_patterns"]
    for file, wanted in {"config.json": True, "model-1.safetensors": True, "tokenizer.json": True, "pytorch_model.bin": False}.items():
        assert any(Path(file).match(pattern) for pattern in patterns) is wanted
    assert not any(Path("modeling.py").match(pattern) for pattern in patterns)


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=re.escape("pip install 'surefoot[rlhf]'")):
        load_model("owner/model")
