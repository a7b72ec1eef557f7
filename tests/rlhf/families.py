"""Small random models of every family, as `transformers` makes them, whose configurations together turn every switch."""

import logging
import os
import tempfile
from functools import cache, partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config

from surefoot.rlhf.model import LanguageModel, ModelConfig, init_model
from surefoot.rlhf.pretrained import load_model
from surefoot.training.cache import use_compilation_cache

use_compilation_cache()
logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 37
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
SHAPE |= {"intermediate_size": 24, "bos_token_id": None, "eos_token_id": 5, "pad_token_id": None}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 5, "eos_token_id": 5}
# The contexts are short, so that each of the three kinds of frequencies is among those of 4 pairs.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

CONFIGURATIONS = {
    "llama grouped, biases, llama3": LlamaConfig(
        **SHAPE,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16},
    ),
    "llama tied, wide heads, linear": LlamaConfig(
        **SHAPE,
        head_dim=12,
        tie_word_embeddings=True,
        hidden_act="gelu",
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    ),
    "qwen2 one key head": Qwen2Config(**SHAPE, num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2 tied": Qwen2Config(**SHAPE, num_key_value_heads=4, tie_word_embeddings=True, hidden_act="relu"),
    "qwen3 grouped, wide heads": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "qwen3 tied, biases": Qwen3Config(**SHAPE, num_key_value_heads=4, head_dim=6, attention_bias=True, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied, narrow, exact gelu": GPT2Config(**GPT2, n_inner=20, activation_function="gelu", tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**SHAPE, rotary_pct=0.25, hidden_act="gelu_pytorch_tanh"),
    "gpt_neox one after the other, no biases": GPTNeoXConfig(
        **SHAPE, rotary_pct=0.5, use_parallel_residual=False, attention_bias=False, rotary_emb_base=300.0, tie_word_embeddings=True
    ),
    "gpt_neox odd rotation": GPTNeoXConfig(**SHAPE, rotary_pct=0.4, hidden_act="gelu_new"),
}
ONE_OF_EACH = [  # whose most likely token is not always the same
    "llama grouped, biases, llama3",
    "qwen2 one key head",
    "qwen3 grouped, wide heads",
    "gpt2 untied, narrow, exact gelu",
    "gpt_neox",
]


@cache
def torch_model(name: str) -> torch.nn.Module:
    """The model of one of CONFIGURATIONS with no weight at its initial 0 or 1, so that none can be forgotten."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@cache
def saved(name: str) -> Path:
    """Its directory, as `transformers` saves it."""
    directory = Path(tempfile.mkdtemp(prefix="surefoot-family-"))
    torch_model(name).save_pretrained(directory)
    return directory


@cache
def loaded(name: str) -> LanguageModel:
    return load_model(saved(name))[0]


def small(**settings) -> ModelConfig:
    """A Llama of two narrow layers."""
    shape = {"vocab_size": 11, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    return ModelConfig(**shape | {"intermediate_size": 24, "max_positions": 32, "tied": True} | settings)


def random_model(config: ModelConfig, seed: int = 0, spread: float = 0.5) -> LanguageModel:
    """Weights so large that predictions differ clearly from one another."""
    shapes = jax.eval_shape(partial(init_model, config), jax.random.key(0))
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(0, spread, x.shape), jnp.float32), shapes)
