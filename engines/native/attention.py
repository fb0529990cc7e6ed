"""Attention through the paged KV cache.

A step's tokens lie in one flat batch. Sequences that compute a single token (they decode, or only the last
token of their prompt was not cached) attend together, in groups of similar length, since a group is padded to
its longest; a prompt's chunk attends on its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from engines.native.kv_cache import KvCache
from engines.native.scheduler import Work


@dataclass(frozen=True)
class SingleTokens:
    """Sequences with one token each in this step; the mask hides what lies beyond each one's length."""

    rows: slice
    table: torch.Tensor
    mask: torch.Tensor

    def attend(self, queries: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        """The heads that share a KV head stand as the rows of one query, so nothing is repeated."""
        keys, values = cache.read(layer, self.table)
        sequences, kv_heads, _, head_dim = keys.shape
        grouped = queries.view(sequences, kv_heads, -1, head_dim)
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask).flatten(1)


@dataclass(frozen=True)
class PromptChunk:
    """Several consecutive tokens of one sequence; `table` and `mask` are None where nothing precedes them."""

    rows: slice
    table: torch.Tensor | None
    mask: torch.Tensor | None

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cache: KvCache, layer: int
    ) -> torch.Tensor:
        """`queries`: [tokens, heads, head_dim]; `keys` and `values` likewise, of these tokens."""
        if self.table is None or self.mask is None:
            past = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
        else:
            length = self.mask.shape[1]
            past_keys, past_values = cache.read(layer, self.table)
            past = past_keys[:, :, :length], past_values[:, :, :length]
        attended = scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            *past,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Batch:
    """One step's tokens, flat. `slots` are the block that each one's KV goes to, and the place there; `last_rows` are
    the rows of tokens after which something is sampled.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: tuple[torch.Tensor, torch.Tensor]
    singles: tuple[SingleTokens, ...]
    chunks: tuple[PromptChunk, ...]
    last_rows: torch.Tensor


def make_batch(works: Sequence[Work], block_size: int, dtype: torch.dtype) -> tuple[Batch, list[Work]]:
    """Lay out a step; also the works that sample, in the order of `last_rows`."""
    tokens: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    places: list[int] = []
    last_rows: list[int] = []
    sampling: list[Work] = []

    def lay_out(work: Work) -> None:
        sequence = work.sequence
        end = sequence.computed + work.count
        tokens.extend(sequence.tokens[sequence.computed : end])
        positions.extend(range(sequence.computed, end))
        for position in range(sequence.computed, end):
            block, place = divmod(position, block_size)
            blocks.append(sequence.blocks[block])
            places.append(place)
        if work.samples:
            last_rows.append(len(tokens) - 1)
            sampling.append(work)

    singles = []
    for group in _by_length(works, block_size):
        start = len(tokens)
        for work in group:
            lay_out(work)
        singles.append(_single_tokens(slice(start, len(tokens)), group, block_size, dtype))
    chunks = []
    for work in works:
        if work.count > 1:
            start = len(tokens)
            lay_out(work)
            chunks.append(_prompt_chunk(slice(start, len(tokens)), work, block_size, dtype))
    batch = Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=(torch.tensor(blocks), torch.tensor(places)),
        singles=tuple(singles),
        chunks=tuple(chunks),
        last_rows=torch.tensor(last_rows, dtype=torch.long),
    )
    return batch, sampling


def _by_length(works: Sequence[Work], block_size: int) -> list[list[Work]]:
    """Works of one token, grouped so that padding at most doubles what a sequence reads."""
    groups: defaultdict[int, list[Work]] = defaultdict(list)
    for work in works:
        if work.count == 1:
            groups[_blocks(work.sequence.computed + 1, block_size).bit_length()].append(work)
    return list(groups.values())


def _single_tokens(rows: slice, group: list[Work], block_size: int, dtype: torch.dtype) -> SingleTokens:
    lengths = torch.tensor([work.sequence.computed + 1 for work in group])
    width = _blocks(int(lengths.max()), block_size)
    table = [[*work.sequence.blocks[:width], *([0] * (width - len(work.sequence.blocks)))] for work in group]
    hidden = torch.arange(width * block_size) >= lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return SingleTokens(rows, torch.tensor(table), mask[:, None, None])


def _prompt_chunk(rows: slice, work: Work, block_size: int, dtype: torch.dtype) -> PromptChunk:
    start, length = work.sequence.computed, work.sequence.computed + work.count
    if start == 0:
        return PromptChunk(rows, None, None)
    table = torch.tensor([work.sequence.blocks[: _blocks(length, block_size)]])
    mask = torch.full((work.count, length), float("-inf"), dtype=dtype).triu_(start + 1)
    return PromptChunk(rows, table, mask)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
