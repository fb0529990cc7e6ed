"""The disk tier at work, with real files: what comes back, what stays, what goes."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_tiers import FAST, FILE_BYTES, LAYOUT, Tier, content_of, digest_of, memory

from dynamo_box.kv.store.disk import Pace
from dynamo_box.protocol.kv import UNSET_PRIORITY_COUNTS_AS, Block, KvLayout

NEVER = 1e9
FORGETFUL = Pace(**{**{name: getattr(FAST, name) for name in FAST.__dataclass_fields__}, "note_use": NEVER})
"""Writes uses down only when it is closed."""


def test_blocks_come_back_as_they_were_after_a_restart_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            assert await disk.write(1, 2) == [True, True]
            assert await disk.write(3, priority=80) == [True]
            assert await disk.right(3, 1, 2, 4) == [True, True, True, False]
            assert disk.tier.priority_of(LAYOUT.name, digest_of(3)) == 80
            figures = disk.tier.figures()
            assert (figures.in_blocks, figures.out_blocks, figures.failed) == (3, 3, 0)
            assert figures.used_bytes == 3 * FILE_BYTES
            disk.check()
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            assert disk.tier.indexed_in_s is not None
            assert disk.tier.priority_of(LAYOUT.name, digest_of(3)) == 80
            assert disk.tier.priority_of(LAYOUT.name, digest_of(1)) is None
            assert await disk.right(1, 2, 3) == [True] * 3
            disk.check()
        assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700

    asyncio.run(scenario())


@pytest.mark.parametrize("block_bytes", [1, 4095, 4096, 4097, 8192, 737_280])
def test_any_size_of_block(tmp_path: Path, block_bytes: int) -> None:
    layout = KvLayout("sized", "f16", 16, block_bytes, "")

    async def scenario() -> None:
        async with Tier(tmp_path / "kv", layout=layout, blocks=2) as disk:
            await disk.ready()
            assert await disk.write(7, 8, 9) == [True, True, True]
            assert await disk.right(8, 9) == [True, True]
            disk.check()

    asyncio.run(scenario())


def test_memory_that_is_on_no_page(tmp_path: Path) -> None:
    """O_DIRECT refuses it; it goes the other way."""

    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            data = memoryview(bytearray(LAYOUT.slot_bytes + 1))[1:]
            data[: LAYOUT.block_bytes] = content_of(1)
            done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            assert disk.tier.write(LAYOUT.name, Block(digest_of(1)), data, done.set_result) == ""
            assert await done
            into, read = memoryview(bytearray(LAYOUT.slot_bytes + 1))[1:], asyncio.get_running_loop().create_future()
            assert disk.tier.read(LAYOUT.name, [(digest_of(1), into)], read.set_result)
            assert (await read).good == [True]
            assert bytes(into[: LAYOUT.block_bytes]) == content_of(1)

    asyncio.run(scenario())


def test_a_layout_never_matches_another(tmp_path: Path) -> None:
    other = KvLayout("tiny", "f32", 16, 5000, "five thousand bytes")

    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            await disk.write(1)
            disk.tier.attach(other)
            await disk.ready()
            assert not disk.tier.has(other.name, digest_of(1))
            # a file that somebody put where the other's would be
            shelf = disk.directory / other.name / "00"
            shelf.mkdir()
            shutil.copy(disk.files()[1], shelf)
        async with Tier(tmp_path / "kv", layout=other) as disk:
            await disk.ready()
            assert disk.has(1)
            assert await disk.right(1) == [False]
            assert not disk.has(1)
            assert disk.tier.figures().failed == 1

    asyncio.run(scenario())


def test_layouts_that_nobody_attached_count_and_are_evicted(tmp_path: Path) -> None:
    other = KvLayout("other", "f16", 16, 5000, "")

    async def scenario() -> None:
        async with Tier(tmp_path / "kv", layout=other, blocks=4) as disk:
            await (await disk.ready()).write(1, 2, 3, 4)
        async with Tier(tmp_path / "kv", blocks=4) as disk:
            await disk.ready()
            assert disk.tier.figures().blocks == 4
            assert disk.known == {}
            await disk.write(5)
            assert disk.tier.figures().used_bytes == 4 * FILE_BYTES
            disk.tier.attach(other)
            await disk.until(lambda: disk.known.get(other.name) == {digest_of(number) for number in (2, 3, 4)})

    asyncio.run(scenario())


def test_lowest_priority_goes_first_then_the_least_recently_used(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", blocks=4, pace=FORGETFUL) as disk:
            await disk.ready()
            await disk.write(1)
            await disk.write(2, priority=UNSET_PRIORITY_COUNTS_AS)
            await disk.write(3, priority=90)
            await disk.write(4, priority=10)
            await disk.write(5)
            assert disk.held() == {1, 2, 3, 5}  # 4 had the lowest
            disk.touch(1)
            await disk.write(6)
            assert disk.held() == {1, 3, 5, 6}
            disk.raise_priority(5, 50)
            disk.raise_priority(5, 20)
            disk.pin(1)
            await disk.write(7)
            assert disk.held() == {1, 3, 5, 7}
            assert disk.tier.priority_of(LAYOUT.name, digest_of(5)) == 50
            disk.check()
            order = disk.files()
        assert disk.files().keys() == order.keys()
        assert disk.files()[5].name.endswith(".50.kv")

        # and after a restart, by what was written down
        for age, number in enumerate((1, 7)):
            os.utime(disk.files()[number], ns=(0, 10**18 - age))
        async with Tier(tmp_path / "kv", blocks=4) as disk:
            await disk.ready()
            await disk.write(8)
            assert disk.held() == {1, 3, 5, 8}
            await disk.write(9)
            assert disk.held() == {3, 5, 8, 9}
            disk.check()

    asyncio.run(scenario())


def test_what_was_used_last_stays_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", blocks=4, pace=FORGETFUL) as disk:
            await (await disk.ready()).write(1, 2, 3, 4)
            assert await disk.right(1) == [True]
        async with Tier(tmp_path / "kv", blocks=4) as disk:
            await (await disk.ready()).write(5, 6, 7)
            assert disk.held() == {1, 5, 6, 7}

    asyncio.run(scenario())


BLOCKING = (
    *("open", "rename", "unlink", "mkdir", "rmdir", "scandir", "listdir", "utime", "ftruncate", "fdatasync", "fsync"),
    *("pwritev", "preadv", "pread", "pwrite", "stat", "fstat", "fstatvfs", "posix_fadvise"),
)


def test_nothing_that_may_block_is_done_on_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_loop: list[str] = []
    elsewhere: set[str] = set()

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                elsewhere.add(name)
            elif "/kv/store/" in sys._getframe(1).f_code.co_filename:
                on_the_loop.append(name)
            return real(*arguments, **named)

        return call

    async def scenario() -> None:
        async with Tier(tmp_path / "kv", blocks=8) as disk:
            await (await disk.ready()).write(1, 2, 3)
        async with Tier(tmp_path / "kv", blocks=8) as disk:
            await disk.ready()
            await disk.write(*range(20))
            await disk.right(*disk.held())
            disk.raise_priority(19, 90)
            disk.tier.clear()
            await disk.until(lambda: disk.tier.figures().used_bytes == 0)
            await disk.write(*range(40, 44))
            (tmp_path / "kv").rename(tmp_path / "away")
            await disk.until(lambda: len(disk.notes) == 2)
            await disk.ready()
            await disk.write(1)

    with monkeypatch.context() as patch:
        for name in BLOCKING:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        asyncio.run(scenario())
    assert on_the_loop == []
    assert {"open", "rename", "unlink", "scandir", "pwritev", "preadv", "fsync"} <= elsewhere


def test_uses_are_written_down_while_it_works_and_what_is_read_meanwhile_is_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", pace=Pace(tick=0.001, note_use=0.0)) as disk:
            await disk.ready()
            await disk.write(1)
            os.utime(disk.files()[1], ns=(0, 0))
            for priority in range(40, 101):
                disk.raise_priority(1, priority)
                assert await disk.right(1) == [True]
            await disk.until(lambda: disk.files()[1].name.endswith(".100.kv"))
            assert disk.files()[1].stat().st_mtime_ns > 10**18
            assert await disk.right(1) == [True]
            disk.check()

    asyncio.run(scenario())


def test_capacity_of_nothing_of_less_than_a_block_and_of_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        for capacity, word in ((0, "not asked for"), (100, "hold no block"), (FILE_BYTES - 1, "hold no block")):
            async with Tier(tmp_path / str(capacity), capacity=capacity) as disk:
                assert disk.state == "off"
                assert word in disk.reason
                if capacity >= 8192:
                    await disk.until(lambda disk=disk: (disk.directory / LAYOUT.name).exists())
                assert isinstance(disk.offer(1), str)
                assert not disk.has(1)
                assert disk.tier.clear() == 0
        async with Tier(tmp_path / "one", capacity=FILE_BYTES) as disk:
            await disk.ready()
            for number in range(1, 6):
                assert await disk.write(number) == [True]
                assert disk.held() == {number}
                assert await disk.right(number) == [True]
                disk.check()
            disk.pin(5)
            assert await disk.write(6) == [False]
            assert disk.tier.figures().dropped == {"capacity": 1}
            assert await disk.right(5) == [True]
            disk.unpin(5)
            assert await disk.write(6) == [True]

    asyncio.run(scenario())


def test_a_smaller_capacity_than_what_is_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await (await disk.ready()).write(*range(10))
        async with Tier(tmp_path / "kv", blocks=3) as disk:
            await disk.until(lambda: len(disk.files()) == 3)
            await disk.ready()
            assert len(disk.held()) == 3
            disk.check()

    asyncio.run(scenario())


def test_what_is_there_is_not_written_again_and_a_higher_priority_is_taken(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            await disk.write(1, priority=20)
            written = disk.files()[1].stat().st_ino
            assert await disk.write(1, priority=70) == [True]
            assert await disk.write(1, priority=10) == [True]
            assert disk.tier.priority_of(LAYOUT.name, digest_of(1)) == 70
            assert disk.tier.figures().in_blocks == 1
            both = disk.offer(2), disk.offer(2)
            assert both[1] == "busy"
            assert not isinstance(both[0], str)
            assert await both[0]
            assert disk.files()[1].stat().st_ino == written

    asyncio.run(scenario())


def test_the_queue_is_bounded_and_flushed_at_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = Tier(tmp_path / "kv", blocks=64, write_queue_blocks=40)
        async with disk:
            assert disk.offer(0) == "suspended"  # nothing is known of the disk yet
            await disk.ready()
            offered = [disk.offer(number) for number in range(60)]
            assert offered[-1] == "queue_full"
            taken = [number for number, each in enumerate(offered) if not isinstance(each, str)]
        assert len(taken) >= 40
        assert set(disk.files()) == set(taken)
        assert disk.offer(61) == "closing"
        assert disk.tier.figures().dropped["queue_full"] == 60 - len(taken)

    asyncio.run(scenario())


def test_what_is_not_flushed_in_time_is_dropped_and_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", blocks=600) as disk:
            await disk.ready()
            offered = [disk.offer(number) for number in range(500)]
            await disk.tier.close(0.0)
            written = [await each for each in offered if not isinstance(each, str)]
            assert written.count(False) > 0
            assert set(disk.files()) == {number for number, each in enumerate(written) if each}
            assert disk.temporaries() == []

    asyncio.run(scenario())


def test_clear_forgets_all_that_is_not_pinned_even_while_it_is_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", blocks=400) as disk:
            await disk.ready()
            await disk.write(*range(300))
            disk.pin(7)
            reads = [asyncio.ensure_future(disk.right(*range(start, start + 50))) for start in range(0, 300, 50)]
            await asyncio.sleep(0)
            disk.tier.clear()
            assert disk.has(7)
            late = asyncio.ensure_future(disk.right(7, 299))
            assert [good for read in reads for good in await read] == [True] * 300  # they were pinned by it
            assert (await late)[0]
            assert disk.tier.clear() >= 0
            await disk.until(lambda: set(disk.files()) == {7} == disk.held())
            await disk.until(lambda: disk.tier.figures().used_bytes == FILE_BYTES)
            assert await disk.right(7, 8) == [True, False]
            disk.unpin(7)
            assert disk.tier.clear() == 1
            assert await disk.write(8, 7) == [True, True]
            await disk.until(lambda: disk.tier.figures().used_bytes == 2 * FILE_BYTES)
            disk.check()
            names = {path.name for path in disk.directory.iterdir()}
            await disk.until(lambda: {p.name for p in disk.directory.iterdir()} == {"lock", "tmp", LAYOUT.name})
            assert LAYOUT.name in names

    asyncio.run(scenario())


def test_foreign_truncated_and_left_over_files(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await (await disk.ready()).write(1, 2, 3)
        files = disk.files()
        shelf = files[1].parent
        os.truncate(files[1], FILE_BYTES - 1)
        os.truncate(files[2], 0)
        foreign = [
            disk.directory / "README",
            disk.directory / ("f" * 32) / "00" / files[3].name,  # a layout that says nothing of itself
            shelf / "notes.txt",
            shelf / f"{'0' * 32}.101.kv",
            shelf / f"{'0' * 32}.07.kv",
            shelf / f"{'F' * 32}.u.kv",
            shelf / f"{'f' * 32}.u.kv",  # not its shelf
        ]
        for path in foreign:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(FILE_BYTES))
        (shelf / f"{'0' * 31}8.u.kv").symlink_to(files[3])
        (shelf / f"{'0' * 31}9.u.kv").mkdir()
        left = disk.directory / "tmp" / "half"
        left.write_bytes(b"half")
        (disk.directory / "tmp" / "deep").mkdir()
        (disk.directory / "tmp" / "deep" / "deeper").write_bytes(b"")
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            assert disk.held() == {3}
            assert await disk.right(1, 2, 3) == [False, False, True]
            assert disk.temporaries() == []
            assert all(path.exists() for path in foreign)
            assert not files[1].exists()
            assert not files[2].exists()
            assert disk.tier.figures().failed == 2
            assert disk.tier.figures().used_bytes == FILE_BYTES

    asyncio.run(scenario())


def test_a_file_that_somebody_deletes_or_damages_is_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", blocks=64) as disk:
            await disk.ready()
            await disk.write(*range(40))
            disk.files()[3].unlink()
            with disk.files()[5].open("r+b") as file:
                file.seek(4096 + 100)
                file.write(b"\xff")
            with disk.files()[6].open("ab") as file:
                file.write(b"more")
            good = await disk.right(*range(40))
            assert [number for number in range(40) if not good[number]] == [3, 5, 6]
            await disk.until(lambda: set(disk.files()) == disk.held())
            assert disk.state == "on"
            assert disk.tier.figures().failed == 3
            assert sum("dropped" in text for _, text in disk.notes) == 1  # the others are told of later
            assert await disk.write(3, 5, 6) == [True] * 3
            assert await disk.right(*range(40)) == [True] * 40
            disk.check()

    asyncio.run(scenario())


def test_wrong_use_is_an_error_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            with pytest.raises(ValueError, match="no block of 5000"):
                disk.tier.write(LAYOUT.name, Block(digest_of(1)), memory()[:4999], lambda _: None)
            with pytest.raises(ValueError, match="no room"):
                disk.tier.read(LAYOUT.name, [(digest_of(1), memory()[:4999])], lambda _: None)

    asyncio.run(scenario())


class Model:
    """What the tier must hold, in the plainest words: blocks with their priority, the least recently used first."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.blocks: dict[int, int | None] = {}
        self.pins: dict[int, int] = {}

    def counts(self, number: int) -> int:
        priority = self.blocks[number]
        return UNSET_PRIORITY_COUNTS_AS if priority is None else priority

    def use(self, number: int) -> None:
        if number in self.blocks:
            self.blocks[number] = self.blocks.pop(number)

    def raise_priority(self, number: int, priority: int | None) -> None:
        if number in self.blocks:
            level = UNSET_PRIORITY_COUNTS_AS if priority is None else priority
            if level > self.counts(number):
                self.blocks[number] = priority
                self.use(number)

    def write(self, number: int, priority: int | None) -> bool:
        if number in self.blocks:
            self.raise_priority(number, priority)
            self.use(number)
            return True
        while len(self.blocks) >= self.room:
            free = [each for each in self.blocks if each not in self.pins]
            if not free:
                return False
            del self.blocks[min(free, key=self.counts)]
        self.blocks[number] = priority
        return True

    def unpin(self, number: int) -> None:
        self.pins[number] -= 1
        if not self.pins[number]:
            del self.pins[number]
            self.use(number)


