"""A layout that sleeps on disk: a directory of shards and a manifest, whole or not there.

    <root>/<directory_of(layout)>/        0700
        dynbox-snapshot                   the mark by which it is known as ours
        shard-00000.bin …                 all allocations end to end, cut every SHARD_BYTES
        manifest.json                     what it is of, size and checksum of each shard; carries its own checksum

A save writes into a sibling `….saving-<token>`, makes it durable, drops it from the page cache, reads it back from the
disk, and only then gives it the name; a snapshot that had the name is `….old-<token>` for the moment between the two
renames. A kill therefore leaves the old snapshot, the new one, or none under the name, and what lies beside it is
recognised (`clean`). A save holds a lock on its directory, so that what a living process writes is left alone.

Names of files are derived and never read from a manifest; links, other users' files and anything but regular files are
refused. A root belongs to one service at a time.

Shards are read past the page cache (O_DIRECT) by a second thread, one buffer ahead of what is summed (7 GiB/s a core)
and copied into memory files. It takes buffers in large pages: into those a virtual disk gave 512 MiB in 0.17 s, into
small ones in 0.25 to 1.5 s, and through the page cache in 0.3 to 0.4 s. A file system without O_DIRECT is read through
the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import crc32c
import msgspec

from dynamo_box.gms.copying import Make, MoveFailed, OutOfMemory, check_stop, destinations, never
from dynamo_box.protocol.gms import Allocation, Entry, EpochRecord

SHARD_BYTES = 1 << 30
VERSION = 1

_MARK = "dynbox-snapshot"
_MARK_TEXT = b"Weights of a sleeping model. `dynbox` made this directory and deletes it when it is not needed.\n"
_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 256 << 20
_PIECE_BYTES = 8 << 20
_BLOCK_BYTES = 4096
"""What O_DIRECT wants offsets, lengths and addresses to be multiples of, at most."""
_SPARE_BYTES = 1 << 20
"""For directories and whatever else a file system wants beside the bytes."""
_OURS = re.compile(r"[A-Za-z0-9_-]{0,40}-[0-9a-f]{16}(?:\.(?:saving|old)-[0-9a-f]{16})?")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(MoveFailed):
    pass


class SnapshotDamaged(MoveFailed):
    """`path` must not be used: `what` is wrong with it."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what


@dataclass(frozen=True)
class Saved:
    """`bytes` on disk; `phases` are seconds, in order: write (until durable), verify."""

    bytes: int
    phases: dict[str, float]


class _Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    crc32c: int


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    layout: str
    content: str
    layout_hash: str
    epoch: int
    allocations: tuple[Allocation, ...]
    entries: tuple[Entry, ...]
    shards: tuple[_Shard, ...]


class _Versioned(msgspec.Struct, frozen=True):
    """What every version of a body has."""

    version: int


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: `checksum` is of the bytes of `body`, as they are written."""

    checksum: str
    body: msgspec.Raw


def directory_of(root: Path, layout: str) -> Path:
    """Where the snapshot of a layout is. Any name of a layout makes a safe and different name of a directory."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", layout)[:40]
    return root / f"{readable}-{blake2b(layout.encode(), digest_size=8).hexdigest()}"


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
        _check_replaceable(directory)
        _check_space(directory, record)
        with _temporary(directory) as (temporary, folder):
            written = _write(folder, record, descriptors, shard_bytes, stop)
            durable = time.monotonic()
            _read_all(folder, temporary, record, stop)
            verified = time.monotonic()
            _replace(temporary, directory)
    except OSError as error:
        raise _not_saved(directory, error) from error
    return Saved(written, {"write": durable - began, "verify": verified - durable})


def verify(directory: Path, record: EpochRecord, *, stop: Callable[[], bool] = never) -> int:
    """Read all of it and compare; bytes of the snapshot on disk. `record.epoch` may differ: the content counts.

    Raises:
        SnapshotDamaged: it is not there, not whole, or of something else.
        MoveStopped: it can't be said.
    """
    with _opened(directory) as folder:
        return _read_all(folder, directory, record, stop)


