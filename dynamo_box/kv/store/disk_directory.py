"""The directory of the disk tier, held by one box: taking it, proving that it works, and what lies in it.

    <directory>/                 0700, ours
        lock                     locked by the holder for its life; says who that is
        tmp/                     files being written
        <layout name>/           32 hex
            layout.json          the `KvLayout`, whose name is that of the directory
            <2 hex>/…            blocks, see `disk_files.py`
        removed-<token>/         what was cleared and is being deleted

Everything here may block, and belongs into a thread. Paths go through the descriptor of the directory, so that what is
done lands in the one that was checked and locked, or fails. What isn't ours by name and kind is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from dynamo_box.kv.store.disk_files import PAGE, TEMPORARY, file_bytes, file_path, occupied_bytes, parse_name
from dynamo_box.protocol.kv import KvLayout

MAX_LAYOUTS_ON_DISK = 1024
_LOCK = "lock"
_LAYOUT_FILE = "layout.json"
_MOST_TEXT = 4096
_LAYOUT_NAME = re.compile(r"[0-9a-f]{32}")
_REMOVED = re.compile(r"removed-[0-9a-f]{16}")
_SHELF = re.compile(r"[0-9a-f]{2}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Unusable(Exception):
    """The text says why and what to do. `held`: another box has it."""

    def __init__(self, reason: str, *, held: bool = False) -> None:
        super().__init__(reason)
        self.held = held


class Holder(msgspec.Struct, frozen=True):
    """What the lock says of the box that has the directory."""

    owner: str
    pid: int
    host: str


class FoundBlock(NamedTuple):
    """`used_ns` is when it was last used, in Unix time."""

    digest: bytes
    priority: int | None
    occupied: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Scanned:
    """What one directory of blocks has. `damaged` files had the name of a block and not its size, and are deleted;
    `foreign` are left alone.
    """

    blocks: list[FoundBlock]
    damaged: int
    foreign: int


class TierDirectory:
    """One that is taken. `direct`: its file system takes O_DIRECT."""

    def __init__(self, path: Path, root: int, lock: int, direct: bool) -> None:
        self.path = path
        self.root = root
        self.direct = direct
        self._lock = lock

    def check(self) -> None:
        """
        Raises:
            Unusable: the path leads elsewhere by now, or the lock is no longer what others would lock.
        """
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self.root))
            locked = os.path.samestat(os.stat(_LOCK, dir_fd=self.root, follow_symlinks=False), os.fstat(self._lock))
        except FileNotFoundError as error:
            raise Unusable(f"{self.path} has vanished") from error
        if not same:
            raise Unusable(f"{self.path} was replaced")
        if not locked:
            raise Unusable(f"{self.path / _LOCK} was replaced")

    def free_bytes(self) -> tuple[int, int]:
        """(for files of ours, in all) on the file system."""
        found = os.fstatvfs(self.root)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def layouts(self, alive: Callable[[], None]) -> list[KvLayout]:
        """Those that have a directory which says so itself."""
        found: list[KvLayout] = []
        for name in sorted(os.listdir(self.root)):
            alive()
            if _LAYOUT_NAME.fullmatch(name) and (layout := self._layout(name)) is not None:
                found.append(layout)
                if len(found) == MAX_LAYOUTS_ON_DISK:
                    break
        return found

    def removed(self) -> list[str]:
        """What an earlier life cleared and didn't finish to delete."""
        return [name for name in os.listdir(self.root) if _REMOVED.fullmatch(name)]

    def prepare(self, layout: KvLayout) -> list[str]:
        """Make sure that `layout` has its directory; the names of those with its blocks."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(layout.name, 0o700, dir_fd=self.root)
        if self._layout(layout.name) is None:
            temporary = f"{TEMPORARY}/{layout.name}"
            _write_file(self.root, temporary, msgspec.json.encode(layout) + b"\n")
            os.rename(temporary, f"{layout.name}/{_LAYOUT_FILE}", src_dir_fd=self.root, dst_dir_fd=self.root)
        with _opened(self.root, layout.name) as folder:
            return sorted(name for name in os.listdir(folder) if _SHELF.fullmatch(name))

    def scan(self, layout: KvLayout, shelf: str, alive: Callable[[], None]) -> Scanned:
        """What is in one of the directories that `prepare` named, from names and sizes alone."""
        size = file_bytes(layout.block_bytes)
        blocks: list[FoundBlock] = []
        damaged = foreign = 0
        with _opened(self.root, f"{layout.name}/{shelf}") as folder, os.scandir(folder) as entries:
            for entry in entries:
                alive()
                found = entry.stat(follow_symlinks=False)
                named = parse_name(entry.name)
                if named is None or entry.name[:2] != shelf or not stat.S_ISREG(found.st_mode):
                    foreign += 1
                elif found.st_size != size:
                    os.unlink(entry.name, dir_fd=folder)
                    damaged += 1
                else:
                    blocks.append(FoundBlock(*named, occupied_bytes(found), found.st_mtime_ns))
        return Scanned(blocks, damaged, foreign)

    def remove(self, paths: Sequence[str]) -> None:
        """Delete files, those that are there."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path, dir_fd=self.root)

    def set_aside(self, layout: KvLayout, keep: Sequence[tuple[bytes, int | None]]) -> str:
        """Take all blocks of a layout but these out of the way; the name of what can be deleted at leisure. Nobody may
        be at its files meanwhile.
        """
        fresh, aside = f"{TEMPORARY}/{layout.name}.new", f"removed-{secrets.token_hex(8)}"
        _delete_tree(self.root, fresh)
        os.mkdir(fresh, 0o700, dir_fd=self.root)
        _write_file(self.root, f"{fresh}/{_LAYOUT_FILE}", msgspec.json.encode(layout) + b"\n")
        for digest, priority in keep:
            old = file_path(layout.name, digest, priority)
            new = f"{fresh}/{old.removeprefix(f'{layout.name}/')}"
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(new), 0o700, dir_fd=self.root)
            with contextlib.suppress(FileNotFoundError):
                os.rename(old, new, src_dir_fd=self.root, dst_dir_fd=self.root)
        os.rename(layout.name, aside, src_dir_fd=self.root, dst_dir_fd=self.root)
        os.rename(fresh, layout.name, src_dir_fd=self.root, dst_dir_fd=self.root)
        return aside

    def delete_some(self, aside: str, most: int) -> tuple[bool, int]:
        """Delete up to `most` files of what was set aside; (whether all of it is gone, bytes that were given back)."""
        freed = 0
        with _opened(self.root, aside) as folder:
            for shelf in os.listdir(folder):
                if not _SHELF.fullmatch(shelf):
                    os.unlink(shelf, dir_fd=folder)
                    continue
                with _opened(folder, shelf) as inner:
                    for name in os.listdir(inner):
                        if most == 0:
                            return False, freed
                        freed += occupied_bytes(os.stat(name, dir_fd=inner, follow_symlinks=False))
                        os.unlink(name, dir_fd=inner)
                        most -= 1
                os.rmdir(shelf, dir_fd=folder)
        os.rmdir(aside, dir_fd=self.root)
        return True, freed

    def close(self) -> None:
        os.close(self._lock)
        os.close(self.root)

    def _layout(self, name: str) -> KvLayout | None:
        try:
            with _opened(self.root, name) as folder:
                text = _read_file(folder, _LAYOUT_FILE)
            layout = msgspec.json.decode(text, type=KvLayout)
        except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
        return layout if layout.name == name else None


