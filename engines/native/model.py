"""The Llama forward pass over one flat batch of tokens, whatever sequences they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, linear, silu

from engines.native.attention import Batch, KvCache
from engines.native.config import LlamaConfig
from engines.native.rope import Rotation, inverse_frequencies
from engines.native.weights import Checkpoint


@dataclass(frozen=True)
class _Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
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
    def __init__(self, config: LlamaConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._heads = (config.heads, config.kv_heads, config.kv_heads)
        vocabulary = (config.vocab_size, config.hidden_size)
        self._embeddings = checkpoint.tensor("model.embed_tokens.weight", vocabulary, dtype)
        self._norm = checkpoint.tensor("model.norm.weight", (config.hidden_size,), dtype)
        self._output = self._embeddings if config.tied else checkpoint.tensor("lm_head.weight", vocabulary, dtype)
        self._layers = [self._layer(checkpoint, f"model.layers.{n}") for n in range(config.layers)]

        self.bytes = self._count_bytes()

    def _count_bytes(self) -> int:
        """What the weights take, those in the file's pages included."""
        tensors = [self._embeddings, self._norm, *([] if self._config.tied else [self._output])]
        for layer in self._layers:
            tensors += [layer.input_norm, layer.post_norm]
            for part in (layer.qkv, layer.output, layer.gate_up, layer.down):
                tensors += [part.weight, *([] if part.bias is None else [part.bias])]
        return sum(tensor.nbytes for tensor in tensors)

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

    def _layer(self, checkpoint: Checkpoint, at: str) -> _Layer:
        config = self._config
        hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim

        def norm(name: str) -> torch.Tensor:
            return checkpoint.tensor(f"{at}.{name}.weight", (hidden,), self._dtype)

        def stack(names: list[str], rows: list[int], columns: int, biased: bool) -> _Linear:
            weights, biases = (
                [f"{at}.{name}.weight" for name in names],
                [f"{at}.{name}.bias" for name in names],
            )
            return _Linear(
                checkpoint.stacked(weights, [(count, columns) for count in rows], self._dtype),
                checkpoint.stacked(biases, [(count,) for count in rows], self._dtype) if biased else None,
            )

        queries, keys = config.heads * head, config.kv_heads * head
        attention, mlp = config.attention_bias, config.mlp_bias
        return _Layer(
            input_norm=norm("input_layernorm"),
            qkv=stack(
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                [queries, keys, keys],
                hidden,
                attention,
            ),
            output=stack(["self_attn.o_proj"], [hidden], queries, attention),
            post_norm=norm("post_attention_layernorm"),
            gate_up=stack(["mlp.gate_proj", "mlp.up_proj"], [inner, inner], hidden, mlp),
            down=stack(["mlp.down_proj"], [hidden], inner, mlp),
        )