def load(directory: Path, record: EpochRecord, make: Make, *, stop: Callable[[], bool] = never) -> list[int]:
    """New memory files, made by `make`, in the order of `record.allocations`, filled and verified.

    Manifest, names and sizes are checked before anything is made; nothing is returned unless every checksum is right.

    Raises:
        SnapshotDamaged, OutOfMemory, MoveStopped, MoveFailed: every descriptor made is closed.
    """
    stream = _Stream(record)
    with _opened(directory) as folder, ExitStack() as files:
        body, _ = _read_manifest(folder, directory, record)
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


def clean(root: Path, wanted_layouts: Collection[str]) -> list[Path]:
    """Delete what of ours lies in `root` and nobody will load: snapshots of layouts that aren't wanted, and what a
    save that died has left. Files and directories that aren't ours stay, and so does what a living process is saving.

    Raises:
        MoveFailed: something can't be deleted.
    """
    wanted = {directory_of(root, layout).name for layout in wanted_layouts}
    removed: list[Path] = []
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return removed
    except OSError as error:
        raise MoveFailed(f"snapshots in {root} can't be listed: {error}") from error
    for name in names:
        path = root / name
        if name in wanted or not _OURS.fullmatch(name) or not _is_ours(path):
            continue
        try:
            with _directory(path) as folder:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(path)
        except BlockingIOError:
            continue
        except OSError as error:
            raise MoveFailed(f"snapshot {path} can't be removed: {error}") from error
        removed.append(path)
    return removed


class _Stream:
    """All allocations of a record end to end: what the shards cut into pieces."""

    def __init__(self, record: EpochRecord) -> None:
        self.sizes = [allocation.size for allocation in record.allocations]
        self._ends = list(accumulate(self.sizes))

    @property
    def bytes(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, descriptors: Sequence[int], view: memoryview, offset: int) -> None:
        done = 0
        for number, at, count in self._parts(offset, len(view)):
            if _read_fully(descriptors[number], view[done : done + count], at) < count:
                raise MoveFailed(f"allocation {number} has less than its {self.sizes[number]} bytes")
            done += count

    def write(self, descriptors: Sequence[int], view: memoryview, offset: int) -> None:
        done = 0
        for number, at, count in self._parts(offset, len(view)):
            end = done + count
            while done < end:
                written = os.pwrite(descriptors[number], view[done:end], at)
                done += written
                at += written

    def _parts(self, start: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(number of the allocation, offset in it, bytes)."""
        number, end = bisect_right(self._ends, start), start + size
        while start < end:
            count = min(self._ends[number], end) - start
            yield number, start - (self._ends[number] - self.sizes[number]), count
            start += count
            number += 1


def _pump(
    size: int,
    read: Callable[[memoryview, int], None],
    consume: Callable[[memoryview, int], None],
    stop: Callable[[], bool],
) -> None:
    """`consume` piece after piece of `size` bytes (a view, its offset), while a second thread reads the next one."""
    buffers = [_buffer(min(size, _PIECE_BYTES)) for _ in range(2 if size else 0)]
    with ThreadPoolExecutor(1, "snapshot reader") as reader:
        before: tuple[memoryview, int, Future[None]] | None = None
        for turn, offset in enumerate(range(0, size, _PIECE_BYTES)):
            check_stop(stop)
            view = buffers[turn % 2][: size - offset]
            if before is not None:
                before[2].result()
            pending = reader.submit(read, view, offset)
            if before is not None:
                consume(*before[:2])
            before = view, offset, pending
        if before is not None:
            before[2].result()
            consume(*before[:2])


def _buffer(size: int) -> memoryview:
    """In large pages where there are any, and aligned for O_DIRECT."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _write(
    folder: int, record: EpochRecord, descriptors: Sequence[int], shard_bytes: int, stop: Callable[[], bool]
) -> int:
    """Fill a temporary directory and make it durable; bytes written."""
    stream = _Stream(record)
    shards: list[_Shard] = []
    for number, start in enumerate(range(0, stream.bytes, shard_bytes)):
        size, checksum = min(shard_bytes, stream.bytes - start), 0

        with _new_file(folder, _shard_name(number)) as file:

            def read(view: memoryview, offset: int, start: int = start) -> None:
                stream.read(descriptors, view, start + offset)

            def append(view: memoryview, _: int, file: int = file) -> None:
                nonlocal checksum
                checksum = crc32c.crc32c(view, checksum)
                _write_fully(file, view)

            _pump(size, read, append, stop)
        shards.append(_Shard(size, checksum))
    body = msgspec.json.encode(
        _Body(
            VERSION,
            record.layout,
            record.content,
            record.layout_hash,
            record.epoch,
            record.allocations,
            record.entries,
            tuple(shards),
        )
    )
    sealed = msgspec.json.encode(_Sealed(_checksum(body), msgspec.Raw(body)))
    with _new_file(folder, _MANIFEST) as file:
        _write_fully(file, memoryview(sealed))
    os.fsync(folder)
    return stream.bytes + len(sealed)


