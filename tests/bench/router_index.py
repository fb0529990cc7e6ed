"""What a placement costs, and what the index weighs: `python tests/bench/router_index.py` prints the figures.

A script, not a test: nothing here fails for being slow on a busy machine.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable

import psutil

from dynamo_box.discovery.instances import Instance
from dynamo_box.protocol.request import KvDump, KvStored
from dynamo_box.protocol.route import Place, Placed
from dynamo_box.protocol.spec import ModelSpec
from dynamo_box.router.cost import Knobs
from dynamo_box.router.credit import BoxTiers, credit_each
from dynamo_box.router.feed import Feed
from dynamo_box.router.index import KvIndex
from dynamo_box.router.placement import Placement

WORKERS = 8
PROMPT_BLOCKS = 2000
SHORT_PROMPT_BLOCKS = 94  # 1,500 tokens
BLOCK_SIZE = 16
INDEXED_BLOCKS = 1_000_000
PAGE = 10_000
REPEATS = 200

_rng = random.Random(0)


def hashes(count: int) -> tuple[int, ...]:
    return tuple(_rng.getrandbits(64) for _ in range(count))


def milliseconds(samples: list[float]) -> str:
    ordered = sorted(samples)
    return (
        f"median {statistics.median(ordered) * 1e3:7.3f} ms   p99 {ordered[len(ordered) * 99 // 100] * 1e3:7.3f} ms"
        f"   max {ordered[-1] * 1e3:7.3f} ms"
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of this thread's CPU time: a busy machine makes them no longer."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def pieces(piece: Callable[[], bool]) -> list[float]:
    """Run a piece until there is no more; seconds of each."""
    took = []
    again = True
    while again:
        started = time.thread_time()
        again = piece()
        took.append(time.thread_time() - started)
    return took


class _Silent:
    def doubt(self, reason: str) -> None:
        raise AssertionError(reason)

    def cleared(self) -> None: ...

    def index_full(self) -> None: ...


def match(shared: bool) -> None:
    """Everybody holds the whole prompt, or worker n holds an eighth more of it than worker n - 1."""
    index = KvIndex()
    prompt = hashes(PROMPT_BLOCKS)
    for worker in range(WORKERS):
        held = PROMPT_BLOCKS if shared else PROMPT_BLOCKS * (worker + 1) // WORKERS
        index.store(f"w{worker}", prompt[:held])
    samples = [timed(lambda: index.match(prompt)) for _ in range(REPEATS)]
    name = "all hold all" if shared else "in steps"
    print(f"match       {WORKERS} workers × {PROMPT_BLOCKS} blocks, {name:12} {milliseconds(samples)}")


def credit(blocks: int, kept: str) -> None:
    """What each worker has or could load. "alternating" is the worst: each block is elsewhere than the one before."""
    pool, tiers = KvIndex(), BoxTiers("kvstore")
    prompt = hashes(blocks)
    everybody = [f"w{worker}" for worker in range(WORKERS)]
    if kept == "no tiers":
        for worker in everybody:
            pool.store(worker, prompt)
    elif kept == "tiers hold all":
        for worker in everybody:
            pool.store(worker, prompt[: blocks // 4])
        tiers.index.store(tiers.holder, prompt[: blocks // 2], "g2")
        tiers.index.store(tiers.holder, prompt, "g3")
    elif kept == "nothing of it":
        tiers.index.store(tiers.holder, hashes(1), "g2")
    else:
        for number, worker in enumerate(everybody):
            pool.store(worker, prompt[number :: WORKERS + 1])
        tiers.index.store(tiers.holder, prompt[::2], "g2")
        tiers.index.store(tiers.holder, prompt[1::2], "g3")
    unpredicted = [0] * WORKERS
    samples = [
        timed(lambda: credit_each(everybody, unpredicted, pool=pool, tiers=tiers, hashes=prompt))
        for _ in range(REPEATS)
    ]
    print(f"credit      {WORKERS} workers × {blocks:4} blocks, {kept:14} {milliseconds(samples)}")


def place(repeated: bool, blocks: int = PROMPT_BLOCKS, tiers: bool = False, legs: bool = False) -> None:
    """The whole decision: match, load, cost, lease and prediction. Repeated prompts are the busiest case. `legs`: half
    of the workers are there for prefill, half for decode.
    """
    spec = ModelSpec("m", "/m", "f", context_length=2**20, block_size=BLOCK_SIZE)
    placement = Placement((spec,), mode="kv", knobs=Knobs(), lease_ttl_s=300, rng=random.Random(0), kvstore="kvstore")
    prompt = hashes(blocks)
    if tiers:
        placement.tiers.index.store("kvstore", prompt, "g2")
        placement.tiers.index.store("kvstore", prompt, "g3")
    for number in range(WORKERS):
        role = "aggregated" if not legs else "decode" if number % 2 else "prefill"
        instance = Instance(f"w{number}", "m", role, "mock", "", 1, 1, "f", BLOCK_SIZE, 1, "float32", 2**20)
        placement.join(instance)
        placement.pools["m"].connect(instance.name)
        placement.pools["m"].index.store(instance.name, prompt[: blocks // 2] if tiers else prompt)
    samples = []
    for number in range(REPEATS):
        asked = prompt if repeated else hashes(blocks)
        request = Place(number, "r", "m", asked, blocks * BLOCK_SIZE)
        started = time.thread_time()
        reply = placement.place(0, request)
        samples.append(time.thread_time() - started)
        assert isinstance(reply, Placed)
        assert legs == (reply.prefill is not None)
        if number >= 64:
            placement.leases.release((0, number - 64))
    name = "new" if not repeated else "half in tiers" if tiers else "cached by all"
    what = "two legs" if legs else "place"
    print(f"{what:11} {WORKERS} workers × {blocks:4} blocks, {name:14} {milliseconds(samples)}")


def feed_and_sweep() -> None:
    """A million blocks of one worker: pages in, one life forgotten, its blocks swept; time of each slice."""
    gc.collect()
    process = psutil.Process()
    index = KvIndex(max_blocks_per_worker=INDEXED_BLOCKS)
    before = process.memory_info().rss
    feed = Feed(index, "w0", _Silent())
    slices: list[float] = []
    for start in range(0, INDEXED_BLOCKS, PAGE):
        more = start + PAGE < INDEXED_BLOCKS
        feed.receive(KvDump(0, hashes(PAGE), first=start == 0, more=more))
        slices += pieces(feed.apply)
    gc.collect()
    weight = process.memory_info().rss - before
    print(f"memory      {weight / INDEXED_BLOCKS:.0f} bytes an indexed block ({INDEXED_BLOCKS:,} blocks, one worker)")
    print(f"apply       slices of a dump              {milliseconds(slices)}")
    samples = []
    for number in range(REPEATS):
        feed.receive(KvStored(number, hashes(8), None))
        samples.append(timed(feed.apply))
    print(f"event       8 blocks                      {milliseconds(samples)}")
    print(f"forget      a million blocks              {timed(lambda: index.forget('w0')) * 1e6:.1f} µs")
    slices = pieces(index.sweep)
    print(f"sweep       slices                        {milliseconds(slices)}")
    assert index.map_entries == 0


if __name__ == "__main__":
    feed_and_sweep()
    match(shared=True)
    match(shared=False)
    for blocks in (SHORT_PROMPT_BLOCKS, PROMPT_BLOCKS):
        for kept in ("no tiers", "tiers hold all", "nothing of it", "alternating"):
            credit(blocks, kept)
        for legs in (False, True):
            place(repeated=True, blocks=blocks, legs=legs)
            place(repeated=True, blocks=blocks, tiers=True, legs=legs)
            place(repeated=False, blocks=blocks, legs=legs)
