"""What of a prompt a worker needn't compute: blocks in its own pool, and blocks that it can load from the box's tiers.

Host memory and disk belong to the box, so every worker gets credit for them, where its own pool has nothing. A block
counts as the worker's own if it holds it, else as host, else as disk; at the first block that is nowhere the credit
ends. So the stretches may alternate: a block that a pool has lost from the middle of a prompt is loaded, and what
follows it in the pool is still of use.

Hashes are keyed by model (see `dynamo_box.kv.hashing`), so one index of the tiers serves all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_box.router.index import SHARD_SHIFT, KvIndex

NOWHERE, HOST, DISK = 0, 1, 2
HOST_TIER, DISK_TIER = "g2", "g3"


class BoxTiers:
    """The blocks in the tiers, as the process `holder` tells them; empty while it isn't connected."""

    def __init__(self, holder: str = "") -> None:
        self.holder = holder
        self.index = KvIndex()
        self.connected = False

    @property
    def host_blocks(self) -> int:
        return self.index.blocks(self.holder, HOST_TIER)

    @property
    def disk_blocks(self) -> int:
        return self.index.blocks(self.holder, DISK_TIER)

    @property
    def empty(self) -> bool:
        return not self.index.blocks(self.holder)


@dataclass(frozen=True, slots=True)
class Credit:
    """In blocks of a prompt, for one worker: in its `own` pool, or expected there; to be loaded from `host` memory or
    `disk`. `awaited` are those of `own` that an earlier request computes: they count as that one's load.
    """

    own: int = 0
    host: int = 0
    disk: int = 0
    awaited: int = 0


class Run(NamedTuple):
    """Blocks from `start` up to but without `end`: the same holders (bits of the pool's index), and the same tier."""

    start: int
    end: int
    holders: int
    tier: int


def credit_each(
    workers: Sequence[str], predicted: Sequence[int], *, pool: KvIndex, tiers: BoxTiers, hashes: Sequence[int]
) -> list[Credit]:
    """What each of `workers` gets for a prompt; for each, so many `predicted` blocks count as its own already."""
    if tiers.empty:
        indexed = pool.match(hashes)
        cached = [indexed.get(worker, 0) for worker in workers]
        pairs = zip(cached, predicted, strict=True)
        return [Credit(own=max(there, soon), awaited=max(soon - there, 0)) for there, soon in pairs]
    bits = [pool.bits(worker) or pool.unused_bit for worker in workers]
    runs = find_runs(pool, tiers, hashes, bits=sum(bits), ordered=max(predicted))
    return [credit_of(runs, its, soon) for its, soon in zip(bits, predicted, strict=True)]


def find_runs(pool: KvIndex, tiers: BoxTiers, hashes: Sequence[int], *, bits: int, ordered: int = 0) -> list[Run]:
    """Runs that give each worker of `bits` its credit, as far as any of them may get some. Two look-ups a block.

    The first `ordered` blocks are in order and complete. After them only the places where some worker's credit ends
    are in order, since nothing else matters: runs alike that lie between two such places are one run (from `ordered`
    on), so that few are left however often the stretches of a prompt alternate.
    """
    host, disk = tiers.index.bits(tiers.holder, HOST_TIER), tiers.index.bits(tiers.holder, DISK_TIER)
    pool_shards, tier_shards = pool.shards, tiers.index.shards
    runs: list[Run] = []
    alike: dict[tuple[int, int], int] = {}
    start, holders, kept, tier, in_order = 0, -1, -1, NOWHERE, True
    for depth, block in enumerate(hashes):
        shard = block >> SHARD_SHIFT
        here = pool_shards[shard].get(block, 0)
        kept_here = tier_shards[shard].get(block, 0)
        if here == holders and kept_here == kept:
            continue
        if depth and in_order:
            runs.append(Run(start, depth, holders, tier))
        elif depth:
            kind = holders, tier
            alike[kind] = alike.get(kind, 0) + depth - start
        start, holders, kept = depth, here, kept_here
        tier = HOST if kept & host else DISK if kept & disk else NOWHERE
        in_order = depth < ordered
        if not in_order and tier == NOWHERE and bits & ~holders:
            in_order = True
            runs += [Run(ordered, ordered + blocks, *kind) for kind, blocks in alike.items()]
            alike.clear()
            bits &= holders
            if not bits:
                return runs
    runs += [Run(ordered, ordered + blocks, *kind) for kind, blocks in alike.items()]
    runs.append(Run(start, len(hashes), holders, tier))
    return runs


def credit_of(runs: Sequence[Run], bits: int, predicted: int) -> Credit:
    """What the worker that `bits` stand for gets, with its first `predicted` blocks counted as its own already.

    Of these it waits for what wasn't to be had when the request that they came from was placed: that one computes from
    the first such block on.
    """
    own, host, disk, awaited = predicted, 0, 0, 0
    gap = False
    for start, end, holders, tier in runs:
        held = holders & bits
        if start < predicted:
            gap = gap or not (held or tier)
            if gap:
                awaited += min(end, predicted) - start
            start = min(end, predicted)
        if start == end:
            continue
        if held:
            own += end - start
        elif tier == HOST:
            host += end - start
        elif tier == DISK:
            disk += end - start
        else:
            break
    return Credit(own, host, disk, awaited)