def _read_all(folder: int, path: Path, record: EpochRecord, stop: Callable[[], bool]) -> int:
    """Verify a snapshot; its bytes on disk. `path` is for words."""
    body, manifest_bytes = _read_manifest(folder, path, record)
    with ExitStack() as files:
        shards = [
            files.enter_context(_shard_file(folder, path, number, shard.size))
            for number, shard in enumerate(body.shards)
        ]
        for number, (file, shard) in enumerate(zip(shards, body.shards, strict=True)):
            _read_shard(file, path / _shard_name(number), shard, lambda *_: None, stop)
    return manifest_bytes + sum(shard.size for shard in body.shards)


class _ShardFile:
    """Reads past the page cache where the file system can."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        try:
            self._direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            self._direct = -1
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, view: memoryview, offset: int) -> int:
        """Bytes read: fewer than asked only at the end of the file."""
        if self._direct >= 0 and (offset | len(view)) % _BLOCK_BYTES == 0:
            try:
                return _read_fully(self._direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # blocks, or pieces, that don't fit its alignment
                    raise
        return _read_fully(self._descriptor, view, offset)

    def close(self) -> None:
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._direct >= 0:
            os.close(self._direct)


def _read_shard(
    file: _ShardFile, path: Path, shard: _Shard, use: Callable[[memoryview, int], None], stop: Callable[[], bool]
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

    _pump(shard.size, read, consume, stop)
    if checksum != shard.crc32c:
        raise SnapshotDamaged(path, f"its checksum is {checksum:08x}, not {shard.crc32c:08x}")


def _read_manifest(folder: int, directory: Path, record: EpochRecord) -> tuple[_Body, int]:
    """What `directory` says it holds, if that is `record` and adds up; and the size of the manifest itself."""
    path = directory / _MANIFEST
    with _regular_file(folder, directory, _MANIFEST) as (descriptor, size):
        if size > _MAX_MANIFEST_BYTES:
            raise SnapshotDamaged(path, f"{size} bytes are no manifest")
        content = bytearray(size)
        try:
            _read_fully(descriptor, memoryview(content), 0)
        except OSError as error:
            raise SnapshotDamaged(path, f"can't be read: {error}") from error
    try:
        sealed = msgspec.json.decode(content, type=_Sealed)
        if sealed.checksum != _checksum(sealed.body):
            raise SnapshotDamaged(path, "its checksum is wrong")
        version = msgspec.json.decode(sealed.body, type=_Versioned).version
        if version != VERSION:
            raise SnapshotDamaged(path, f"version {version}, and this is a reader of version {VERSION}")
        body = msgspec.json.decode(sealed.body, type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotDamaged(path, f"is no manifest: {error}") from error
    for what in ("layout", "content", "layout_hash", "allocations", "entries"):
        found, expected = getattr(body, what), getattr(record, what)
        if found != expected:
            words = f": {found!r}, not {expected!r}" if isinstance(found, str) else ""
            raise SnapshotDamaged(path, f"is of another {what.replace('_', ' ')}{words}")
    if sum(shard.size for shard in body.shards) != _Stream(record).bytes:
        raise SnapshotDamaged(path, "its shards don't add up to the layout")
    return body, size


def _checksum(body: bytes | msgspec.Raw) -> str:
    return blake2b(bytes(body), digest_size=16).hexdigest()


def _shard_name(number: int) -> str:
    return f"shard-{number:05}.bin"


@contextmanager
def _shard_file(folder: int, directory: Path, number: int, expected: int) -> Iterator[_ShardFile]:
    with _regular_file(folder, directory, _shard_name(number)) as (descriptor, size):
        if size != expected:
            raise SnapshotDamaged(directory / _shard_name(number), f"has {size} bytes, not {expected}")
        with contextlib.closing(_ShardFile(descriptor)) as file:
            yield file


@contextmanager
def _regular_file(folder: int, directory: Path, name: str) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a file of this user, no link, opened without waiting for anybody."""
    path = directory / name
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise SnapshotDamaged(path, "is missing") from error
    except OSError as error:
        raise _not_opened(path, error) from error
    with _closing(descriptor):
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise SnapshotDamaged(path, "is not a file of this user")
        yield descriptor, info.st_size


