"""The memory of KV blocks: how much of it, what a step reads and writes there, and copies of whole blocks."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineError
from engines.native.config import LlamaConfig


class KvCache:
    """Keys and values of all layers: [blocks, layers, 2, block_size, kv_heads, head_dim].

    A block lies in one piece, with its bytes in the order in which it lies in the KV tiers, so that copies of whole
    blocks are plain ones. Attention gathers its pieces all the same, and takes as long for it as where all blocks of a
    layer lie together.

    Anonymous memory, so that it costs nothing before it is first written, and reads as zeros, never as NaN.
    """

    def __init__(
        self, *, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (blocks, layers, 2, block_size, kv_heads, head_dim)
        count = math.prod(shape)
        self.bytes = count * dtype.itemsize
        self.blocks = blocks
        self._memory = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # the first copy into a block is half as long
        self.data = np.frombuffer(self._memory, np.uint8).reshape(blocks, -1)
        """Its bytes, for those who copy blocks: [blocks, bytes of a block]."""
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count)
        self._address = flat.data_ptr()
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
        self._layers = ()
        del self.data
        self._memory.close()

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
        for slot, block in zip(slots, blocks, strict=True):
            np.copyto(self.cache.data[block], np.frombuffer(slot, np.uint8))

    def clear(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.cache.data[block] = 0
