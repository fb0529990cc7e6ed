"""An engine as `Tiers` sees it: a pool of blocks, a copier, and a place where results come in."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dynamo_box.kv.client.jobs import Fetch, Fetched, Offer, Offered, Seek, Sought
from dynamo_box.kv.client.lane import Limits
from dynamo_box.kv.client.tiers import Tiers
from dynamo_box.kv.hashing import chain_digests, isolation_key
from dynamo_box.protocol.kv import Block, KvLayout

DEADLINE_S = 120.0
BLOCK_SIZE = 4
LAYOUT = KvLayout("model", "float32", BLOCK_SIZE, 5000, "layers=1")
KEY = isolation_key("model", block_size=BLOCK_SIZE, kv_dtype="float32")
PATIENT = Limits(DEADLINE_S, DEADLINE_S, DEADLINE_S, DEADLINE_S, DEADLINE_S)
IMPATIENT = Limits(attach_s=0.3, seek_s=0.3, store_s=0.3, load_s=0.3, fetch_s=DEADLINE_S)


def chain(name: int, count: int, key: bytes = KEY, priority: int | None = None) -> tuple[Block, ...]:
    """A chain of its own for each name."""
    tokens = b"".join((name * 100_000 + at).to_bytes(4, "little") for at in range(count * BLOCK_SIZE))
    digests = chain_digests(tokens, BLOCK_SIZE, key)
    return tuple(Block(one, parent, priority) for one, parent in zip(digests, [b"", *digests], strict=False))


def content(digest: bytes, size: int = LAYOUT.block_bytes) -> bytes:
    """What is in the block of this digest, and in no other."""
    return (digest * (size // len(digest) + 1))[:size]


class Engine:
    """`before_out` and `before_in` run within each copy, before its first byte, with the pool blocks. A store is
    waited for whatever else the machine does; `give_up_after` sets other limits.
    """

    def __init__(
        self, path: Path, *, layout: KvLayout = LAYOUT, connect: bool = True, limits: Limits = PATIENT, **options: Any
    ) -> None:
        self.layout = layout
        self.pool: dict[int, bytes] = {}
        self.results: list[Any] = []
        self.arrived = threading.Condition()
        self.before_out: Callable[[Sequence[int]], None] = lambda blocks: None
        self.before_in: Callable[[Sequence[int]], None] = lambda blocks: None
        self.copying = 0
        self.last_key = self.last_block = 0
        self.tiers = Tiers(path, "test", layout, self, self.deliver, limits=limits, **options)
        self.tiers.start()
        if connect:
            assert self.tiers.wait_connected(DEADLINE_S), self.tiers.status

    def copy_out(self, blocks: Sequence[int], slots: Sequence[memoryview]) -> None:
        with self._copying():
            self.before_out(blocks)
            for block, slot in zip(blocks, slots, strict=True):
                slot[:] = self.pool[block]

    def copy_in(self, slots: Sequence[memoryview], blocks: Sequence[int]) -> None:
        with self._copying():
            self.before_in(blocks)
            for slot, block in zip(slots, blocks, strict=True):
                self.pool[block] = bytes(slot)

    def prepare(self) -> bool:
        return False

    def give_up_after(self, limits: Limits) -> None:
        """For what is asked from now on."""
        self.tiers._in._limits = self.tiers._out._limits = limits

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        with self.arrived:
            self.copying += 1
        try:
            yield
        finally:
            with self.arrived:
                self.copying -= 1

    def deliver(self, result: Any) -> None:
        with self.arrived:
            self.results.append(result)
            self.arrived.notify_all()

    # Jobs, by key.

    def offer(self, blocks: Sequence[Block]) -> int:
        places = self.places(len(blocks))
        self.pool.update(zip(places, (content(one.digest, self.layout.block_bytes) for one in blocks), strict=True))
        self.tiers.offer(Offer(self.key(), places, tuple(blocks)))
        return self.last_key

    def seek(self, blocks: Sequence[Block]) -> int:
        self.tiers.seek(Seek(self.key(), tuple(one.digest for one in blocks)))
        return self.last_key

    def fetch(self, lease: int, count: int, skip: int = 0) -> tuple[int, tuple[int, ...]]:
        places = self.places(count)
        self.tiers.fetch(Fetch(self.key(), lease, places, skip))
        return self.last_key, places

    # Jobs and their results.

    def store(self, blocks: Sequence[Block]) -> Offered:
        return self.result(self.offer(blocks))

    def find(self, blocks: Sequence[Block]) -> Sought:
        return self.result(self.seek(blocks))

    def load(self, sought: Sought, blocks: Sequence[Block], skip: int = 0) -> Fetched:
        """Fetch as many of what was sought as there are `blocks`; what is said to be there is compared."""
        key, places = self.fetch(sought.lease, len(blocks), skip)
        fetched = self.result(key)
        self.check(fetched, places, blocks)
        return fetched

    def check(self, fetched: Fetched, places: Sequence[int], blocks: Sequence[Block]) -> None:
        for place, block in list(zip(places, blocks, strict=True))[: fetched.count]:
            assert self.pool[place] == content(block.digest, self.layout.block_bytes), "wrong bytes in the pool"

    def result(self, key: int) -> Any:
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.of(key), DEADLINE_S), f"no result for job {key}"
            (found,) = self.of(key)
            return found

    def of(self, key: int) -> list[Any]:
        return [one for one in self.results if one.key == key]

    def key(self) -> int:
        self.last_key += 1
        return self.last_key

    def places(self, count: int) -> tuple[int, ...]:
        """Pool blocks that nobody had before."""
        self.last_block += count
        return tuple(range(self.last_block - count, self.last_block))

    def until_status_says(self, words: str) -> None:
        with self.tiers._changed:
            assert self.tiers._changed.wait_for(lambda: words in self.tiers.status, DEADLINE_S), self.tiers.status

    def until_asked(self) -> None:
        """Until a question about what is there is on its way to the store."""
        give_up_at = time.monotonic() + DEADLINE_S
        while not (session := self.tiers._in._session) or not session.unanswered:
            assert time.monotonic() < give_up_at, self.tiers.status
            time.sleep(0.001)

    def lose(self, blocks: Sequence[Block]) -> str:
        """Seek until an error tells that the connection is gone; what it says."""
        while not (error := self.find(blocks).error):
            pass
        return error

    def close(self) -> None:
        """Everything that was asked has one result, and no copy is under way."""
        self.tiers.close()
        assert self.copying == 0
        keys = sorted(one.key for one in self.results)
        assert keys == list(range(1, self.last_key + 1)), "a job with no result, or with two"


def mapped(inode: int) -> bool:
    """Whether this process maps that file."""
    return any(int(line.split()[4]) == inode for line in Path("/proc/self/maps").read_text().splitlines())