def _not_opened(path: Path, error: OSError) -> MoveFailed:
    """What this process or the machine lacks says nothing against the snapshot: it can be had later."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return OutOfMemory(f"snapshot {path} can't be opened now: {error}")
    return SnapshotDamaged(path, f"can't be opened: {error}")


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """Descriptor of a snapshot that only this user can have written."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(_directory(directory))
        except FileNotFoundError as error:
            raise SnapshotDamaged(directory, "is missing") from error
        except OSError as error:
            raise _not_opened(directory, error) from error
        info = os.fstat(folder)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise SnapshotDamaged(directory, "is not this user's alone to write")
        yield folder


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    with _closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as folder:
        yield folder


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(directory: Path) -> Iterator[tuple[Path, int]]:
    """A marked and locked sibling of `directory`, deleted unless it has been renamed when the block ends."""
    path = directory.with_name(f"{directory.name}.saving-{secrets.token_hex(8)}")
    os.mkdir(path, 0o700)
    try:
        with _directory(path) as folder:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with _new_file(folder, _MARK) as file:
                _write_fully(file, memoryview(_MARK_TEXT))
            yield path, folder
    finally:
        if path.exists():
            _delete(path)


def _replace(temporary: Path, directory: Path) -> None:
    old = directory.with_name(f"{directory.name}.old-{secrets.token_hex(8)}")
    replaces = directory.exists()
    if replaces:
        os.rename(directory, old)
    try:
        os.rename(temporary, directory)
        with _directory(directory.parent) as root:
            os.fsync(root)
    except OSError:
        if not temporary.exists():
            os.rename(directory, temporary)
        if replaces:
            os.rename(old, directory)
        raise
    if replaces:
        _delete(old)


@contextmanager
def _new_file(folder: int, name: str) -> Iterator[int]:
    """A file of 0600 that is durable, and out of the page cache, when the block ends well."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _closing(os.open(name, flags, 0o600, dir_fd=folder)) as descriptor:
        yield descriptor
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_fully(descriptor: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])


def _read_fully(descriptor: int, view: memoryview, offset: int) -> int:
    """Bytes read: fewer than asked only at the end of the file."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _is_ours(path: Path) -> bool:
    """A directory of this user that carries the mark; an empty one is what a kill leaves just before or after it."""
    try:
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return False
        names = os.listdir(path)
    except FileNotFoundError:
        return False
    return not names or _MARK in names


def _check_replaceable(directory: Path) -> None:
    if os.path.lexists(directory) and not _is_ours(directory):
        raise MoveFailed(f"{directory} is no snapshot of ours, and stays")


def _delete(directory: Path) -> None:
    """Manifest first, so that what a kill leaves is no snapshot; the mark last, so that it is known as ours."""
    with _directory(directory) as folder:
        names = os.listdir(folder)
        rank = {_MANIFEST: 0, _MARK: 2}
        for name in sorted(names, key=lambda name: (rank.get(name, 1), name)):
            os.unlink(name, dir_fd=folder)
    os.rmdir(directory)


def _check_space(directory: Path, record: EpochRecord) -> None:
    needed = _Stream(record).bytes + len(msgspec.json.encode(record)) + _SPARE_BYTES
    space = os.statvfs(directory.parent)
    free = space.f_bavail * space.f_frsize
    if free < needed:
        raise DiskFull(f"{directory.parent} has {free} bytes free, and the snapshot takes {needed}")


def _not_saved(directory: Path, error: OSError) -> MoveFailed:
    kind = DiskFull if error.errno in _FULL else MoveFailed
    return kind(f"snapshot {directory} can't be written: {error}")
