"""Language models in the directories that `transformers` reads and writes: `config.json` and safetensors.

Nothing but JSON and safetensors is parsed, no name in a file leads out of the directory, and what a configuration asks for and this
package lacks is refused by its name. Tokenizers are not the business of this module; their files lie in the same directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ..config import nearest
from ..training.checkpoint import CheckpointError, SaveError, read_json, sync_directory
from .model import FAMILIES, LanguageModel, ModelConfig, folded, init_model

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30  # of a saved file at most: what is written stands in memory a second time
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}
STORED = "F64", "F32", "F16", "BF16"

# Masks and frequencies that older checkpoints carry along, and no model needs.
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
FILES_OF_A_MODEL = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def load_model(name: str | Path, dtype: str = "float32") -> tuple[LanguageModel, Path]:
    """The model in a Hugging Face directory, or of that name on the hub, and the directory that holds its files.

    Args:
        dtype: of the weights in memory, "float32" or "bfloat16", whatever they are stored in.

    Raises:
        CheckpointError: files that are missing, corrupt or hostile, or that ask for what this package lacks.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}.")
    directory = local_directory(name)
    settings = read_json(directory / CONFIG)
    try:
        config = from_hugging_face(settings)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{directory / CONFIG} cannot be used: {error}") from error
    with ExitStack() as stack:
        try:
            return filled(config, open_tensors(directory, stack), DTYPES[dtype]), directory
        except (OSError, ValueError, TypeError, OverflowError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"The weights in {directory} cannot be used: {error}") from error