@pytest.mark.slow
def test_ten_thousand_random_operations_against_a_naive_model(tmp_path: Path) -> None:
    chance = random.Random(5)

    async def scenario() -> None:
        model = Model(12)
        async with Tier(tmp_path / "kv", blocks=12, pace=FORGETFUL) as disk:
            await disk.ready()
            for turn in range(10_000):
                number = chance.randrange(30)
                priority = chance.choice([None, None, 0, 34, 35, 36, 100])
                match chance.randrange(10):
                    case 0 | 1 | 2 | 3:
                        assert await disk.write(number, priority=priority) == [model.write(number, priority)]
                    case 4 | 5:
                        assert await disk.right(number) == [number in model.blocks]
                        if number not in model.pins:
                            model.use(number)
                    case 6:
                        disk.touch(number)
                        if number not in model.pins:
                            model.use(number)
                    case 7:
                        disk.raise_priority(number, priority)
                        model.raise_priority(number, priority)
                    case 8 if len(model.pins) < 13:
                        disk.pin(number)
                        model.pins[number] = model.pins.get(number, 0) + 1
                    case _:
                        if model.pins:
                            number = chance.choice(list(model.pins))
                            disk.unpin(number)
                            model.unpin(number)
                if chance.random() < 0.002:
                    gone = len(model.blocks.keys() - model.pins.keys())
                    assert disk.tier.clear() == gone
                    for each in model.blocks.keys() - model.pins.keys():
                        del model.blocks[each]
                    await disk.until(lambda: disk.tier.figures().used_bytes == len(model.blocks) * FILE_BYTES)
                assert disk.held() == model.blocks.keys(), turn
                if turn % 100 == 0:
                    for each, wanted in model.blocks.items():
                        assert disk.tier.priority_of(LAYOUT.name, digest_of(each)) == wanted
                    disk.check()

    asyncio.run(scenario())
