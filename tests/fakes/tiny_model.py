"""A tiny random Llama in a Hugging Face directory: real in every respect, except that it has nothing to say.

Written without torch, in milliseconds. The weights are large enough that what it generates depends on the
whole prompt, and the tokenizer is a real byte-level BPE, so that any text makes the round trip.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = range(3)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "user assistant system user assistant system",
    "The engine answers the router; the router asks the index.",
)


def make_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    dtype: Literal["float64", "float32"] = "float64",
    vocab_size: int = 288,
    hidden: int = 16,
    intermediate: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 4,
    context_length: int = 2048,
    tied: bool = False,
    **config: Any,
) -> Path:
    """Write the model to `path` (made if need be) and return it; `config` adds to or overrides config.json.

    `vocab_size` is at least 259: 256 bytes and 3 special tokens.
    """
    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": IM_START_ID,
        "eos_token_id": IM_END_ID,
        "torch_dtype": dtype,
        **config,
    }
    _write_json(path / "config.json", settings)
    stops = {"bos_token_id": IM_START_ID, "eos_token_id": [IM_END_ID], "pad_token_id": END_OF_TEXT_ID}
    _write_json(path / "generation_config.json", stops)
    _write_tokenizer(path, vocab_size, context_length)
    save_file(_random_weights(settings, np.random.default_rng(seed)), path / "model.safetensors", {"format": "pt"})
    return path


def _random_weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Tensors by their Hugging Face names, rows being outputs."""
    dtype = np.dtype(config["torch_dtype"])
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def linear(outputs: int, inputs: int) -> Any:
        return (rng.standard_normal((outputs, inputs)) * 1.5 / np.sqrt(inputs)).astype(dtype)

    def vector(size: int, around: float) -> Any:
        return (around + rng.standard_normal(size) * 0.1).astype(dtype)

    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], hidden)).astype(dtype),
        "model.norm.weight": vector(hidden, 1.0),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        projections = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, (outputs, inputs) in projections.items():
            tensors[f"{at}.{name}.weight"] = linear(outputs, inputs)
            if config["attention_bias" if name.startswith("self_attn") else "mlp_bias"]:
                tensors[f"{at}.{name}.bias"] = vector(outputs, 0.0)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = vector(hidden, 1.0)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = linear(config["vocab_size"], hidden)
    return tensors


def _write_tokenizer(path: Path, vocab_size: int, context_length: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": IM_START,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
