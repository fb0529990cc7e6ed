"""Small GGUF files, made with the `gguf` package's own writer: a random Llama with a byte-level vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT = 64, 96, 4, 2, 16, 2, 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "Ġt he", "Ċ Ċ", "Ġ Ġ", "Ġ 1", "1 2")
TOKENS = (*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<think>")

Floats = npt.NDArray[np.float32]

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_tiny_gguf(
    path: Path,
    *,
    quantisation: GGMLQuantizationType = GGMLQuantizationType.F32,
    tied: bool = True,
    metadata: Mapping[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    extra_tensors: Mapping[str, Floats] | None = None,
) -> dict[str, Floats]:
    """Write the file; return what a Hugging Face Llama of it must hold, by name.

    Matrices are quantised, norms are float32, as llama.cpp does it. `metadata` replaces values; `leave_out` names
    metadata keys and tensors (GGUF names) that are not written.
    """
    random = np.random.default_rng(7)
    writer = GGUFWriter(path, "llama")
    _write_metadata(writer, dict(metadata or {}), leave_out)
    expected: dict[str, Floats] = {}
    for name, gguf_name, shape in _tensors(tied):
        weights = random.standard_normal(shape, dtype=np.float32)
        kind = quantisation if len(shape) == 2 else GGMLQuantizationType.F32
        expected[name] = dequantize(quantize(weights, kind), kind).reshape(shape)
        if gguf_name not in leave_out:
            packed = quantize(_as_llama_cpp_orders(name, weights), kind)
            writer.add_tensor(gguf_name, packed, raw_dtype=kind)
    for gguf_name, weights in (extra_tensors or {}).items():
        writer.add_tensor(gguf_name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _write_metadata(writer: GGUFWriter, replaced: dict[str, Any], leave_out: tuple[str, ...]) -> None:
    values: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": _token_types(),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    for key, value in (values | replaced).items():
        if key in leave_out:
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _ if value:
                writer.add_array(key, value)


def _token_types() -> list[int]:
    kinds = {**dict.fromkeys(SPECIAL, TokenType.CONTROL), "<think>": TokenType.USER_DEFINED}
    return [int(kinds.get(token, TokenType.NORMAL)) for token in TOKENS]


def _tensors(tied: bool) -> list[tuple[str, str, tuple[int, ...]]]:
    """Hugging Face's name, GGUF's name, shape."""
    vocabulary = len(TOKENS)
    keys = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", "token_embd.weight", (vocabulary, HIDDEN)),
        ("model.norm.weight", "output_norm.weight", (HIDDEN,)),
    ]
    if not tied:
        tensors.append(("lm_head.weight", "output.weight", (vocabulary, HIDDEN)))
    for layer in range(LAYERS):
        tensors += [
            (f"model.layers.{layer}.{part}.weight", f"blk.{layer}.{NAMES[part]}.weight", shape)
            for part, shape in shapes.items()
        ]
    return tensors


def _as_llama_cpp_orders(name: str, weights: Floats) -> Floats:
    """The row order that llama.cpp's converter gives q and k."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weights
    halves = weights.reshape(heads, 2, len(weights) // heads // 2, weights.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))
