"""The disk tier's state: off, on, or suspended with a reason, and how it comes back by itself.

    off                              nothing was asked for
    suspended → on                   the directory was taken: made, checked, locked, written and read
    on → suspended                   an operation failed or is silent for too long; the directory is gone or replaced
    suspended → suspended            it can't be taken yet: tried again after a pause that doubles, or, while another
                                     box holds it, every few seconds

Suspended, it gives the directory back once nothing is at it any more, and takes it anew: whatever happened to the disk
meanwhile, what is on it is looked at again. While a thread hangs in the disk there is nothing to come back to.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.kv.store.disk_directory import TierDirectory, Unusable, take
from dynamo_box.kv.store.disk_pool import Pool
from dynamo_box.log import get_logger

log = get_logger()

FULL = (errno.ENOSPC, errno.EDQUOT)
_WHY = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space or raise it",
    errno.EROFS: "the file system is read-only; see the kernel's log",
    errno.EIO: "the disk fails; see the kernel's log",
    errno.ENOENT: "it has vanished",
    errno.ESTALE: "it has vanished",
    errno.EACCES: "it isn't ours to use; see its owner and mode",
    errno.EPERM: "it isn't ours to use; see its owner and mode",
    errno.EFBIG: "files may not be that large here; see ulimit -f",
    errno.EMFILE: "no more files may be open; see ulimit -n",
    errno.ENFILE: "no more files may be open on this machine",
}


@dataclass(frozen=True)
class Pace:
    """In seconds. An operation that is silent for `patience` is given up; `tick` is how often that and all else here is
    looked at; the directory is checked every `check`, and tried again after `retry` to `retry_most`, or `takeover` if
    another box has it. After `settled` without trouble pauses start short again. What was used is written down every
    `note_use`.
    """

    tick: float = 0.5
    patience: float = 10.0
    check: float = 5.0
    retry: float = 1.0
    retry_most: float = 30.0
    takeover: float = 2.0
    settled: float = 60.0
    note_use: float = 5.0


def reason_of(directory: Path, error: Exception) -> str:
    """For people: what is wrong and what to do."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{directory}: {_WHY.get(error.errno, error.strerror)}"
    return f"{directory}: a bug: {type(error).__name__}: {error}"


class DiskLife:
    """`taken` is called with the directory each time that the tier comes on; `lost` when it is on no more. `io` is for
    blocks, `keeper` a single thread for all else: both end up here, since their silence tells of the disk.
    """

    def __init__(
        self,
        directory: Path,
        owner: str,
        threads: int,
        pace: Pace,
        *,
        taken: Callable[[TierDirectory], None],
        lost: Callable[[], None],
        ticked: Callable[[], None],
        note: Callable[[str, str], None],
    ) -> None:
        self.directory: TierDirectory | None = None
        """While it is on."""
        self.reason = "not opened yet"
        self.io = Pool("kv-disk", threads, ticked)
        self.keeper = Pool("kv-disk-keeper", 1, ticked)
        self._path = directory
        self._owner = owner
        self._pace = pace
        self._taken = taken
        self._lost = lost
        self._ticked = ticked
        self._note = note
        self._noted = False
        self._given_up: TierDirectory | None = None
        self._taking = False
        self._ended = False
        self._pause = pace.retry
        self._next_try = self._next_check = self._on_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def on(self) -> bool:
        return self.directory is not None

    def start(self) -> None:
        self.io.start()
        self.keeper.start()
        self._tick()

    def confirm(self) -> None:
        """It is of use: what is there is known, and more can be written."""
        if self._noted:
            self._noted = False
            self._note("info", f"the disk tier for KV is back: {self._path}")

    def failed(self, error: Exception) -> None:
        """Something that was done in the directory ended with this."""
        if not isinstance(error, OSError | Unusable):
            log.error("the disk tier failed", exc_info=error)
        self.suspend(reason_of(self._path, error))

    def suspend(self, reason: str) -> None:
        """Does nothing if it isn't on."""
        if self.directory is None:
            return
        now = time.monotonic()
        if now - self._on_since > self._pace.settled:
            self._pause = self._pace.retry
        self._given_up, self.directory, self.reason = self.directory, None, reason
        self._try_later(self._pause)
        self._tell_off()
        self._lost()
        self.io.refuse_waiting(Unusable(reason))

    def end(self) -> None:
        """For good. What hangs is left behind."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self.io.stop()
        self.keeper.stop()
        directory = self.directory or self._given_up
        self.directory = self._given_up = None
        if directory is not None and not self.io.busy and not self.keeper.busy:
            directory.close()

    def _tick(self) -> None:
        if self._ended:
            return
        self._timer = asyncio.get_running_loop().call_later(self._pace.tick, self._tick)
        silent_s = max(self.io.silent_s(), self.keeper.silent_s())
        if silent_s > self._pace.patience:
            hangs = f"{self._path}: the disk hasn't answered for {silent_s:.0f} s"
            self.suspend(hangs)
            self.reason = hangs
        elif self.directory is not None:
            self._check(self.directory)
        elif not self.io.busy and not self.keeper.busy:
            self._take_again()
        self._ticked()

    def _check(self, directory: TierDirectory) -> None:
        if time.monotonic() < self._next_check:
            return
        self._next_check = float("inf")

        def checked(_: None) -> None:
            self._next_check = time.monotonic() + self._pace.check

        self.keeper.submit(lambda _: directory.check(), checked, lambda error: self._check_failed(directory, error))

    def _check_failed(self, directory: TierDirectory, error: Exception) -> None:
        if directory is self.directory:
            self.failed(error)

    def _take_again(self) -> None:
        if self._given_up is not None:
            given_up, self._given_up = self._given_up, None
            self.keeper.submit(lambda _: given_up.close(), lambda _: None, lambda _: None)
        elif time.monotonic() >= self._next_try:
            self._next_try = float("inf")
            self.keeper.submit(lambda _: take(self._path, self._owner), self._has_taken, self._not_taken)

    def _has_taken(self, directory: TierDirectory) -> None:
        self.directory, self.reason = directory, ""
        self._on_since = time.monotonic()
        self._next_check = self._on_since + self._pace.check
        self._taken(directory)

    def _not_taken(self, error: Exception) -> None:
        if not isinstance(error, OSError | Unusable):
            log.error("the disk tier failed", exc_info=error)
        self.reason = reason_of(self._path, error)
        held = isinstance(error, Unusable) and error.held
        self._try_later(self._pace.takeover if held else self._pause)
        self._tell_off()

    def _try_later(self, pause: float) -> None:
        self._next_try = time.monotonic() + pause
        if pause == self._pause:
            self._pause = min(self._pause * 2, self._pace.retry_most)

    def _tell_off(self) -> None:
        if not self._noted:
            self._noted = True
            self._note("warning", f"the disk tier for KV is suspended: {self.reason}")
