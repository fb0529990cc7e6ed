"""What the engine must know of a model before it touches the weights, and its own options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.contract import EngineError

DTYPES = ("float32", "float64", "bfloat16")
DEFAULT_MAX_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class RopeConfig:
    """`kind` is default, linear or llama3; the fields below `factor` are llama3's (see `rope.py`)."""

    kind: str
    theta: float
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_context: int = 0


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    context_length: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    eos_ids: frozenset[int]

    def kv_bytes_per_token(self, item_bytes: int) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * item_bytes


@dataclass(frozen=True)
class Options:
    """The `options` of a native worker. `dtype` None: the weights' own where a CPU computes well in it, else
    float32.

    `max_batch_tokens` bounds one step: what is left of it beside the sequences that decode goes to prompts.
    """

    dtype: str | None = None
    max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS


def read_options(options: Mapping[str, bool | int | float | str], max_batch: int) -> Options:
    """Check the worker's options.

    Raises:
        EngineError: an unknown key, or a value that makes no sense.
    """
    known = ("dtype", "max_batch_tokens")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise _refuse(f"the native engine has no option {', '.join(unknown)}", f"its options: {', '.join(known)}")
    dtype = options.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise _refuse(f"option dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    budget = options.get("max_batch_tokens", DEFAULT_MAX_BATCH_TOKENS)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < max_batch:
        raise _refuse(
            f"option max_batch_tokens: {budget!r} is not a whole number of at least max_batch ({max_batch})",
            "each running sequence takes one token a step",
        )
    return Options(dtype=str(dtype) if dtype is not None else None, max_batch_tokens=budget)


def read_config(model: Path) -> LlamaConfig:
    """Read config.json and generation_config.json.

    Raises: EngineError: no such model, or one that this engine can't run; permanent, and it names what stands
    against it.
    """
    raw = _read_json(model / "config.json")
    if raw is None:
        raise _refuse(f"{model} holds no config.json", "pull the model again")
    _refuse_unsupported(raw)
    try:
        heads = int(raw["num_attention_heads"])
        hidden = int(raw["hidden_size"])
        config = LlamaConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            context_length=int(raw.get("max_position_embeddings", 2048)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            rope=_read_rope(raw),
            eos_ids=_token_ids(raw.get("eos_token_id"))
            | _token_ids((_read_json(model / "generation_config.json") or {}).get("eos_token_id")),
        )
    except KeyError as missing:
        raise _refuse(f"config.json of {model} has no {missing.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise _refuse(f"config.json of {model} is not usable: {error}") from None
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise _refuse(f"{config.heads} heads over {config.kv_heads} KV heads of {config.head_dim} can't be computed")
    return config


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures") or []
    name = architectures[0] if architectures else raw.get("model_type", "none named")
    if name not in ("LlamaForCausalLM", "llama"):
        raise _refuse(f"architecture {name} is not supported", "the native engine runs LlamaForCausalLM")
    if raw.get("hidden_act", "silu") != "silu":
        raise _refuse(f"activation {raw['hidden_act']} (hidden_act) is not supported, only silu")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise _refuse(f"quantised weights ({method}) are not supported", "use the unquantised model")


def _read_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Newer files have `rope_parameters`, older ones `rope_theta` beside an optional `rope_scaling`."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if kind == "default":
        return RopeConfig(kind, theta)
    if kind == "linear":
        return RopeConfig(kind, theta, factor=float(scaling["factor"]))
    if kind == "llama3":
        return RopeConfig(
            kind,
            theta,
            factor=float(scaling["factor"]),
            low_frequency_factor=float(scaling["low_freq_factor"]),
            high_frequency_factor=float(scaling["high_freq_factor"]),
            original_context=int(scaling["original_max_position_embeddings"]),
        )
    raise _refuse(f"rope type {kind} is not supported", "supported: default, linear, llama3")


def _token_ids(value: Any) -> frozenset[int]:
    """`eos_token_id` is absent, null, a number or a list."""
    if value is None:
        return frozenset()
    return frozenset(int(token) for token in (value if isinstance(value, list) else [value]))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _refuse(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise _refuse(f"{path} holds no JSON object")
    return content


def _refuse(cause: str, remedy: str = "") -> EngineError:
    return EngineError(cause, remedy=remedy, permanent=True)