def take(path: Path, owner: str) -> TierDirectory:
    """Make the directory if need be, lock it, and prove that it can be written and read. What a dead writer left
    half-written is deleted.

    Raises:
        Unusable, OSError: why it can't be had now.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if path.is_symlink():
        raise Unusable(f"{path} is a symbolic link; name the directory itself")
    root = os.open(path, _DIRECTORY)
    lock = -1
    try:
        found = os.fstat(root)
        if found.st_uid != os.geteuid():
            raise Unusable(f"{path} belongs to user {found.st_uid}; this is user {os.geteuid()}")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise Unusable(f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):o}); chmod it to 700")
        lock = _locked(path, root, owner)
        with contextlib.suppress(FileExistsError):
            os.mkdir(TEMPORARY, 0o700, dir_fd=root)
        with _opened(root, TEMPORARY) as folder:
            for name in os.listdir(folder):
                _delete_tree(folder, name)
        return TierDirectory(path, root, lock, _prove(root))
    except BaseException:
        if lock >= 0:
            os.close(lock)
        os.close(root)
        raise


def _locked(path: Path, root: int, owner: str) -> int:
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unusable(f"{path} is in use by {_holder(lock)}", held=True) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, msgspec.json.encode(Holder(owner, os.getpid(), socket.gethostname())), 0)
        return lock
    except BaseException:
        os.close(lock)
        raise


def _holder(lock: int) -> str:
    try:
        holder = msgspec.json.decode(os.pread(lock, _MOST_TEXT, 0), type=Holder)
    except (msgspec.MsgspecError, UnicodeDecodeError):  # it is about to write it
        return "another process"
    return f"{holder.owner} (pid {holder.pid} on {holder.host})"


def _prove(root: int) -> bool:
    """Write a page to the disk, read it back, delete it; whether that goes past the page cache."""
    path, page = f"{TEMPORARY}/probe", memoryview(mmap.mmap(-1, 2 * PAGE))
    page[:PAGE] = os.urandom(PAGE)
    for direct in (os.O_DIRECT, 0):
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | direct
            with _closing(os.open(path, flags, 0o600, dir_fd=root)) as file:
                written = os.pwritev(file, [page[:PAGE]], 0)
                os.fsync(file)
                read = os.preadv(file, [page[PAGE:]], 0)
            if (written, read) != (PAGE, PAGE) or page[:PAGE] != page[PAGE:]:
                raise OSError(errno.EIO, "a page that was written reads back otherwise")
            return bool(direct)
        except OSError as error:
            if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        finally:
            with contextlib.suppress(OSError):  # the error before it is the one that tells
                os.unlink(path, dir_fd=root)
    raise AssertionError("the second try returns or raises")


def _write_file(root: int, path: str, text: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with _closing(os.open(path, flags, 0o600, dir_fd=root)) as file:
        if os.write(file, text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _read_file(root: int, path: str) -> bytes:
    with _closing(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)) as file:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return b""
        return os.read(file, _MOST_TEXT)


def _delete_tree(root: int, path: str) -> None:
    """What there is of `path`, never following a link."""
    try:
        os.unlink(path, dir_fd=root)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        with _opened(root, path) as folder:
            for name in os.listdir(folder):
                _delete_tree(folder, name)
        os.rmdir(path, dir_fd=root)


def _opened(root: int, path: str) -> contextlib.AbstractContextManager[int]:
    return _closing(os.open(path, _DIRECTORY, dir_fd=root))


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
