"""A layout that sleeps on disk: a directory of shards and a manifest, whole or not there.

    <root>/<directory_of(layout)>/        0700
        dynbox-snapshot                   the mark by which it is known as ours
        shard-00000.bin …                 all allocations end to end, cut every SHARD_BYTES
        manifest.json                     what it is of, size and checksum of each shard; carries its own checksum

A save writes into a sibling, makes it durable, drops it from the page cache, reads it back from the disk, and only then
gives it the name. So a kill leaves the old snapshot, the new one, or none under the name, and what lies beside it is
recognised (`snapshot_directories.clean`). Names of files are derived and never read from a manifest. A root belongs to
one service at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import crc32c
import msgspec

from dynamo_box.gms.copying import Make, MoveFailed, destinations, never
from dynamo_box.gms.snapshot_bytes import ShardFile, Stream, pump, write_fully
from dynamo_box.gms.snapshot_directories import (
    MANIFEST,
    SnapshotDamaged,
    check_replaceable,
    new_file,
    opened,
    regular_file,
    replace,
    temporary_sibling,
)
from dynamo_box.gms.snapshot_manifest import Shard, encode, read_manifest
from dynamo_box.protocol.gms import EpochRecord
from dynamo_box.wording import size

SHARD_BYTES = 1 << 30

_SPARE_BYTES = 1 << 20
"""For directories and whatever else a file system wants beside the bytes."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(MoveFailed):
    pass


@dataclass(frozen=True)
class Saved:
    """`bytes` on disk; `phases` are seconds, in order: write (until durable), verify."""

    bytes: int
    phases: dict[str, float]


def save(
    directory: Path,
    record: EpochRecord,
    descriptors: Sequence[int],
    *,
    shard_bytes: int = SHARD_BYTES,
    stop: Callable[[], bool] = never,
) -> Saved:
    """Write a snapshot of `record` to `directory` (from `directory_of`), replacing what is there, and read it back: on
    return it is on the disk, and whole. `descriptors` are those of `record.allocations`. Missing parents are made.

    Raises:
        DiskFull, MoveStopped, MoveFailed: no temporary file is left, and a snapshot that was there is still there.
    """
    began = time.monotonic()
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_replaceable(directory)
        _check_space(directory, record)
        with temporary_sibling(directory) as (temporary, folder):
            written = _write(folder, record, descriptors, shard_bytes, stop)
            durable = time.monotonic()
            _read_all(folder, temporary, record, stop)
            verified = time.monotonic()
            replace(temporary, directory)
    except OSError as error:
        raise _not_saved(directory, error) from error
    return Saved(written, {"write": durable - began, "verify": verified - durable})


def verify(directory: Path, record: EpochRecord, *, stop: Callable[[], bool] = never) -> int:
    """Read all of it and compare; bytes of the snapshot on disk. `record.epoch` may differ: the content counts.

    Raises:
        SnapshotDamaged: it is not there, not whole, or of something else.
        MoveStopped: it can't be said.
    """
    with opened(directory) as folder:
        return _read_all(folder, directory, record, stop)


def load(directory: Path, record: EpochRecord, make: Make, *, stop: Callable[[], bool] = never) -> list[int]:
    """New memory files, made by `make`, in the order of `record.allocations`, filled and verified.

    Manifest, names and sizes are checked before anything is made; nothing is returned unless every checksum is right.

    Raises:
        SnapshotDamaged, OutOfMemory, MoveStopped, MoveFailed: every descriptor made is closed.
    """
    stream = Stream(record)
    with opened(directory) as folder, ExitStack() as files:
        body, _ = read_manifest(folder, directory, record)
        shards = [
            files.enter_context(_shard_file(folder, directory, number, shard.size))
            for number, shard in enumerate(body.shards)
        ]
        with destinations(stream.sizes, make) as made:
            start = 0
            for number, (file, shard) in enumerate(zip(shards, body.shards, strict=True)):

                def fill(view: memoryview, offset: int, start: int = start) -> None:
                    stream.write(made, view, start + offset)

                _read_shard(file, directory / _shard_name(number), shard, fill, stop)
                start += shard.size
            return made


