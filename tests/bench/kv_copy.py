"""Bandwidth into and out of the host tier, as an engine gets it, over a plain memcpy of as many bytes.

    python tests/bench/kv_copy.py [--rounds 9] [--blocks 256] [--json]

A real store, and a worker's side of it and a pool as in the native engine. Blocks are those of SmolLM2-135M in float32:
16 tokens, 737,280 bytes. Each round offers as many new blocks, then fetches them, and copies as many bytes from one
buffer into another: at once, and a block at a time, both past the caches (as a worker does it: `plan/processes.py`). A
chain evicts the one before the last. The first round is told apart: its pages are touched for the first time. Medians;
best in brackets. The same in CPU time of this process, for a machine that has other things to do.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "process" / "kv_store")]  # ours before tests/engines

from store_peers import Store, room_for  # noqa: E402

from dynamo_box.kv.client.jobs import Fetch, Offer, Seek  # noqa: E402
from dynamo_box.kv.client.tiers import Tiers  # noqa: E402
from dynamo_box.kv.hashing import chain_digests, isolation_key  # noqa: E402
from dynamo_box.plan.processes import PAST_THE_CACHES  # noqa: E402
from dynamo_box.protocol.kv import Block, KvLayout  # noqa: E402
from engines.native.kv_cache import KvCache, PoolCopier  # noqa: E402

SHAPE: dict[str, Any] = {"layers": 30, "block_size": 16, "kv_heads": 3, "head_dim": 64, "dtype": torch.float32}
BLOCK_BYTES = 30 * 2 * 16 * 3 * 64 * 4
LAYOUT = KvLayout("smollm2", "float32", 16, BLOCK_BYTES, "layers=30,kv=2,tokens=16,heads=3,dim=64")
KEY = isolation_key("smollm2", block_size=16, kv_dtype="float32")
TIMEOUT_S = 60.0
MEMCPY, BY_BLOCK = "memcpy", "memcpy by block"


class Cost(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


class Bench:
    def __init__(self, directory: Path, blocks: int) -> None:
        self.blocks = blocks
        self.store = Store(directory, host_bytes=room_for(2 * blocks, LAYOUT))
        self.pool = KvCache(blocks=2 * blocks, **SHAPE)
        self.pool.data[:blocks] = np.random.default_rng(0).integers(0, 256, (blocks, BLOCK_BYTES), np.uint8)
        self.result: Any = None
        self.arrived = threading.Event()
        self.tiers = Tiers(self.store.path, "bench", LAYOUT, PoolCopier(self.pool), self.deliver)
        self.tiers.start()
        assert self.tiers.wait_connected(TIMEOUT_S), self.tiers.status
        bytes_ = blocks * BLOCK_BYTES
        self.source = np.random.default_rng(1).integers(0, 256, bytes_, np.uint8)
        fd = os.memfd_create("bench")
        os.ftruncate(fd, bytes_)
        self.target = np.frombuffer(mmap.mmap(fd, bytes_), np.uint8)
        os.close(fd)
        self.memcpy()

    def deliver(self, result: Any) -> None:
        self.result = result
        self.arrived.set()

    def memcpy(self) -> Cost:
        return self.cost(lambda: np.copyto(self.target, self.source))

    def memcpy_by_block(self) -> Cost:
        def act() -> None:
            for start in range(0, len(self.source), BLOCK_BYTES):
                end = start + BLOCK_BYTES
                np.copyto(self.target[start:end], self.source[start:end])

        return self.cost(act)

    def cost(self, act: Callable[[], None]) -> Cost:
        began, cpu_began = time.perf_counter(), time.process_time()
        act()
        return Cost(time.perf_counter() - began, time.process_time() - cpu_began)

    def ask(self, put: Callable[[], None]) -> tuple[Any, Cost]:
        """A job, from its call to its result."""

        def act() -> None:
            put()
            assert self.arrived.wait(TIMEOUT_S), "no result"

        self.arrived.clear()
        cost = self.cost(act)
        return self.result, cost

    def round(self, number: int) -> dict[str, Cost]:
        tokens = b"".join((number * 10**6 + at).to_bytes(4, "little") for at in range(self.blocks * 16))
        digests = chain_digests(tokens, 16, KEY)
        blocks = tuple(Block(one, parent) for one, parent in zip(digests, [b"", *digests], strict=False))
        times = {MEMCPY: self.memcpy(), BY_BLOCK: self.memcpy_by_block()}

        offer = Offer(0, tuple(range(self.blocks)), blocks)
        offered, times["into"] = self.ask(lambda: self.tiers.offer(offer))
        assert offered.stored == self.blocks, offered

        sought, times["seek"] = self.ask(lambda: self.tiers.seek(Seek(0, tuple(digests))))
        assert sought.tiers == "2" * self.blocks, sought

        fetch = Fetch(0, sought.lease, tuple(range(self.blocks, 2 * self.blocks)))
        fetched, times["out of"] = self.ask(lambda: self.tiers.fetch(fetch))
        assert fetched.count == self.blocks, fetched
        assert np.array_equal(self.pool.data[: self.blocks], self.pool.data[self.blocks :])
        times[MEMCPY] = min(times[MEMCPY], self.memcpy())
        times[BY_BLOCK] = min(times[BY_BLOCK], self.memcpy_by_block())
        return times

    def close(self) -> None:
        self.tiers.close()
        self.store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.environ.get("GLIBC_TUNABLES") != PAST_THE_CACHES:  # as in a worker: it counts from a process's start on
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": PAST_THE_CACHES})
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.blocks)
        rounds = [bench.round(number) for number in range(options.rounds + 2)]
        bench.close()
    size = options.blocks * BLOCK_BYTES
    cold, warm = rounds[0], rounds[2:]  # the second touches the other half of the arena

    figures: dict[str, Any] = {
        name: {
            "gb_per_s": size / median(one[name].wall for one in warm) / 1e9,
            "best_gb_per_s": size / min(one[name].wall for one in warm) / 1e9,
            "first_gb_per_s": size / cold[name].wall / 1e9,
            "of_memcpy": [median(one[plain].wall / one[name].wall for one in warm) for plain in (MEMCPY, BY_BLOCK)],
            "cpu_of_memcpy": [median(one[plain].cpu / one[name].cpu for one in warm) for plain in (MEMCPY, BY_BLOCK)],
        }
        for name in (MEMCPY, BY_BLOCK, "into", "out of")
    }
    figures["seek_ms"] = median(one["seek"].wall for one in warm) * 1e3
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{options.blocks} blocks, {size / 1e6:.0f} MB, {options.rounds} rounds")
    for name in (MEMCPY, BY_BLOCK, "into", "out of"):
        one = figures[name]
        (whole, by_block), (cpu_whole, cpu_by_block) = one["of_memcpy"], one["cpu_of_memcpy"]
        print(
            f"{name:16} {one['gb_per_s']:6.2f} GB/s ({one['best_gb_per_s']:.2f}), first {one['first_gb_per_s']:.2f}; "
            f"of memcpy {whole:.2f}, by block {by_block:.2f}; in CPU time {cpu_whole:.2f}, {cpu_by_block:.2f}"
        )
    print(f"seek             {figures['seek_ms']:6.2f} ms")


if __name__ == "__main__":
    main()
