"""What planning needs to know of a model, whether it lies in the store or only in the catalogue."""

from __future__ import annotations

import msgspec


class ModelFacts(msgspec.Struct, frozen=True):
    """`weights_bytes` as they will lie in memory, in `dtype`; `path` is None until the model is in the store.

    KV bytes a token = layers × 2 × kv_heads × head_dim × bytes of the KV dtype.
    """

    name: str
    source: str
    architecture: str
    weights_bytes: int
    dtype: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    path: str | None = None
    fingerprint: str = ""