def _write(
    folder: int, record: EpochRecord, descriptors: Sequence[int], shard_bytes: int, stop: Callable[[], bool]
) -> int:
    """Fill a temporary directory and make it durable; bytes written."""
    stream = Stream(record)
    shards: list[Shard] = []
    for number, start in enumerate(range(0, stream.bytes, shard_bytes)):
        size, checksum = min(shard_bytes, stream.bytes - start), 0

        with new_file(folder, _shard_name(number)) as file:

            def read(view: memoryview, offset: int, start: int = start) -> None:
                stream.read(descriptors, view, start + offset)

            def append(view: memoryview, _: int, file: int = file) -> None:
                nonlocal checksum
                checksum = crc32c.crc32c(view, checksum)
                write_fully(file, view)

            pump(size, read, append, stop)
        shards.append(Shard(size, checksum))
    sealed = encode(record, tuple(shards))
    with new_file(folder, MANIFEST) as file:
        write_fully(file, memoryview(sealed))
    os.fsync(folder)
    return stream.bytes + len(sealed)


def _read_all(folder: int, path: Path, record: EpochRecord, stop: Callable[[], bool]) -> int:
    """Verify a snapshot; its bytes on disk. `path` is for words."""
    body, manifest_bytes = read_manifest(folder, path, record)
    with ExitStack() as files:
        shards = [
            files.enter_context(_shard_file(folder, path, number, shard.size))
            for number, shard in enumerate(body.shards)
        ]
        for number, (file, shard) in enumerate(zip(shards, body.shards, strict=True)):
            _read_shard(file, path / _shard_name(number), shard, lambda *_: None, stop)
    return manifest_bytes + sum(shard.size for shard in body.shards)


def _read_shard(
    file: ShardFile, path: Path, shard: Shard, use: Callable[[memoryview, int], None], stop: Callable[[], bool]
) -> None:
    """Give all bytes to `use`, and refuse them at the end unless their checksum is right."""
    checksum = 0

    def read(view: memoryview, offset: int) -> None:
        try:
            count = file.read(view, offset)
        except OSError as error:
            raise SnapshotDamaged(path, f"can't be read: {error}") from error
        if count < len(view):
            raise SnapshotDamaged(path, f"ends after {offset + count} of {shard.size} bytes")

    def consume(view: memoryview, offset: int) -> None:
        nonlocal checksum
        checksum = crc32c.crc32c(view, checksum)
        use(view, offset)

    pump(shard.size, read, consume, stop)
    if checksum != shard.crc32c:
        raise SnapshotDamaged(path, f"its checksum is {checksum:08x}, not {shard.crc32c:08x}")


@contextmanager
def _shard_file(folder: int, directory: Path, number: int, expected: int) -> Iterator[ShardFile]:
    with regular_file(folder, directory, _shard_name(number)) as (descriptor, size):
        if size != expected:
            raise SnapshotDamaged(directory / _shard_name(number), f"has {size} bytes, not {expected}")
        with contextlib.closing(ShardFile(descriptor)) as file:
            yield file


def _shard_name(number: int) -> str:
    return f"shard-{number:05}.bin"


def _check_space(directory: Path, record: EpochRecord) -> None:
    needed = Stream(record).bytes + len(msgspec.json.encode(record)) + _SPARE_BYTES
    space = os.statvfs(directory.parent)
    free = space.f_bavail * space.f_frsize
    if free < needed:
        raise DiskFull(f"{directory.parent} has {size(free)} free, and the snapshot takes {size(needed)}")


def _not_saved(directory: Path, error: OSError) -> MoveFailed:
    kind = DiskFull if error.errno in _FULL else MoveFailed
    return kind(f"snapshot {directory} can't be written: {error}")
