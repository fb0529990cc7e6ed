"""Directories of snapshots: known as ours by a mark, this user's alone, and under their name only when they are whole.

A snapshot is written into a sibling `….saving-<token>` and then given its name; one that had the name before is
`….old-<token>` for the moment between the two renames. Whoever writes holds a lock on its directory, so that what a
living process writes is left alone. Links, other users' files and anything but regular files are refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path

from dynamo_box.gms.copying import MoveFailed, OutOfMemory
from dynamo_box.gms.snapshot_bytes import write_fully

MANIFEST = "manifest.json"

_MARK = "dynbox-snapshot"
_MARK_TEXT = b"Weights of a sleeping model. `dynbox` made this directory and deletes it when it is not needed.\n"
_OURS = re.compile(r"[A-Za-z0-9_-]{0,40}-[0-9a-f]{16}(?:\.(?:saving|old)-[0-9a-f]{16})?")


class SnapshotDamaged(MoveFailed):
    """`path` must not be used: `what` is wrong with it."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what


def directory_of(root: Path, layout: str) -> Path:
    """Where the snapshot of a layout is. Any name of a layout makes a safe and different name of a directory."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", layout)[:40]
    return root / f"{readable}-{blake2b(layout.encode(), digest_size=8).hexdigest()}"


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
        if name in wanted or not _OURS.fullmatch(name) or not is_ours(path):
            continue
        try:
            with opened_directory(path) as folder:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                delete(path)
        except BlockingIOError:
            continue
        except OSError as error:
            raise MoveFailed(f"snapshot {path} can't be removed: {error}") from error
        removed.append(path)
    return removed


def is_ours(path: Path) -> bool:
    """A directory of this user that carries the mark; an empty one is what a kill leaves just before or after it."""
    try:
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return False
        names = os.listdir(path)
    except FileNotFoundError:
        return False
    return not names or _MARK in names


def check_replaceable(directory: Path) -> None:
    if os.path.lexists(directory) and not is_ours(directory):
        raise MoveFailed(f"{directory} is no snapshot of ours, and stays")


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Descriptor of a snapshot that only this user can have written."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(opened_directory(directory))
        except FileNotFoundError as error:
            raise SnapshotDamaged(directory, "is missing") from error
        except OSError as error:
            raise _not_opened(directory, error) from error
        info = os.fstat(folder)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise SnapshotDamaged(directory, "is not this user's alone to write")
        yield folder


@contextmanager
def temporary_sibling(directory: Path) -> Iterator[tuple[Path, int]]:
    """A marked and locked sibling of `directory`, deleted unless it has been renamed when the block ends."""
    path = directory.with_name(f"{directory.name}.saving-{secrets.token_hex(8)}")
    os.mkdir(path, 0o700)
    try:
        with opened_directory(path) as folder:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with new_file(folder, _MARK) as file:
                write_fully(file, memoryview(_MARK_TEXT))
            yield path, folder
    finally:
        if path.exists():
            delete(path)


def replace(temporary: Path, directory: Path) -> None:
    old = directory.with_name(f"{directory.name}.old-{secrets.token_hex(8)}")
    replaces = directory.exists()
    if replaces:
        os.rename(directory, old)
    try:
        os.rename(temporary, directory)
        with opened_directory(directory.parent) as root:
            os.fsync(root)
    except OSError:
        if not temporary.exists():
            os.rename(directory, temporary)
        if replaces:
            os.rename(old, directory)
        raise
    if replaces:
        delete(old)


def delete(directory: Path) -> None:
    """Manifest first, so that what a kill leaves is no snapshot; the mark last, so that it is known as ours."""
    with opened_directory(directory) as folder:
        names = os.listdir(folder)
        rank = {MANIFEST: 0, _MARK: 2}
        for name in sorted(names, key=lambda name: (rank.get(name, 1), name)):
            os.unlink(name, dir_fd=folder)
    os.rmdir(directory)


@contextmanager
def opened_directory(path: Path) -> Iterator[int]:
    with _closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as folder:
        yield folder


@contextmanager
def regular_file(folder: int, directory: Path, name: str) -> Iterator[tuple[int, int]]:
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
def new_file(folder: int, name: str) -> Iterator[int]:
    """A file of 0600 that is durable, and out of the page cache, when the block ends well."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _closing(os.open(name, flags, 0o600, dir_fd=folder)) as descriptor:
        yield descriptor
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
