"""Record a box while it is watched: every snapshot and every log line, as they come."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from dynamo_box import __version__
from dynamo_box.control.logs import Entry
from dynamo_box.errors import UsageError
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.recording import FRAME, MAX_BODY, MAX_PAYLOAD, Header, Kind, preamble
from dynamo_box.wording import size

DEFAULT_LIMIT = 512 * 1024 * 1024
LOG_FRAME_BYTES = 1024 * 1024


class Recorder:
    """Writes snapshots and log lines as they come, from any thread, into a new file that nobody else may read.

    It ends by itself, and says why in `ended`, when the file would pass `limit_bytes` or (`failed`) can't be written: a
    recording must neither fill a disk nor take the screen down that it records. A frame too large for the format is
    left out and counted in `left_out`.
    """

    def __init__(
        self, path: Path, *, limit_bytes: int = DEFAULT_LIMIT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises:
        UsageError: there is such a file already, or it can't be made.
        """
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise UsageError(
                f"{path} exists, and a recording never replaces a file", remedy="name another file, or remove this one"
            ) from error
        except OSError as error:
            raise UsageError(
                f"can't record to {path}: {error.strerror}", remedy="name a file in a directory that you may write to"
            ) from error
        self.bytes_written = 0
        self.ended = ""
        self.failed = False
        self.left_out = 0
        self._limit = limit_bytes
        self._clock = clock
        self._began: float | None = None
        self._lock = threading.Lock()
        self._open = True

    def snapshot(self, snapshot: BoxSnapshot) -> None:
        self._write(Kind.SNAPSHOT, msgspec.msgpack.encode(snapshot), snapshot.box.profile)

    def log(self, entries: Iterable[Entry]) -> None:
        for body in _log_bodies(entries):
            self._write(Kind.LOG, body, "")

    def close(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._file)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, kind: Kind, body: bytes, profile: str) -> None:
        if self.ended:
            return
        payload = zlib.compress(body, 6)
        with self._lock:
            if not self._open:
                return
            if len(payload) > MAX_PAYLOAD or len(body) > MAX_BODY:
                self.left_out += 1
                return
            now = self._clock()
            head = b""
            if self._began is None:
                self._began = now
                head = preamble(Header(__version__, profile, time.time()))
            frame = head + FRAME.pack(kind, now - self._began, len(payload)) + payload
            if self.bytes_written + len(frame) > self._limit:
                self.ended = f"recording ended: it has reached its limit of {size(self._limit)}"
                return
            try:
                written = os.write(self._file, frame)
            except OSError as error:
                self._fail(error.strerror or str(error))
                return
            self.bytes_written += written
            if written < len(frame):
                self._fail("the disk is full")

    def _fail(self, why: str) -> None:
        self.ended, self.failed = f"recording ended: {why}", True


def _log_bodies(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Arrays of entries, each of about LOG_FRAME_BYTES at most (one entry may be larger)."""
    held: list[msgspec.Raw] = []
    weight = 0
    for entry in entries:
        encoded = msgspec.msgpack.encode(entry)
        if held and weight + len(encoded) > LOG_FRAME_BYTES:
            yield msgspec.msgpack.encode(held)
            held, weight = [], 0
        held.append(msgspec.Raw(encoded))
        weight += len(encoded)
    if held:
        yield msgspec.msgpack.encode(held)
