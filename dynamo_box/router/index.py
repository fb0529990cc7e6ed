"""Which worker holds which KV blocks.

A block's hash is a chain over everything before it (see `dynamo_box.kv.hashing`), so it names a whole prefix
and no tree is needed: the index is a flat map from hash to the set of its holders, kept as bits of an
integer. Matching a prompt walks its hashes until nobody is left.

A bit stands for one tier of one life of a worker. To forget a worker, or to clear one of its tiers, is to
retire its bits, whatever the number of blocks: nothing asks for them any more. `sweep` takes retired bits out
of the map later, a piece at a time, and only then are they given to somebody else.

The map is cut into 4096 shards by the upper bits of the hash (the lower ones place it inside a shard's dict),
since one dict of a million entries stalls its loop for 100 ms when it grows.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

SHARDS = 4096
SHARD_SHIFT = 64 - 12
MAX_BLOCKS_PER_WORKER = 2**20
SWEEP_BUDGET = 2048


class _Holding:
    """One tier of one life of a worker: its bit in the map, and how many blocks carry it."""

    __slots__ = ("bit", "blocks")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.blocks = 0


class KvIndex:
    """Blocks by worker and tier, for one model. A worker exists from its first block on."""

    def __init__(self, max_blocks_per_worker: int = MAX_BLOCKS_PER_WORKER) -> None:
        self._max_blocks = max_blocks_per_worker
        self._shards: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self._workers: dict[str, dict[str, _Holding]] = {}
        self._free_bits: list[int] = []
        self._bits_given = 0
        self._retired = 0
        self._sweeping = 0
        self._next_shard = 0

    # what workers tell

    def store(self, worker: str, hashes: Sequence[int], tier: str = "g1") -> int:
        """Add blocks, in order, as long as the worker is below its cap; the number left out."""
        holding = self._holding(worker, tier)
        bit = holding.bit
        shards = self._shards
        room = self._max_blocks - self.blocks(worker)
        added = 0
        for position, block in enumerate(hashes):
            shard = shards[block >> SHARD_SHIFT]
            holders = shard.get(block, 0)
            if not holders & bit:
                if added == room:
                    holding.blocks += added
                    return len(hashes) - position
                shard[block] = holders | bit
                added += 1
        holding.blocks += added
        return 0

    def remove(self, worker: str, hashes: Sequence[int], tier: str = "g1") -> None:
        """Take blocks out; those that the worker doesn't hold in that tier are passed over."""
        holding = self._workers.get(worker, {}).get(tier)
        if holding is None:
            return
        bit = holding.bit
        shards = self._shards
        removed = 0
        for block in hashes:
            shard = shards[block >> SHARD_SHIFT]
            holders = shard.get(block, 0)
            if holders & bit:
                removed += 1
                if holders == bit:
                    del shard[block]
                else:
                    shard[block] = holders ^ bit
        holding.blocks -= removed

    def clear(self, worker: str, tier: str = "g1") -> None:
        """Empty one tier of a worker, at once."""
        holding = self._workers.get(worker, {}).pop(tier, None)
        if holding is not None:
            self._retire(holding)

    def forget(self, worker: str) -> None:
        """Empty all tiers of a worker, at once."""
        for holding in self._workers.pop(worker, {}).values():
            self._retire(holding)

    # what placement asks

    def match(self, hashes: Sequence[int]) -> dict[str, int]:
        """Blocks from the start of `hashes` that each worker holds without a break, in whatever tier.

        Workers that don't hold the first block are left out.
        """
        alive = {worker: sum(holding.bit for holding in tiers.values()) for worker, tiers in self._workers.items()}
        overlaps: dict[str, int] = {}
        shards = self._shards
        previous = -1  # all bits set: everybody holds what comes before the first block
        for depth, block in enumerate(hashes):
            holders = shards[block >> SHARD_SHIFT].get(block, 0)
            if holders == previous:
                continue
            previous = holders
            for worker in [worker for worker, bits in alive.items() if not holders & bits]:
                del alive[worker]
                if depth:
                    overlaps[worker] = depth
            if not alive:
                return overlaps
        if hashes:
            overlaps.update(dict.fromkeys(alive, len(hashes)))
        return overlaps

    def holds(self, worker: str, block: int) -> bool:
        """Whether the worker holds this one block, in whatever tier."""
        holders = self._shards[block >> SHARD_SHIFT].get(block, 0)
        return any(holders & holding.bit for holding in self._workers.get(worker, {}).values())

    def bits(self, worker: str, tier: str | None = None) -> int:
        """What stands for this worker in the map's values, in one tier or all; 0 if it holds nothing."""
        tiers = self._workers.get(worker, {})
        return sum(holding.bit for name, holding in tiers.items() if tier in (None, name))

    @property
    def unused_bit(self) -> int:
        """One that no block has now: it may stand for a worker that holds nothing."""
        return 1 << self._bits_given

    def blocks(self, worker: str, tier: str | None = None) -> int:
        """(tier, block) pairs of a worker."""
        tiers = self._workers.get(worker, {})
        return sum(holding.blocks for name, holding in tiers.items() if tier in (None, name))

    @property
    def shards(self) -> Sequence[Mapping[int, int]]:
        """The map, to be read only: a block's shard is `block >> SHARD_SHIFT`."""
        return self._shards

    def full(self, worker: str) -> bool:
        return self.blocks(worker) >= self._max_blocks

    @property
    def total_blocks(self) -> int:
        """(worker, tier, block) triples."""
        return sum(self.blocks(worker) for worker in self._workers)

    @property
    def map_entries(self) -> int:
        """Entries of the map, those that only retired bits keep included: what the memory goes by."""
        return sum(map(len, self._shards))

    # housekeeping

    def sweep(self, budget: int = SWEEP_BUDGET) -> bool:
        """Look at about `budget` entries for retired bits and take those out; whether more is to be done."""
        if not self._sweeping:
            self._sweeping, self._retired, self._next_shard = self._retired, 0, 0
            if not self._sweeping:
                return False
        stale, kept = self._sweeping, ~self._sweeping
        while self._next_shard < SHARDS and budget > 0:
            shard = self._shards[self._next_shard]
            self._next_shard += 1
            budget -= len(shard) + 1
            for block in [block for block, holders in shard.items() if holders & stale]:
                holders = shard[block] & kept
                if holders:
                    shard[block] = holders
                else:
                    del shard[block]
        if self._next_shard < SHARDS:
            return True
        self._sweeping = 0
        self._give_back(stale)
        return bool(self._retired)

    def _holding(self, worker: str, tier: str) -> _Holding:
        tiers = self._workers.setdefault(worker, {})
        holding = tiers.get(tier)
        if holding is None:
            holding = tiers[tier] = _Holding(self._take_bit())
        return holding

    def _retire(self, holding: _Holding) -> None:
        if holding.blocks:
            self._retired |= holding.bit
        else:
            self._give_back(holding.bit)

    def _take_bit(self) -> int:
        """The lowest free one: integers below 257 take no memory of their own, so eight workers are cheap."""
        if self._free_bits:
            return 1 << heapq.heappop(self._free_bits)
        self._bits_given += 1
        return 1 << (self._bits_given - 1)

    def _give_back(self, bits: int) -> None:
        while bits:
            lowest = bits & -bits
            heapq.heappush(self._free_bits, lowest.bit_length() - 1)
            bits ^= lowest
