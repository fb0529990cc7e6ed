"""Layouts asleep on disk: `<root>/<layout's directory>/` with shards of at most 1 GiB and a manifest.

A snapshot is written under a temporary name beside its place, brought to the disk, read back and compared, and only
then renamed into place; so the place holds the old one whole or the new one whole, whatever happens in between. What a
manifest says is held against what is asked for, and against the files' sizes, before any memory is taken. No name is
ever read from a file: all are derived.

The bytes are those of all allocations in order, as one stream cut into shards. Pages of the files are dropped from
the page cache once they are on disk or read, since lowering the use of memory is what this is for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
from crc32c import crc32c

from dynamo_box.gms.copying import Abandoned
from dynamo_box.protocol.gms import Allocation, Entry, EpochRecord

VERSION = 1
SHARD_BYTES = 1024 * 1024 * 1024
PIECE = 4 * 1024 * 1024
"""Bytes at a time: a buffer that stays in the processor's cache between reading, summing and writing."""
SPARE_BYTES = 16 * 1024 * 1024
"""Of the disk, left free beyond the bytes themselves."""
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
MARKER = ".dynbox-snapshot"
"""In every directory that this module makes; only those are ever removed."""

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)\.tmp")


class SnapshotDamaged(Exception):
    """It can't be used. The text names the file and the fault."""


class _Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    crc32c: int


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    layout: str
    content: str
    layout_hash: str
    epoch: int
    allocations: tuple[Allocation, ...]
    entries: tuple[Entry, ...]
    shards: tuple[_Shard, ...]


class _Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`checksum` is crc32c of the manifest's very bytes."""

    checksum: int
    manifest: msgspec.Raw


class _Version(msgspec.Struct, frozen=True):
    version: int


def directory(root: Path, layout: str) -> Path:
    """Where its snapshot is: a name that is safe for any layout, and its own."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", layout)[:60]
    return root / f"{readable}-{blake2b(layout.encode(), digest_size=8).hexdigest()}"


def save(
    root: Path,
    record: EpochRecord,
    descriptors: Sequence[int],
    unwanted: threading.Event,
    *,
    shard_bytes: int = SHARD_BYTES,
    free_bytes: Callable[[Path], int] | None = None,
) -> Path:
    """Write and verify; returns the directory. On any error nothing new is left, and what was there is.

    Raises:
        OSError: the disk is full or fails.
        SnapshotDamaged: what was read back is not what was written.
        Abandoned: `unwanted` was set.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    total = sum(allocation.size for allocation in record.allocations)
    free = (free_bytes or free_on)(root)
    if free < total + SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{total} bytes are to be written and {free} are free", str(root))
    place = directory(root, record.layout)
    temporary = root / f".{place.name}.{os.getpid()}.tmp"
    _remove(temporary)
    try:
        temporary.mkdir(mode=0o700)
        _write_file(temporary / MARKER, b"")
        shards = tuple(
            _write_shard(temporary / _shard_name(index), cut, unwanted)
            for index, cut in enumerate(_cuts(record.allocations, descriptors, shard_bytes))
        )
        manifest = _Manifest(
            VERSION,
            record.layout,
            record.content,
            record.layout_hash,
            record.epoch,
            record.allocations,
            record.entries,
            shards,
        )
        body = msgspec.json.encode(manifest)
        _write_file(temporary / MANIFEST, msgspec.json.encode(_Signed(crc32c(body), msgspec.Raw(body))))
        _sync_directory(temporary)
        verify_at(temporary, record, unwanted)
        _put_in_place(temporary, place)
    except BaseException:
        _remove(temporary)
        raise
    _sync_directory(root)
    return place


def has(root: Path, record: EpochRecord) -> bool:
    """Whether a snapshot of these very bytes seems to be there; `verify` tells whether it is any good."""
    try:
        _check(directory(root, record.layout), record)
    except SnapshotDamaged:
        return False
    return True


def verify(root: Path, record: EpochRecord, unwanted: threading.Event) -> Path:
    """Read it all and compare the checksums.

    Raises:
        SnapshotDamaged: there is none, or it can't be used.
        Abandoned: `unwanted` was set.
    """
    place = directory(root, record.layout)
    verify_at(place, record, unwanted)
    return place


