"""Who holds a run dir: an exclusive flock for the life of the supervisor. The kernel gives it back whatever
happens to the holder, so a stale lock file never blocks anyone; what is written inside only names the holder
to people.
"""

from __future__ import annotations

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

    def __init__(self, fd: int) -> None:
        self._fd = fd

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
        return cls(fd)

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def read_holder(path: Path) -> Holder | None:
    """Who last wrote into the lock file; whether they still hold it only `acquire` can tell."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Holder)
    except (OSError, msgspec.DecodeError):
        return None