def save_model(model: LanguageModel, directory: str | Path) -> Path:
    """Write `config.json` and the weights, with what adapters add, for `transformers.AutoModelForCausalLM.from_pretrained`.

    Every file is complete before it takes its name, and the name of a shard tells its contents: a kill leaves the old weights or the
    new ones, never some of each. Raises SaveError.
    """
    directory, model = Path(directory), folded(model)
    settings = to_hugging_face(model.config) | {"dtype": str(model.embedding.dtype)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_text(directory / CONFIG, json.dumps(settings, indent=2) + "\n")
        groups, weight_map, total = shards(model), dict[str, str](), 0
        for number, group in enumerate(groups, 1):
            tensors = stored(model, group)
            name = WEIGHTS if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}-{digest(tensors)[:8]}.safetensors"
            replace(directory / name, partial(save_file, tensors, metadata={"format": "pt"}))
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(array.nbytes for array in tensors.values())
        # Where both are there, the single file is the one that is read; so the last step of each case is the one that counts.
        if len(groups) > 1:
            replace_text(directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        (directory / (INDEX if len(groups) == 1 else WEIGHTS)).unlink(missing_ok=True)
        for old in directory.glob("model-*-of-*.safetensors"):
            if old.name not in weight_map.values():
                old.unlink()
    except (OSError, safetensors.SafetensorError) as error:
        raise SaveError(f"The model was not saved in {directory}: {error}") from error
    return directory


def local_directory(name: str | Path) -> Path:
    """`name` itself where it is a directory, or else where the hub's files of that name are, after fetching them if need be."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)) is None:
        raise CheckpointError(f"{name} is not a directory: give that of a model, or a name like 'owner/model' on the Hugging Face hub.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name} is not a directory here, and to ask the Hugging Face hub for it takes more: pip install 'surefoot[rlhf]'"
        ) from error
    try:
        return Path(snapshot_download(str(name), allow_patterns=FILES_OF_A_MODEL, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} is not a directory here, and the Hugging Face hub did not give it: {error}") from error


# The configuration.

REQUIRED = object()
Keys = dict[str, tuple[str, Any]]  # a field of ModelConfig: its key in config.json, and what `transformers` takes where it is absent
SIZES: Keys = {
    "vocab_size": ("vocab_size", REQUIRED),
    "hidden_size": ("hidden_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "intermediate_size": ("intermediate_size", REQUIRED),
    "max_positions": ("max_position_embeddings", REQUIRED),
    "activation": ("hidden_act", "silu"),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
    "pad_token": ("pad_token_id", None),
    "bos_token": ("bos_token_id", None),
    "eos_tokens": ("eos_token_id", None),
}
HEADS: Keys = {"num_kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None)}
ATTENTION_BIAS: Keys = {"qkv_bias": ("attention_bias", False), "output_bias": ("attention_bias", False)}
KEYS: dict[str, Keys] = {
    "llama": SIZES
    | HEADS
    | ATTENTION_BIAS
    | {"mlp_bias": ("mlp_bias", False), "bos_token": ("bos_token_id", 1), "eos_tokens": ("eos_token_id", 2)},
    "qwen2": SIZES | HEADS,
    "qwen3": SIZES | HEADS | ATTENTION_BIAS | {"head_dim": ("head_dim", 128)},
    "gpt2": SIZES
    | {
        "hidden_size": ("n_embd", REQUIRED),
        "num_layers": ("n_layer", REQUIRED),
        "num_heads": ("n_head", REQUIRED),
        "intermediate_size": ("n_inner", None),
        "max_positions": ("n_positions", REQUIRED),
        "activation": ("activation_function", "gelu_new"),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "tied": ("tie_word_embeddings", True),
        "bos_token": ("bos_token_id", 50256),
        "eos_tokens": ("eos_token_id", 50256),
    },
    "gpt_neox": SIZES
    | {
        "qkv_bias": ("attention_bias", True),
        "output_bias": ("attention_bias", True),
        "activation": ("hidden_act", "gelu"),
        "norm_epsilon": ("layer_norm_eps", 1e-5),
        "parallel_residual": ("use_parallel_residual", True),
        "bos_token": ("bos_token_id", 0),
        "eos_tokens": ("eos_token_id", 2),
    },
}
ARCHITECTURES = {
    **{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"},
    **{"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM"},
}
LACKING = {
    "quantization_config": "quantised weights",
    "auto_map": "code of its own, which is never run",
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), "a mixture of experts"),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), "capped logits"),
    "attention_chunk_size": "attention in chunks",
    **dict.fromkeys(("add_cross_attention", "is_encoder_decoder"), "an encoder"),
    "scale_attn_by_inverse_layer_idx": "attention scaled by the number of the layer",
}


def from_hugging_face(settings: Any) -> ModelConfig:
    """The model that a `config.json` describes, absent keys as `transformers` takes them. Raises ValueError for what is lacking here."""
    if not isinstance(settings, Mapping):
        raise ValueError("it is not a JSON object.")
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not known{nearest(str(family), FAMILIES)} Known are {', '.join(FAMILIES)}.")
    for key, what in LACKING.items():
        if settings.get(key):
            raise ValueError(f"{key!r} asks for {what}, which is lacking here.")
    if settings.get("scale_attn_weights") is False:
        raise ValueError("'scale_attn_weights' asks for attention that is not scaled, which is lacking here.")
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {field: value for field, value in FAMILIES[family].items() if field in fields}
    for field, (key, default) in KEYS[family].items():
        values[field] = settings.get(key, default)
        if values[field] is REQUIRED:
            raise ValueError(f"it lacks {key!r}.")
    heads, hidden = values["num_heads"], values["hidden_size"]
    if not all(isinstance(x, int) and x > 0 for x in (heads, hidden)):
        raise ValueError(f"the width of the model and its number of heads must be positive integers, got {hidden!r} and {heads!r}.")
    if values.get("num_kv_heads") is None:
        values["num_kv_heads"] = heads
    if values.get("head_dim") is None:
        values["head_dim"] = hidden // heads
    if values["intermediate_size"] is None:
        values["intermediate_size"] = 4 * hidden
    if values["activation"] == "swish":
        values["activation"] = "silu"
    stop = values["eos_tokens"]
    values["eos_tokens"] = () if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)
    if values["positions"] == "rope":
        values |= rope_fields(settings, values["max_positions"])
    config = ModelConfig(**values)
    if config.family != family:
        raise ValueError(f"its settings are those of model_type {config.family!r} and not of {family!r}.")
    refuse_sliding_windows(settings, config)
    return config


def rope_fields(settings: Mapping[str, Any], max_positions: Any) -> dict[str, Any]:
    """The fields of rotary positions: from `rope_parameters`, or, as before `transformers` 5, from `rope_scaling` and keys beside it."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"'rope_parameters' must be a JSON object, got {rope!r}.")
    neox = settings["model_type"] == "gpt_neox"
    theta = settings.get("rotary_emb_base", 10_000.0) if neox else settings.get("rope_theta", 10_000.0)
    fraction = settings.get("rotary_pct", 0.25) if neox else settings.get("partial_rotary_factor", 1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {"rope_theta": rope.get("rope_theta", theta), "rope_fraction": rope.get("partial_rotary_factor", fraction)}
    keys = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if not isinstance(kind, str) or kind not in keys:
        raise ValueError(f"the rope type {kind!r} is not known; known are {', '.join(keys)}.")
    if missing := [key for key in keys[kind] if key not in rope]:
        raise ValueError(f"the rope type {kind!r} needs {missing[0]!r}.")
    if kind != "default":
        fields |= {"rope_scaling": kind, "rope_factor": rope["factor"]}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", max_positions)
        fields |= {"rope_low_frequency": rope["low_freq_factor"], "rope_high_frequency": rope["high_freq_factor"]}
        fields |= {"rope_original_positions": original}
    return fields


def refuse_sliding_windows(settings: Mapping[str, Any], config: ModelConfig) -> None:
    """Raise ValueError where a layer would see less than everything before it."""
    kinds = set(map(str, settings.get("layer_types") or ()))
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"'layer_types' asks for {sorted(unknown)[0]!r}, which is lacking here.")
    has_windows = "sliding_attention" in kinds if kinds else settings.get("max_window_layers", 28) < config.num_layers
    window = settings.get("sliding_window", 4096)
    if settings.get("use_sliding_window") and has_windows and window is not None and window < config.max_positions:
        raise ValueError(f"'use_sliding_window' asks for attention to the last {window} tokens, which is lacking here.")


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model: `from_hugging_face` gives the same configuration back."""
    family = config.family
    settings = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    settings |= {key: getattr(config, field) for field, (key, _) in KEYS[family].items()}
    stop = config.eos_tokens
    settings["eos_token_id"] = None if not stop else stop[0] if len(stop) == 1 else list(stop)
    if config.positions == "learned":
        return settings
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope |= {"low_freq_factor": config.rope_low_frequency, "high_freq_factor": config.rope_high_frequency}
        rope |= {"original_max_position_embeddings": config.rope_original_positions}
    if family == "gpt_neox":
        rope |= {"partial_rotary_factor": config.rope_fraction}
        settings |= {"rotary_emb_base": config.rope_theta, "rotary_pct": config.rope_fraction}
    else:
        settings |= {"rope_theta": config.rope_theta}
    # `transformers` before 5 overlooks `rope_parameters`, and would turn by other angles without a word.
    return settings | {"rope_parameters": rope} | ({"rope_scaling": rope} if config.rope_scaling != "none" else {})


# The weights.

LLAMA = {
    "embedding": ["model.embed_tokens"],
    "layers.attention_norm": ["model.layers.{}.input_layernorm"],
    "layers.qkv": [f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"],
    "layers.query_norm": ["model.layers.{}.self_attn.q_norm"],
    "layers.key_norm": ["model.layers.{}.self_attn.k_norm"],
    "layers.output": ["model.layers.{}.self_attn.o_proj"],
    "layers.mlp_norm": ["model.layers.{}.post_attention_layernorm"],
    "layers.up": ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
    "layers.down": ["model.layers.{}.mlp.down_proj"],
    "final_norm": ["model.norm"],
    "head": ["lm_head"],
}
GPT2 = {
    "embedding": ["transformer.wte"],
    "position_embedding": ["transformer.wpe"],
    "layers.attention_norm": ["transformer.h.{}.ln_1"],
    "layers.qkv": ["transformer.h.{}.attn.c_attn"],
    "layers.output": ["transformer.h.{}.attn.c_proj"],
    "layers.mlp_norm": ["transformer.h.{}.ln_2"],
    "layers.up": ["transformer.h.{}.mlp.c_fc"],
    "layers.down": ["transformer.h.{}.mlp.c_proj"],
    "final_norm": ["transformer.ln_f"],
    "head": ["lm_head"],
}
GPT_NEOX = {
    "embedding": ["gpt_neox.embed_in"],
    "layers.attention_norm": ["gpt_neox.layers.{}.input_layernorm"],
    "layers.qkv": ["gpt_neox.layers.{}.attention.query_key_value"],
    "layers.output": ["gpt_neox.layers.{}.attention.dense"],
    "layers.mlp_norm": ["gpt_neox.layers.{}.post_attention_layernorm"],
    "layers.up": ["gpt_neox.layers.{}.mlp.dense_h_to_4h"],
    "layers.down": ["gpt_neox.layers.{}.mlp.dense_4h_to_h"],
    "final_norm": ["gpt_neox.final_layer_norm"],
    "head": ["embed_out"],
}
NAMES = {"llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "gpt_neox": GPT_NEOX}


class Stored(NamedTuple):
    """A tensor of an open safetensors file, which is mapped into memory and read where it is asked for."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return str(self.file.get_slice(self.name).get_dtype())

    def read(self) -> np.ndarray[Any, Any]:
        return self.file.get_tensor(self.name)


class Place(NamedTuple):
    """Where a tensor of the files belongs in the model."""

    name: str
    shape: tuple[int, ...]  # in the file
    leaf: str
    layer: int | None
    first: int
    last: int  # along the last axis of the leaf
    transposed: bool  # the file has [out, in]
    by_head: bool  # the file has queries, keys and values of each head side by side


def places(config: ModelConfig) -> Iterator[Place]:
    """Every tensor of the files, leaf by leaf of the model."""
    names, queries, keys = NAMES[config.family], config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = {"layers.qkv": [queries, keys, keys], "layers.up": [config.intermediate_size] * 2}
    for leaf, shape in leaves(jax.eval_shape(partial(init_model, config), jax.random.key(0))).items():
        module, _, kind = (leaf, "", "weight") if leaf in names else leaf.rpartition(".")
        stacked = leaf.startswith("layers.")
        transposed = stacked and len(shape.shape) == 3 and config.family != "gpt2"
        for layer in range(config.num_layers) if stacked else [None]:
            last = 0
            for name, width in zip(names[module], widths.get(module, ()) if len(names[module]) > 1 else shape.shape[-1:], strict=True):
                first, last = last, last + width
                size = (*shape.shape[stacked:-1], width)
                by_head = config.family == "gpt_neox" and module == "layers.qkv"
                name = f"{name.format(layer)}.{kind}"
                yield Place(name, size[::-1] if transposed else size, leaf, layer, first, last, transposed, by_head)


def leaves(tree: Any) -> dict[str, Any]:
    """Arrays by their names, `layers.qkv.weight`."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_file(place: Place, array: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """A tensor of the files as the model has it."""
    array = regrouped(array, num_heads, 3) if place.by_head else array
    return array.T if place.transposed else array


def to_file(place: Place, leaf: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What `from_file` gives `leaf` at this place. Contiguous, as safetensors would write the memory of a view as it lies."""
    array = (leaf if place.layer is None else leaf[place.layer])[..., place.first : place.last]
    array = array.T if place.transposed else array
    return np.ascontiguousarray(regrouped(array, 3, num_heads) if place.by_head else array)


def regrouped(array: np.ndarray[Any, Any], outer: int, inner: int) -> np.ndarray[Any, Any]:
    """Rows that count an outer and, within it, an inner index, in the order that has them the other way round."""
    return array.reshape(outer, inner, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def filled(config: ModelConfig, tensors: Mapping[str, Stored], dtype: np.dtype[Any]) -> LanguageModel:
    """A model with the tensors of the files, each read and converted by itself."""
    if config.num_layers > len(tensors):
        raise ValueError(f"{CONFIG} describes {config.num_layers} layers, and there are {len(tensors)} tensors in all.")
    expected, tensors = {place.name: place for place in places(config)}, renamed(config.family, tensors)
    embedding, head = (f"{NAMES[config.family][module][0]}.weight" for module in ("embedding", "head"))
    copy = tensors.pop(head, None) if config.tied else None
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"missing: {listed(missing)}.")
    if superfluous := [name for name in tensors if name not in expected]:
        raise ValueError(f"not part of a {config.family} model of this {CONFIG}: {listed(superfluous)}.")
    for name, place in expected.items():
        if tensors[name].shape != place.shape:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, and {CONFIG} describes {list(place.shape)}.")
        if tensors[name].dtype not in STORED:
            raise ValueError(f"{name} is stored as {tensors[name].dtype}; only {', '.join(STORED)} can be read, and nothing quantised.")
    if copy is not None and not np.array_equal(copy.read(), tensors[embedding].read()):
        raise ValueError(f"{head} differs from {embedding}, and {CONFIG} ties them ('tie_word_embeddings').")
    template = jax.eval_shape(partial(init_model, config), jax.random.key(0))
    filled = []
    for leaf, shape in leaves(template).items():
        buffer = np.empty(shape.shape, dtype)
        for place in (place for place in expected.values() if place.leaf == leaf):
            part = buffer if place.layer is None else buffer[place.layer]
            part[..., place.first : place.last] = from_file(place, tensors[place.name].read(), config.num_heads)
        filled.append(jnp.asarray(buffer))
    return jax.tree.unflatten(jax.tree.structure(template), filled)


def stored(model: LanguageModel, group: list[Place]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of these places, as the files have them."""
    arrays = {leaf: np.asarray(array) for leaf, array in leaves(model).items() if leaf in {place.leaf for place in group}}
    return {place.name: to_file(place, arrays[place.leaf], model.config.num_heads) for place in group}


def shards(model: LanguageModel) -> list[list[Place]]:
    """The places of the model in groups, each of which fits into a file."""
    size, groups = 0, list[list[Place]]([[]])
    for place in places(model.config):
        added = math.prod(place.shape) * model.embedding.dtype.itemsize
        if groups[-1] and size + added > SHARD_BYTES:
            size = 0
            groups.append([])
        size += added
        groups[-1].append(place)
    return groups


def renamed(family: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors by the names of a model with its head: checkpoints of the trunk alone lack the prefix, and some carry buffers."""
    prefix = NAMES[family]["embedding"][0].partition(".")[0] + "."
    head = f"{NAMES[family]['head'][0]}.weight"
    heads = {"lm_head.weight": head, head: head}
    bare = not any(name.startswith(prefix) for name in tensors)
    kept = [name for name in tensors if BUFFERS.search(name) is None]
    return {heads.get(name, prefix + name if bare else name): tensors[name] for name in kept}


def open_tensors(directory: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every tensor of the weight files in a directory, which stay open as long as `stack` does."""
    tensors: dict[str, Stored] = {}
    for path in weight_files(directory):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            names = list(file.keys())
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path.name} is corrupt or not a safetensors file: {error}") from error
        if twice := sorted(tensors.keys() & set(names)):
            raise ValueError(f"{path.name} holds {twice[0]}, and so does another file.")
        tensors |= {name: Stored(file, name) for name in names}
    return tensors


def weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        remedy = f"{pickled[0]} is a pickle, which can run code and is never read; convert it to safetensors." if pickled else ""
        raise ValueError(f"there is no {WEIGHTS} and no {INDEX}. {remedy}".rstrip())
    match read_json(directory / INDEX):
        case {"weight_map": dict(weight_map)} if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            names = sorted(set(weight_map.values()))
        case _:
            raise ValueError(f"{INDEX} is corrupt: it has no 'weight_map' from tensors to files.")
    for name in names:
        # Compared with what the directory has and never followed, so that a path in an index leads nowhere.
        if name not in os.listdir(directory) or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {name!r}, which is not a safetensors file in the directory.")
    return [directory / name for name in names]


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Files.


def digest(tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    found = hashlib.sha256()
    for name, array in tensors.items():
        found.update(name.encode())
        found.update(array.reshape(-1).view(np.uint8))
    return found.hexdigest()


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file and then take the name `path`, so that a kill leaves the old one or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def replace_text(path: Path, text: str) -> None:
    replace(path, lambda temporary: temporary.write_text(text))
