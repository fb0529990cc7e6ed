"""Blocks of the engine's pool from and to memory in which a block lies in one piece.

With numpy rather than torch: it copies on the thread that calls it, without the interpreter's lock, where torch would
start threads of its own beside those that compute. On one thread it is as fast as memcpy of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engines.native.attention import KvCache


class PoolCopier:
    """Implements `engines.native.tiering.Pool` over the cache that is there now."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache

    def copy_out(self, blocks: Sequence[int], slots: Sequence[memoryview]) -> None:
        pieces = self.cache.pieces
        for block, slot in zip(blocks, slots, strict=True):
            np.copyto(_as_pieces(slot, pieces), pieces[:, block])

    def copy_in(self, slots: Sequence[memoryview], blocks: Sequence[int]) -> None:
        pieces = self.cache.pieces
        for slot, block in zip(slots, blocks, strict=True):
            np.copyto(pieces[:, block], _as_pieces(slot, pieces))

    def clear(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.cache.pieces[:, block] = 0


def _as_pieces(slot: memoryview, pieces: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(slot, np.uint8).reshape(len(pieces), -1)