def verify_at(place: Path, record: EpochRecord, unwanted: threading.Event) -> None:
    manifest = _check(place, record)
    buffer = memoryview(bytearray(PIECE))
    for index, shard in enumerate(manifest.shards):
        for _ in _read_shard(place / _shard_name(index), shard, buffer, unwanted):
            pass


def load(root: Path, record: EpochRecord, take: Callable[[], Sequence[int]], unwanted: threading.Event) -> None:
    """Fill the descriptors that `take` makes, one an allocation of its size; they are the caller's also on an error.

    `take` is called only once all that can be told without reading the shards has been found right.

    Raises:
        SnapshotDamaged: it can't be used.
        OSError: no memory.
        Abandoned: `unwanted` was set.
    """
    place = directory(root, record.layout)
    manifest = _check(place, record)
    descriptors = take()
    buffer = memoryview(bytearray(PIECE))
    ends = _Stream(record.allocations, descriptors)
    for index, shard in enumerate(manifest.shards):
        for piece in _read_shard(place / _shard_name(index), shard, buffer, unwanted):
            ends.write(piece)


def remove(root: Path, layout: str) -> None:
    _remove(directory(root, layout))


def clean(root: Path, wanted: Sequence[str] | None) -> list[str]:
    """Remove what dead predecessors left half-written, and snapshots of layouts that are not `wanted` (None: all are).
    Only directories that carry our marker are touched. Returns the names of those removed.
    """
    if not root.is_dir():
        return []
    keep = None if wanted is None else {directory(root, layout).name for layout in wanted}
    removed = []
    for path in sorted(root.iterdir()):
        if path.is_symlink() or not (path / MARKER).is_file():
            continue
        temporary = _TEMPORARY.fullmatch(path.name)
        if temporary is not None:
            unwanted = not _runs(int(temporary["pid"]))
        else:
            unwanted = keep is not None and path.name not in keep
        if unwanted:
            _remove(path)
            removed.append(path.name)
    return removed


def free_on(root: Path) -> int:
    """Bytes that this user may still write there."""
    figures = os.statvfs(root)
    return figures.f_bavail * figures.f_frsize


def _check(place: Path, record: EpochRecord) -> _Manifest:
    """All that can be told without reading the shards.

    Raises:
        SnapshotDamaged
    """
    manifest = _read_manifest(place / MANIFEST)
    said = (manifest.layout, manifest.content, manifest.layout_hash)
    for what, is_, wanted in zip(
        ("layout", "content", "hash"), said, (record.layout, record.content, record.layout_hash), strict=True
    ):
        if is_ != wanted:
            raise SnapshotDamaged(f"{place / MANIFEST}: of another {what} ({is_!r} instead of {wanted!r})")
    if manifest.allocations != record.allocations or manifest.entries != record.entries:
        raise SnapshotDamaged(f"{place / MANIFEST}: its allocations or entries are not those of the layout")
    if sum(shard.size for shard in manifest.shards) != sum(allocation.size for allocation in record.allocations):
        raise SnapshotDamaged(f"{place / MANIFEST}: its shards don't add up to the layout")
    for index, shard in enumerate(manifest.shards):
        path = place / _shard_name(index)
        try:
            size = path.lstat().st_size
        except OSError as error:
            raise SnapshotDamaged(f"{path}: {error.strerror}") from error
        if size != shard.size:
            raise SnapshotDamaged(f"{path}: {size} bytes instead of {shard.size}")
    return manifest


