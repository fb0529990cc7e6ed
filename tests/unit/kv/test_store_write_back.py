"""What goes from host memory to disk, and when, with a disk that does as it is told."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

from dynamo_box.kv.store.disk_port import DiskPort
from dynamo_box.kv.store.slots import HostTier
from dynamo_box.kv.store.write_back import Line, WriteBack
from dynamo_box.protocol.kv import Block


class NoHeaders:
    def write(self, slot: int, generation: int, block: Block) -> None:
        pass

    def wipe(self, slot: int) -> None:
        pass


@dataclass
class Disk:
    """`writing` are ended by `finish`; with a `refusal` nothing is taken."""

    settled: bool = True
    refusal: str = ""
    there: set[bytes] = field(default_factory=set)
    writing: dict[bytes, Callable[[bool], None]] = field(default_factory=dict)
    asked: int = 0

    def has(self, _layout: str, digest: bytes) -> bool:
        return digest in self.there

    def write(self, _layout: str, block: Block, _data: memoryview, done: Callable[[bool], None]) -> str:
        self.asked += 1
        assert block.digest not in self.writing
        if not self.refusal:
            self.writing[block.digest] = done
        return self.refusal

    def finish(self, count: int = 1, written: bool = True) -> None:
        for digest in list(self.writing)[:count]:
            if written:
                self.there.add(digest)
            self.writing.pop(digest)(written)


class Box:
    """A write-back of one layout with its host tier."""

    def __init__(self, slots: int, limit: int = 100, **options: Any) -> None:
        self.disk = Disk()
        self.dropped: Counter[str] = Counter()
        self.tier = HostTier(NoHeaders())
        self.tier.grow(slots)
        self.write_back = WriteBack(
            cast(DiskPort, self.disk), options.get("admission", "always"), limit, self.dropped, lambda: None
        )
        self.write_back.open(Line("m", self.tier, lambda slot: memoryview(bytes(8))))

    def store(self, *numbers: int) -> list[int]:
        blocks = [Block(bytes([number]) * 16) for number in numbers]
        slots = self.tier.reserve(1, blocks, 0.0, lambda _: False)
        assert min(slots) >= 0
        self.tier.commit(1, slots)
        self.use(*slots)
        return slots

    def use(self, *slots: int) -> None:
        for slot in slots:
            self.write_back.consider("m", slot)
        self.write_back.pump()

    @property
    def writing(self) -> list[int]:
        return [digest[0] for digest in self.disk.writing]

    @property
    def there(self) -> list[int]:
        return sorted(digest[0] for digest in self.disk.there)


def in_loop(scenario: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """A test that needs an event loop."""

    @functools.wraps(scenario)
    def test() -> None:
        asyncio.run(scenario())

    del test.__wrapped__  # type: ignore[attr-defined]  # pytest would take it for a coroutine
    return test


async def turn() -> None:
    await asyncio.sleep(0)


@in_loop
async def test_what_comes_is_written_in_order_a_few_at_once_and_pinned_meanwhile() -> None:
    box = Box(slots=10, limit=2)
    slots = box.store(1, 2, 3)
    assert box.writing == [1, 2] and [box.tier.is_pinned(slot) for slot in slots] == [True, True, False]
    assert box.write_back.waiting == 3 and not box.write_back.idle.is_set()
    box.use(*slots)
    box.disk.finish()
    await turn()
    assert box.writing == [2, 3] and not box.tier.is_pinned(slots[0])
    box.disk.finish(2)
    await turn()
    assert box.there == [1, 2, 3] and box.write_back.idle.is_set() and not box.write_back.waiting
    box.use(*slots)
    assert box.disk.asked == 3
    box.tier.check_integrity()


@in_loop
async def test_half_of_the_slots_can_always_be_evicted_and_what_is_evicted_unwritten_is_counted() -> None:
    box = Box(slots=4)
    box.store(1, 2, 3, 4)
    assert box.writing == [1, 2]
    box.store(5, 6)
    box.disk.finish(2)
    await turn()
    assert box.writing == [5, 6] and box.dropped == {"evicted": 2}
    one = Box(slots=1)
    one.store(1)
    assert one.writing == [1]


@in_loop
async def test_a_disk_that_is_not_there_yet_or_away_gets_it_all_later() -> None:
    box = Box(slots=20)
    box.disk.settled = False
    box.store(1, 2)
    assert not box.disk.asked and box.write_back.waiting == 2
    assert box.write_back.idle.is_set(), "there is nothing to wait for"
    box.disk.there.add(bytes([1]) * 16)
    box.disk.settled = True
    box.write_back.pump()
    assert box.writing == [2]
    box.disk.refusal = "no"
    (three,) = box.store(3)
    assert box.disk.asked == 2 and not box.tier.is_pinned(three)
    await turn()
    assert box.disk.asked == 2, "a disk that says no isn't asked again and again"
    box.disk.refusal = ""
    box.disk.finish()
    await turn()
    assert box.writing == [3]
    box.disk.finish(written=False)
    await turn()
    assert box.there == [1, 2] and box.write_back.idle.is_set()
    box.use(three)
    assert box.writing == [3], "used again, it is tried again"
    box.tier.check_integrity()


@in_loop
async def test_with_second_hit_a_block_is_written_once_it_was_used_again_twice() -> None:
    box = Box(slots=20, admission="second_hit")
    (slot,) = box.store(1)
    digest = box.tier.digest_in(slot)
    for hits in (1, 2):
        assert box.writing == []
        lease = box.tier.find(1, [digest], 0.0, lambda _: False)
        assert lease is not None
        box.tier.release(lease)
        assert box.tier.hits(slot) == hits
        box.use(slot)
    assert box.writing == [1]
