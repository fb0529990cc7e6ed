"""Which tensors a Llama model computes with, and of which of the checkpoint's each one is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from engines.native.config import LlamaConfig


class Planned(NamedTuple):
    """`sources` (names and shapes in the checkpoint) joined along their first dimension."""

    name: str
    sources: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.sources[0][1]
        return (sum(shape[0] for _, shape in self.sources), *first[1:])


def tensor_plan(config: LlamaConfig) -> list[Planned]:
    """In the order of the checkpoint. Query, key and value matrices are one, and so are gate and up: a wide product
    costs less than narrow ones.
    """
    return list(_planned(config))


def _planned(config: LlamaConfig) -> Iterator[Planned]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    vocabulary = (config.vocab_size, hidden)
    yield Planned("embeddings", (("model.embed_tokens.weight", vocabulary),))
    for number in range(config.layers):
        source, name = f"model.layers.{number}", f"layers.{number}"

        def joined(
            part: str, names: tuple[str, ...], rows: tuple[int, ...], columns: int, biased: bool,
            source: str = source, name: str = name,
        ) -> Iterator[Planned]:  # fmt: skip
            pairs = tuple(zip(names, rows, strict=True))
            yield Planned(f"{name}.{part}.weight", tuple((f"{source}.{one}.weight", (n, columns)) for one, n in pairs))
            if biased:
                yield Planned(f"{name}.{part}.bias", tuple((f"{source}.{one}.bias", (n,)) for one, n in pairs))

        attention = tuple(f"self_attn.{one}_proj" for one in "qkv")
        yield Planned(f"{name}.input_norm", ((f"{source}.input_layernorm.weight", (hidden,)),))
        yield from joined("qkv", attention, (queries, keys, keys), hidden, config.attention_bias)
        yield from joined("output", ("self_attn.o_proj",), (hidden,), queries, config.attention_bias)
        yield Planned(f"{name}.post_norm", ((f"{source}.post_attention_layernorm.weight", (hidden,)),))
        yield from joined("gate_up", ("mlp.gate_proj", "mlp.up_proj"), (inner, inner), hidden, config.mlp_bias)
        yield from joined("down", ("mlp.down_proj",), (hidden,), inner, config.mlp_bias)
    yield Planned("norm", (("model.norm.weight", (hidden,)),))
    if not config.tied:
        yield Planned("output", (("lm_head.weight", vocabulary),))
