"""Who holds a run dir: an exclusive flock for the life of the supervisor. The kernel gives it back whatever
happens to the holder, so a stale lock file never blocks anyone; what is written inside only names the holder
to people.

The directory is locked too, and shared: what cleans temporary directories of old files (systemd-tmpfiles) passes over a
locked one with all that is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

from dynamo_box.errors import BoxError


class Holder(msgspec.Struct, frozen=True):
    pid: int
    profile: str
    run_id: str = ""


class RunDirHeld(BoxError):
    """Another supervisor has the run dir; `holder` is None when it hasn't said yet who it is."""

    def __init__(self, path: Path, holder: Holder | None) -> None:
        who = f"profile {holder.profile}, supervisor pid {holder.pid}" if holder else "a box that is just starting"
        super().__init__(
            f"{path.parent} is held by {who}",
            remedy="`dynbox down` stops it; another DYNBOX_RUN_DIR and port run a second box beside it",
        )
        self.holder = holder


class RunDirLock:
    """Held from `acquire` to `release` or to the end of the process."""

    def __init__(self, path: Path, fd: int, directory: int) -> None:
        self._path = path
        self._fd = fd
        self._directory = directory

    @property
    def is_in_place(self) -> bool:
        """Whether its file is where it was: it goes with a run dir that is removed, and another may be there now."""
        try:
            there = os.stat(self._path)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._fd))

    @classmethod
    def acquire(cls, path: Path, holder: Holder) -> RunDirLock:
        """Take the lock without waiting.

        Raises:
            RunDirHeld: somebody else has it.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise RunDirHeld(path, read_holder(path)) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(holder), 0)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError):  # a cleaner that is at it just now doesn't find any old files
            fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return cls(path, fd, directory)

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)
        os.close(self._directory)


def read_holder(path: Path) -> Holder | None:
    """Who last wrote into the lock file; whether they still hold it only `acquire` can tell."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Holder)
    except (OSError, msgspec.DecodeError):
        return None
