"""A disk that isn't there: what it takes, refuses, evicts, and tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from dynamo_box.kv.store.disk_counts import DiskEvents
from dynamo_box.kv.store.disk_files import file_bytes
from dynamo_box.kv.store.modelled_disk import ModelledDisk
from dynamo_box.protocol.kv import MODELLED, Block, KvLayout
from dynamo_box.protocol.spec import TierRehearsal

LAYOUT = KvLayout("sha256:m", "float16", 16, 10_000, MODELLED)
FILE = file_bytes(LAYOUT.block_bytes)
NOTHING = memoryview(b"")
AT_ONCE, NEVER = 1e15, 1e-3


class Rig:
    def __init__(self, blocks: float, bytes_per_s: float = AT_ONCE, limit: int = 100) -> None:
        self.told: list[tuple[str, bytes]] = []
        rates = TierRehearsal(disk_read_bytes_per_s=bytes_per_s, disk_write_bytes_per_s=bytes_per_s)
        self.disk = ModelledDisk(int(blocks * FILE), rates, changed=self._changed, write_queue_blocks=limit)
        self.disk.start()
        self.disk.attach(LAYOUT)

    def _changed(self, events: DiskEvents) -> None:
        self.told += [("+", digest) for digest in events.stored] + [("-", digest) for digest in events.removed]

    def write(self, number: int, priority: int | None = None) -> tuple[str, asyncio.Future[bool]]:
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        block = Block(name(number), b"", priority)
        return self.disk.write(LAYOUT.name, block, NOTHING, done.set_result), done

    async def written(self, number: int, priority: int | None = None) -> None:
        reason, done = self.write(number, priority)
        assert (reason, await done) == ("", True)

    async def read(self, *numbers: int) -> tuple[Sequence[bool], str]:
        done: asyncio.Future[tuple[Sequence[bool], str]] = asyncio.get_running_loop().create_future()
        wanted = [(name(number), NOTHING) for number in numbers]
        assert self.disk.read(LAYOUT.name, wanted, lambda result: done.set_result((result.good, result.error)))
        return await done

    def there(self) -> list[int]:
        return sorted(int.from_bytes(digest, "big") for digest in self.disk.digests(LAYOUT.name))


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scene())


def test_blocks_come_go_by_priority_and_age_and_the_box_hears_of_it() -> None:
    async def scene() -> None:
        rig = Rig(3)
        for number, priority in ((1, None), (2, 90), (3, None)):
            await rig.written(number, priority)
        assert await rig.read(1, 9) == ([True, False], "is gone")
        await rig.written(4)
        assert rig.there() == [1, 2, 4], "the third was used longest ago"
        await rig.written(4)
        rig.disk.pin(LAYOUT.name, [name(1)])
        await rig.written(5)
        assert rig.there() == [1, 2, 5]
        assert rig.told == [("+", name(1)), ("+", name(2)), ("+", name(3)), ("-", name(3)), ("+", name(4)),
                            ("-", name(4)), ("+", name(5))]  # fmt: skip
        figures = rig.disk.figures()
        assert (figures.state, figures.blocks, figures.used_bytes, figures.evicted) == ("on", 3, 3 * FILE, 2)
        assert (figures.in_blocks, figures.in_bytes, figures.out_blocks, figures.out_bytes) == (5, 50_000, 1, 10_000)
        assert rig.disk.clear() == 2
        assert (rig.there(), rig.disk.priority_of(LAYOUT.name, name(2))) == ([1], None)
        rig.disk.unpin(LAYOUT.name, [name(1)])
        assert rig.disk.clear() == 1

    run(scene)


def test_what_it_does_not_take() -> None:
    async def scene() -> None:
        rig = Rig(2, NEVER, limit=2)
        assert [rig.write(number)[0] for number in (1, 1, 2, 3)] == ["", "busy", "", "queue_full"]
        assert (rig.disk.figures().queued, rig.disk.figures().used_bytes, rig.there()) == (2, 2 * FILE, [])
        await rig.disk.close(0.0)
        assert rig.write(4)[0] == "closing"
        assert not rig.disk.read(LAYOUT.name, [(name(1), NOTHING)], lambda _: None)
        dropped = rig.disk.figures().dropped
        assert dropped == {"busy": 1, "queue_full": 1, "closing": 1}

        held = Rig(1)
        await held.written(1)
        held.disk.pin(LAYOUT.name, [name(1)])
        assert held.write(2)[0] == "capacity"

        small = Rig(0.5)
        assert small.write(1)[0] == "capacity"
        assert (small.disk.figures().state, small.disk.figures().reason) == (
            "off", f"its {int(0.5 * FILE)} bytes hold no block of {FILE}",
        )  # fmt: skip

    run(scene)
