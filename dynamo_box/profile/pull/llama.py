"""A Llama in GGUF's terms and in Hugging Face's: config, tensor names and shapes, order of rope rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dynamo_box.errors import BoxError
from dynamo_box.profile.pull.gguf_file import Bytes, GgufFile, GgufTensor

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.weight")

Config = dict[str, Any]


def config_of(file: GgufFile) -> Config:
    """config.json for the model in `file`.

    Raises:
        BoxError: it is not a Llama, is one of a kind that isn't supported, or lacks metadata.
    """
    architecture = file.require("general.architecture", str)
    if architecture != "llama":
        raise BoxError(
            f"{file.path.name} holds a model of architecture {architecture!r}; only 'llama' can be converted",
            remedy="pull the model as a safetensors repository or directory instead",
        )
    _refuse_variants(file)
    heads = file.require("llama.attention.head_count", int)
    hidden = file.require("llama.embedding_length", int)
    if heads < 1 or hidden < 1 or "token_embd.weight" not in file.tensors:
        raise file.refused("has no heads, no width or no token embedding")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int, -1),
        "eos_token_id": file.require("tokenizer.ggml.eos_token_id", int),
        "head_dim": file.get("llama.rope.dimension_count", int, hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": file.require("llama.feed_forward_length", int),
        "max_position_embeddings": file.require("llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": file.require("llama.block_count", int),
        "num_key_value_heads": file.get("llama.attention.head_count_kv", int, heads),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id", int, -1),
        "rms_norm_eps": file.require("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.get("llama.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
    }


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with that config, in Hugging Face's names, in the order of their use."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer_shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in layer_shapes.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def tensors_of(file: GgufFile, config: Config) -> dict[str, GgufTensor]:
    """The tensors by Hugging Face name, in the order of `shapes_of`: exactly those, and of those shapes.

    Raises:
        BoxError: one is missing, of another shape, or has no place in a Llama.
    """
    if config["num_hidden_layers"] > len(file.tensors):
        raise file.refused(f"claims {config['num_hidden_layers']} layers, with {len(file.tensors)} tensors")
    shapes = shapes_of(config)
    found: dict[str, GgufTensor] = {}
    for tensor in file.tensors.values():
        name = hub_name(tensor.name)
        if name is None or name not in shapes:
            raise file.refused(f"tensor {tensor.name} has no place in this Llama")
        found[name] = tensor
    for name, shape in shapes.items():
        if name not in found:
            raise file.refused(f"the tensor for {name} is missing")
        if found[name].shape != shape:
            raise file.refused(
                f"tensor {found[name].name} has shape {found[name].shape}; its metadata asks for {shape}"
            )
    return {name: found[name] for name in shapes}


def hub_name(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor, None if a Llama has none such."""
    if name in TENSORS:
        return TENSORS[name]
    match = LAYER_TENSOR.fullmatch(name)
    if match is None or match["part"] not in LAYER_TENSORS:
        return None
    return f"model.layers.{match['layer']}.{LAYER_TENSORS[match['part']]}.weight"


def in_hub_order(rows: Bytes, name: str, config: Config) -> Bytes:
    """Rows of a tensor in the order of Hugging Face's Llama.

    GGUF interleaves the two halves of each head that rope rotates together (rows 0, d/2, 1, d/2+1, …); Hugging
    Face keeps the halves apart. Whole rows move, so quantised rows can be moved as they are.
    """
    if name.endswith("self_attn.q_proj.weight"):
        heads = config["num_attention_heads"]
    elif name.endswith("self_attn.k_proj.weight"):
        heads = config["num_key_value_heads"]
    else:
        return rows
    count, width = rows.shape
    return rows.reshape(heads, count // heads // 2, 2, width).swapaxes(1, 2).reshape(count, width)


def _refuse_variants(file: GgufFile) -> None:
    """Refuse what a plain Llama config can't express, rather than convert it wrongly."""
    variants = []
    if file.get("llama.expert_count", int, 0):
        variants.append("a mixture of experts")
    if file.get("llama.rope.scaling.type", str, "none") != "none" or "rope_freqs.weight" in file.tensors:
        variants.append("scaled rotary embeddings")
    heads = file.require("llama.attention.head_count", int)
    width = file.require("llama.embedding_length", int) // max(heads, 1)
    rotated = file.get("llama.rope.dimension_count", int, width)
    if file.get("llama.attention.key_length", int, rotated) != rotated:
        variants.append("heads of which only a part is rotated")
    if variants:
        raise BoxError(
            f"{file.path.name} holds a Llama with {' and '.join(variants)}, which can't be converted",
            remedy="pull the model as a safetensors repository or directory instead",
        )