def _read_manifest(path: Path) -> _Manifest:
    try:
        with path.open("rb", opener=_open_plain) as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise SnapshotDamaged(f"{path}: {error.strerror}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise SnapshotDamaged(f"{path}: over {MAX_MANIFEST_BYTES} bytes")
    try:
        signed = msgspec.json.decode(data, type=_Signed)
        if crc32c(bytes(signed.manifest)) != signed.checksum:
            raise SnapshotDamaged(f"{path}: its checksum is wrong")
        version = msgspec.json.decode(signed.manifest, type=_Version).version
        if version != VERSION:
            raise SnapshotDamaged(f"{path}: version {version}, and this is {VERSION}")
        return msgspec.json.decode(signed.manifest, type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotDamaged(f"{path}: {error}") from error


def _read_shard(path: Path, shard: _Shard, buffer: memoryview, unwanted: threading.Event) -> Iterator[memoryview]:
    """Its bytes in pieces, each valid until the next; at the end the checksum is held against the manifest's.

    Raises:
        SnapshotDamaged
        Abandoned
    """
    try:
        descriptor = _open_plain(str(path), os.O_RDONLY)
    except OSError as error:
        raise SnapshotDamaged(f"{path}: {error.strerror}") from error
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        checksum = done = 0
        while done < shard.size:
            if unwanted.is_set():
                raise Abandoned
            # The disk reads on while this piece is summed and written.
            os.posix_fadvise(descriptor, done + PIECE, 2 * PIECE, os.POSIX_FADV_WILLNEED)
            try:
                count = os.preadv(descriptor, [buffer[: min(PIECE, shard.size - done)]], done)
            except OSError as error:
                raise SnapshotDamaged(f"{path}: {error.strerror} after {done} bytes") from error
            if count == 0:
                raise SnapshotDamaged(f"{path}: ends after {done} of {shard.size} bytes")
            piece = buffer[:count]
            checksum = crc32c(piece, checksum)
            yield piece
            done += count
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if checksum != shard.crc32c:
            raise SnapshotDamaged(f"{path}: its checksum is wrong")
    finally:
        os.close(descriptor)


class _Stream:
    """All allocations, in order, as one file to write."""

    def __init__(self, allocations: Sequence[Allocation], descriptors: Sequence[int]) -> None:
        self._left = [(descriptor, one.size) for descriptor, one in zip(descriptors, allocations, strict=True)]
        self._left.reverse()
        self._offset = 0

    def write(self, piece: memoryview) -> None:
        while piece:
            descriptor, size = self._left[-1]
            written = os.pwrite(descriptor, piece[: size - self._offset], self._offset)
            piece = piece[written:]
            self._offset += written
            if self._offset == size:
                self._left.pop()
                self._offset = 0


_Cut = list[tuple[int, int, int]]
"""One shard: (descriptor, offset, bytes), in order."""


def _cuts(allocations: Sequence[Allocation], descriptors: Sequence[int], shard_bytes: int) -> Iterator[_Cut]:
    cut: _Cut = []
    room = shard_bytes
    for allocation, descriptor in zip(allocations, descriptors, strict=True):
        offset = 0
        while offset < allocation.size:
            count = min(room, allocation.size - offset)
            cut.append((descriptor, offset, count))
            offset += count
            room -= count
            if room == 0:
                yield cut
                cut, room = [], shard_bytes
    if cut:
        yield cut


def _write_shard(path: Path, cut: _Cut, unwanted: threading.Event) -> _Shard:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    buffer = memoryview(bytearray(PIECE))
    checksum = size = 0
    try:
        for source, offset, count in cut:
            end = offset + count
            while offset < end:
                if unwanted.is_set():
                    raise Abandoned
                got = os.preadv(source, [buffer[: min(PIECE, end - offset)]], offset)
                if got == 0:
                    raise OSError(errno.EIO, "the memory ends early", str(path))
                piece = buffer[:got]
                checksum = crc32c(piece, checksum)
                _write_all(descriptor, piece)
                offset += got
                size += got
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return _Shard(size, checksum)


def _write_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _put_in_place(temporary: Path, place: Path) -> None:
    """A directory can't be renamed over one that holds files, so the old one steps aside under a temporary name."""
    aside = place.with_name(f".{place.name}.old.{os.getpid()}.tmp")
    _remove(aside)
    there = place.exists()
    if there:
        os.rename(place, aside)
    try:
        os.rename(temporary, place)
    except OSError:
        if there:
            os.rename(aside, place)
        raise
    _remove(aside)


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """The marker goes last, so that what an interruption leaves is still known as ours."""
    with contextlib.suppress(FileNotFoundError):
        for inside in path.iterdir():
            if inside.name != MARKER:
                inside.unlink()
        shutil.rmtree(path)


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _shard_name(index: int) -> str:
    return f"shard-{index:05}.bin"
