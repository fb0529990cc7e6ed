"""What the store's tables cost: bytes a block, and the time of a batch of calls with 100,000 blocks.

python tests/bench/kv_metadata.py [--blocks 100000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable

from dynamo_box.kv.store.slots import HostTier
from dynamo_box.protocol.kv import Block, pack_header

BATCH = 125
"""Blocks of a prompt of 2,000 tokens."""


class Headers:
    def write(self, slot: int, generation: int, block: Block) -> None:
        pack_header(generation, block.digest, block.parent, block.priority)

    def wipe(self, slot: int) -> None:
        pass


def chain() -> list[Block]:
    digests = [b"", *(os.urandom(16) for _ in range(BATCH))]
    return [Block(digest, parent) for parent, digest in itertools.pairwise(digests)]


def store(tier: HostTier, blocks: list[Block]) -> None:
    tier.commit(1, [slot for slot in tier.reserve(1, blocks, 0.0, lambda _: False) if slot >= 0])
    tier.take_changes()


def timed(times: int, work: Callable[[], None]) -> dict[str, float]:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1e3)
    return {"p50_ms": round(statistics.median(took), 3), "worst_ms": round(max(took), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=100_000)
    blocks: int = parser.parse_args().blocks

    tracemalloc.start()
    tier = HostTier(Headers())
    before, _ = tracemalloc.get_traced_memory()
    tier.grow(blocks)
    empty, _ = tracemalloc.get_traced_memory()
    while tier.free:
        store(tier, chain())
    full, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    known = chain()
    store(tier, known)

    def find() -> None:
        lease = tier.find(1, [block.digest for block in known], 0.0, lambda _: False)
        assert lease is not None and len(lease.digests) == BATCH
        tier.release(lease)

    fresh = [chain() for _ in range(400)]
    result = {
        "blocks": tier.held,
        "bytes_a_slot": round((empty - before) / blocks, 1),
        "bytes_a_block": round((full - empty) / blocks, 1),
        "batch": BATCH,
        "find_and_release": timed(400, find),
        "evict_reserve_and_commit": timed(400, lambda: store(tier, fresh.pop())),
        "offer_what_is_known": timed(400, lambda: store(tier, known)),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
