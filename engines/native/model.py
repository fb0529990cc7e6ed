"""The Llama forward pass over one flat batch of tokens, whatever sequences they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, linear, silu

from engines.native.attention import Batch
from engines.native.config import LlamaConfig
from engines.native.kv_cache import KvCache
from engines.native.rope import Rotation, inverse_frequencies

HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
WIDE = 16
"""Rows from which on a CPU without instructions for bfloat16 multiplies faster in float32, the conversion of the
matrix included: with 32 rows twice as fast, with 128 four times. A single row is faster in bfloat16: half the bytes.
"""


@dataclass(frozen=True)
class _Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype is torch.bfloat16 and len(inputs) >= WIDE and not HAS_BFLOAT16:
            bias = None if self.bias is None else self.bias.float()
            return linear(inputs.float(), self.weight.float(), bias).to(torch.bfloat16)
        return linear(inputs, self.weight, self.bias)


@dataclass(frozen=True)
class _Layer:
    """`qkv` and `gate_up` are several matrices in one: a wide product costs less than narrow ones."""

    input_norm: torch.Tensor
    qkv: _Linear
    output: _Linear
    post_norm: torch.Tensor
    gate_up: _Linear
    down: _Linear


class Llama:
    """`weights` are those of `tensor_plan`, wherever they lie; they are never written to."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._heads = (config.heads, config.kv_heads, config.kv_heads)
        self._embeddings = weights["embeddings"]
        self._norm = weights["norm"]
        self._output = self._embeddings if config.tied else weights["output"]
        self._layers = [_layer(weights, number) for number in range(config.layers)]
        self.bytes = sum(tensor.nbytes for tensor in weights.values())

    def forward(self, batch: Batch, cache: KvCache) -> torch.Tensor:
        """Compute the batch, write its keys and values, and return the logits [len(batch.last_rows),
        vocabulary].
        """
        hidden = embedding(batch.tokens, self._embeddings)
        rotation = Rotation(batch.positions, self._frequencies, self._dtype)
        for number, layer in enumerate(self._layers):
            attended = self._attend(number, self._normalise(hidden, layer.input_norm), batch, rotation, cache)
            hidden = hidden + layer.output(attended)
            gate, up = layer.gate_up(self._normalise(hidden, layer.post_norm)).chunk(2, dim=-1)
            hidden = hidden + layer.down(silu(gate) * up)
        return linear(self._normalise(hidden[batch.last_rows], self._norm), self._output)

    def _attend(
        self, number: int, inputs: torch.Tensor, batch: Batch, rotation: Rotation, cache: KvCache
    ) -> torch.Tensor:
        projected = self._layers[number].qkv(inputs).view(len(inputs), -1, self._config.head_dim)
        queries, keys, values = projected.split_with_sizes(self._heads, dim=1)
        queries, keys = rotation.apply(queries), rotation.apply(keys)
        cache.write(number, batch.slots, keys, values)
        attended = queries.new_empty(len(inputs), self._config.heads * self._config.head_dim)
        for group in batch.singles:
            attended[group.rows] = group.attend(queries[group.rows], cache, number)
        for chunk in batch.chunks:
            rows = chunk.rows
            attended[rows] = chunk.attend(queries[rows], keys[rows], values[rows], cache, number)
        return attended

    def _normalise(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm, in float32 as the reference has it, even for a float64 model."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._config.rms_norm_eps)
        return weight * (wide * scale).to(self._dtype)


def _layer(weights: Mapping[str, torch.Tensor], number: int) -> _Layer:
    def part(name: str) -> _Linear:
        return _Linear(weights[f"layers.{number}.{name}.weight"], weights.get(f"layers.{number}.{name}.bias"))

    return _Layer(
        input_norm=weights[f"layers.{number}.input_norm"],
        qkv=part("qkv"),
        output=part("output"),
        post_norm=weights[f"layers.{number}.post_norm"],
        gate_up=part("gate_up"),
        down=part("down"),
    )
