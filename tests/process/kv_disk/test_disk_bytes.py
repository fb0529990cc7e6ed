"""A file of the disk tier gives the bytes that were written, or none: whatever is done to any part of it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from pathlib import Path

import pytest
from disk_tiers import FILE_BYTES, LAYOUT, Tier, content_of, digest_of, memory

from dynamo_box.kv.store.disk_directory import TierDirectory, take
from dynamo_box.kv.store.disk_files import PAGE, BlockId, Damaged, file_path, parse_name, read_block, write_block

BLOCK = BlockId(LAYOUT.name, digest_of(7), LAYOUT.block_bytes, parent=digest_of(6))
PATH = file_path(LAYOUT.name, BLOCK.digest, 50)

REGIONS = {
    "magic": range(8),
    "version": range(8, 12),
    "payload bytes": range(12, 20),
    "layout": range(20, 52),
    "digest": range(52, 68),
    "parent": range(68, 84),
    "checksum of the payload": range(84, 88),
    "rest of the header": (88, 1000, 4091),
    "checksum of the header": range(4092, 4096),
    "payload": (*range(4096, 4096 + 64), *range(4096, 4096 + 5000, 97), 4096 + 4999),
    "padding": (4096 + 5000, 10_000, FILE_BYTES - 1),
}


@pytest.fixture
def directory(tmp_path: Path) -> TierDirectory:
    held = take(tmp_path / "kv", "test")
    held.prepare(LAYOUT)
    write_block(held.root, BLOCK, 50, memory(content_of(7)), direct=held.direct)
    return held


def read(directory: TierDirectory, block: BlockId = BLOCK, path: str = PATH) -> bytes:
    into = memory()
    read_block(directory.root, block, (path,), into, direct=directory.direct)
    return bytes(into[: LAYOUT.block_bytes])


@pytest.mark.parametrize("region", REGIONS)
def test_each_bit_of_each_region(directory: TierDirectory, region: str) -> None:
    file = directory.path / PATH
    whole = file.read_bytes()
    assert len(whole) == FILE_BYTES
    assert read(directory) == content_of(7)
    for offset in REGIONS[region]:
        for bit in range(8) if offset < PAGE else (0, 7):
            flipped = bytearray(whole)
            flipped[offset] ^= 1 << bit
            file.write_bytes(flipped)
            with pytest.raises(Damaged):
                read(directory)
    file.write_bytes(whole)
    assert read(directory) == content_of(7)


@pytest.mark.parametrize(
    "length", [0, 1, 100, 4095, 4096, 4097, 4096 + 4999, 4096 + 5000, 8192, FILE_BYTES - 1, FILE_BYTES + 1, 20_000]
)
def test_another_length(directory: TierDirectory, length: int) -> None:
    os.truncate(directory.path / PATH, length)
    with pytest.raises(Damaged, match="bytes"):
        read(directory)


def test_a_whole_file_under_the_name_of_another_block(directory: TierDirectory) -> None:
    other = BlockId(LAYOUT.name, digest_of(8), LAYOUT.block_bytes)
    shutil.copy(directory.path / PATH, directory.path / file_path(LAYOUT.name, other.digest, None))
    with pytest.raises(Damaged, match="another block"):
        read(directory, other, file_path(LAYOUT.name, other.digest, None))


def test_pages_of_two_files_mixed(directory: TierDirectory) -> None:
    write_block(directory.root, BLOCK, 51, memory(content_of(8)), direct=directory.direct)
    first = (directory.path / PATH).read_bytes()
    second = (directory.path / file_path(LAYOUT.name, BLOCK.digest, 51)).read_bytes()
    for pages in ((0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0)):
        mixed = [(first, second)[which][n * PAGE : (n + 1) * PAGE] for n, which in enumerate(pages)]
        if b"".join(mixed) not in (first, second):
            (directory.path / PATH).write_bytes(b"".join(mixed))
            with pytest.raises(Damaged):
                read(directory)


def test_a_link_is_not_followed(directory: TierDirectory) -> None:
    file = directory.path / PATH
    file.rename(directory.path / "elsewhere")
    file.symlink_to(directory.path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        read(directory)


def test_a_file_written_over_keeps_nothing_of_the_old_one(directory: TierDirectory) -> None:
    """Also if it was larger, or has gone."""
    large = directory.path / LAYOUT.name / "victim"
    for victim in (b"x" * 50_000, b"x" * FILE_BYTES, b"x", None):
        if victim is not None:
            large.write_bytes(victim)
        block = BlockId(LAYOUT.name, digest_of(9), LAYOUT.block_bytes)
        write_block(
            directory.root, block, None, memory(content_of(9)), direct=directory.direct, recycle=f"{LAYOUT.name}/victim"
        )
        assert not large.exists()
        assert read(directory, block, file_path(LAYOUT.name, block.digest, None)) == content_of(9)


def test_what_the_slot_held_before_does_not_reach_the_disk(directory: TierDirectory) -> None:
    data = memory(b"\xee" * LAYOUT.slot_bytes)
    data[: LAYOUT.block_bytes] = content_of(9)
    block = BlockId(LAYOUT.name, digest_of(9), LAYOUT.block_bytes)
    write_block(directory.root, block, None, data, direct=directory.direct)
    assert b"\xee" not in (directory.path / file_path(LAYOUT.name, block.digest, None)).read_bytes()[PAGE:]


def test_names() -> None:
    digest = digest_of(0xABC)
    for priority in (None, 0, 7, 100):
        path = file_path(LAYOUT.name, digest, priority)
        assert parse_name(path.rsplit("/", 1)[1]) == (digest, priority)
    stem = digest.hex()
    for name in (f"{stem}.101.kv", f"{stem}.07.kv", f"{stem}.kv", f"{stem.upper()}.u.kv", f" {stem[1:]}.u.kv", "", "x"):
        assert parse_name(name) is None


def test_random_damage_through_the_tier(tmp_path: Path) -> None:
    """Two hundred blocks, every second one damaged somewhere: none is given out with other bytes than were written."""
    chance = random.Random(11)

    async def scenario() -> None:
        async with Tier(tmp_path / "kv", blocks=200) as disk:
            await disk.ready()
            await disk.write(*range(200))
            for number, path in disk.files().items():
                if number % 2:
                    with path.open("r+b") as file:
                        offset = chance.randrange(FILE_BYTES)
                        file.seek(offset)
                        old = file.read(1)[0]
                        file.seek(offset)
                        file.write(bytes([old ^ chance.randrange(1, 256)]))
            assert await disk.right(*range(200)) == [number % 2 == 0 for number in range(200)]
            await disk.until(lambda: set(disk.files()) == set(range(0, 200, 2)))
            assert disk.tier.figures().failed == 100
            assert disk.state == "on"
            disk.check()

    asyncio.run(scenario())
