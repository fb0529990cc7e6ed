"""The memory of KV blocks: how much of it, what a step reads and writes there, and copies of whole blocks."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dynamo_box.kv.pages import POPULATE_WRITE, populate
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineError
from engines.native.config import LlamaConfig

PREPARED_BYTES = 128 * 1024 * 1024
"""Of the blocks that come next: some thousand tokens of a small model."""
PREPARED_AT_ONCE = 4 * 1024 * 1024


class KvCache:
    """Keys and values of all layers: [blocks, layers, 2, block_size, kv_heads, head_dim].

    A block lies in one piece, with its bytes in the order in which it lies in the KV tiers, so that copies of whole
    blocks are plain ones. Attention gathers its pieces all the same, and takes as long for it as where all blocks of a
    layer lie together.

    Anonymous memory, so that it costs nothing before it is first written, and reads as zeros, never as NaN. The first
    write to a block takes four times as long as others, for want of pages. `prepare` gets them ahead of copies. (Huge
    pages are not asked for: where memory is in pieces the kernel makes room for them as they are touched, which takes
    longer still.)
    """

    def __init__(
        self, *, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (blocks, layers, 2, block_size, kv_heads, head_dim)
        count = math.prod(shape)
        self.bytes = count * dtype.itemsize
        self.blocks = blocks
        self._memory = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = np.frombuffer(self._memory, np.uint8).reshape(blocks, -1)
        """Its bytes, for those who copy blocks: [blocks, bytes of a block]."""
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count)
        self._address = flat.data_ptr()
        self.loaded = 0
        """Blocks from the first one on among which are all that something was copied into."""
        self._guard = threading.Lock()
        self._prepared = 0
        """Blocks from the first one on for whose pages the kernel was asked."""
        self._layers = tuple(layer.unbind(1) for layer in flat.view(shape).unbind(1))
        """Keys and values: [blocks, block_size, kv_heads, head_dim] each."""

    @property
    def resident_bytes(self) -> int:
        """What of it the kernel has really given, by mincore(2)."""
        pages = -(-self.bytes // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        if ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(self._address), ctypes.c_size_t(self.bytes), resident
        ):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in bytes(resident)) * mmap.PAGESIZE

    def close(self) -> None:
        """Give the memory back; the cache is of no further use."""
        with self._guard:
            self._prepared = self.blocks
            self._layers = ()
            del self.data
            self._memory.close()

    def prepare(self) -> bool:
        """Get some more pages for the blocks behind those that were `loaded`; False if enough of them have theirs, or
        nothing was loaded yet: others need not have the memory before they write to it. May be called on any thread.
        """
        with self._guard:
            used = self.loaded
            block_bytes = self.bytes // self.blocks
            start = max(self._prepared, used)
            end = min(start + max(PREPARED_AT_ONCE // block_bytes, 1), self.blocks)
            if not used or start >= end or (start - used) * block_bytes >= PREPARED_BYTES:
                return False
            first = start * block_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            last = -(-end * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            self._prepared = end
            return populate(self._address + first, last - first, POPULATE_WRITE)

    def write(
        self, layer: int, slots: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """`keys` and `values`: [tokens, kv_heads, head_dim]; `slots`: the block of each token, and its place there."""
        for cache, new in zip(self._layers[layer], (keys, values), strict=True):
            cache[slots] = new

    def read(self, layer: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the blocks in `table` [sequences, blocks]: [sequences, kv_heads, tokens,
        head_dim] each.
        """
        keys, values = (
            cache.index_select(0, table.flatten()).view(len(table), -1, *cache.shape[2:]).transpose(1, 2)
            for cache in self._layers[layer]
        )
        return keys, values


def make_cache(config: LlamaConfig, spec: WorkerSpec, dtype: torch.dtype) -> KvCache:
    """As many blocks as fit what the plan gives it.

    Raises:
        EngineError: not a single one does.
    """
    block_bytes = config.kv_bytes_per_token(dtype.itemsize) * spec.model.block_size
    blocks = spec.kv_bytes // block_bytes
    if blocks < 1:
        raise EngineError(
            f"{spec.kv_bytes} bytes for KV hold no block of {spec.model.block_size} tokens ({block_bytes})",
            remedy="give the worker more memory for KV",
            permanent=True,
        )
    return KvCache(
        layers=config.layers,
        blocks=blocks,
        block_size=spec.model.block_size,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )


class PoolCopier:
    """Blocks of the cache that is there now, from and to the KV tiers. Implements `engines.native.tiering.Pool`.

    With numpy rather than torch: it copies on the thread that calls it, without the interpreter's lock, where torch
    would start threads of its own beside those that compute.
    """

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache

    def copy_out(self, blocks: Sequence[int], slots: Sequence[memoryview]) -> None:
        for block, slot in zip(blocks, slots, strict=True):
            np.copyto(np.frombuffer(slot, np.uint8), self.cache.data[block])

    def copy_in(self, slots: Sequence[memoryview], blocks: Sequence[int]) -> None:
        self.cache.loaded = max(self.cache.loaded, max(blocks) + 1)
        for slot, block in zip(slots, blocks, strict=True):
            np.copyto(self.cache.data[block], np.frombuffer(slot, np.uint8))

    def prepare(self) -> bool:
        return self.cache.prepare()

    def clear(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.cache.data[block] = 0
