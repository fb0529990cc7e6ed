"""A disk tier with small blocks, a fast pace, and its news kept."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynamo_box.kv.store.disk import DiskEvents, DiskTier, Pace, ReadResult
from dynamo_box.kv.store.disk_files import file_bytes
from dynamo_box.protocol.kv import Block, KvLayout

DEADLINE_S = 120
FAST = Pace(tick=0.01, patience=20.0, check=0.02, retry=0.01, retry_most=0.05, takeover=0.02, settled=60.0)
LAYOUT = KvLayout("tiny", "f16", 16, 5000, "five thousand bytes")
FILE_BYTES = file_bytes(LAYOUT.block_bytes)


def digest_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content_of(number: int, layout: KvLayout = LAYOUT) -> bytes:
    return (number.to_bytes(4, "little") * layout.block_bytes)[: layout.block_bytes]


def memory(content: bytes = b"", layout: KvLayout = LAYOUT) -> memoryview:
    """A slot, as the arena has it."""
    view = memoryview(mmap.mmap(-1, layout.slot_bytes))
    view[: len(content)] = content
    return view


class Tier:
    """`known` is what the news add up to."""

    def __init__(
        self,
        directory: Path,
        *,
        blocks: int = 16,
        capacity: int | None = None,
        layout: KvLayout = LAYOUT,
        **changes: Any,
    ) -> None:
        self.layout = layout
        self.notes: list[tuple[str, str]] = []
        self.known: dict[str, set[bytes]] = {}
        self.directory = directory
        settings: dict[str, Any] = {"threads": 2, "owner": "box one", "write_queue_blocks": 1024, "pace": FAST}
        self.tier = DiskTier(
            directory,
            blocks * file_bytes(layout.block_bytes) if capacity is None else capacity,
            changed=self._changed,
            note=lambda level, text: self.notes.append((level, text)),
            **{**settings, **changes},
        )

    async def __aenter__(self) -> Tier:
        self.tier.attach(self.layout)
        self.tier.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tier.close(DEADLINE_S)

    async def ready(self) -> Tier:
        await self.until(lambda: self.state == "on" and self.tier.indexing == 0 and self.tier.settled)
        return self

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not reached():
                await asyncio.sleep(0.001)

    @property
    def state(self) -> str:
        return self.tier.figures().state

    @property
    def reason(self) -> str:
        return self.tier.figures().reason

    def has(self, number: int) -> bool:
        return self.tier.has(self.layout.name, digest_of(number))

    def held(self) -> set[int]:
        return {int.from_bytes(digest, "big") for digest in self.tier.digests(self.layout.name)}

    def offer(self, number: int, priority: int | None = None) -> asyncio.Future[bool] | str:
        """Whether it is there in the end, or why it isn't taken."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        data = memory(content_of(number, self.layout), self.layout)
        block = Block(digest_of(number), priority=priority)
        return self.tier.write(self.layout.name, block, data, done.set_result) or done

    async def write(self, *numbers: int, priority: int | None = None) -> list[bool]:
        offered = [self.offer(number, priority) for number in numbers]
        return [False if isinstance(each, str) else await each for each in offered]

    async def read(self, *numbers: int) -> tuple[ReadResult, list[bytes]]:
        done: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
        views = [memory(layout=self.layout) for _ in numbers]
        wanted = list(zip(map(digest_of, numbers), views, strict=True))
        if not self.tier.read(self.layout.name, wanted, done.set_result):
            return ReadResult([False] * len(numbers), 0.0, "refused"), []
        result = await done
        return result, [bytes(view[: self.layout.block_bytes]) for view in views]

    async def right(self, *numbers: int) -> list[bool]:
        """Which can be read. Whatever is given out as good is what was written."""
        result, contents = await self.read(*numbers)
        for number, good, content in zip(numbers, result.good, contents, strict=False):
            assert not good or content == content_of(number, self.layout)
        return result.good

    def pin(self, *numbers: int) -> None:
        self.tier.pin(self.layout.name, [digest_of(number) for number in numbers])

    def unpin(self, *numbers: int) -> None:
        self.tier.unpin(self.layout.name, [digest_of(number) for number in numbers])

    def touch(self, number: int) -> None:
        self.tier.touch(self.layout.name, digest_of(number))

    def raise_priority(self, number: int, priority: int | None) -> None:
        self.tier.raise_priority(self.layout.name, digest_of(number), priority)

    def files(self) -> dict[int, Path]:
        """By block, what lies on disk."""
        return {int(path.name[:32], 16): path for path in sorted((self.directory / self.layout.name).glob("??/*.kv"))}

    def temporaries(self) -> Sequence[str]:
        return os.listdir(self.directory / "tmp")

    def check(self) -> None:
        """News, index, files and figures say the same."""
        assert self.known.get(self.layout.name, set()) == {digest_of(number) for number in self.held()}
        assert set(self.files()) == self.held()
        figures = self.tier.figures()
        assert figures.used_bytes == sum(path.stat().st_size for path in self.files().values())
        assert figures.used_bytes <= figures.capacity_bytes
        assert figures.blocks == len(self.held())

    def _changed(self, events: DiskEvents) -> None:
        known = self.known.setdefault(events.layout, set())
        assert not known & set(events.stored)
        assert known >= set(events.removed)
        known.update(events.stored)
        known.difference_update(events.removed)
