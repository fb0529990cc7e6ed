"""What children write: read by the supervisor, bounded, one JSON object a line, rotated by size, kept after a
crash.

A line that is already such an object passes through unchanged; any other is wrapped as the `event` of one.
Files are `<process>.log`, `.log.1`, `.log.2` … in the box's `paths.logs_dir`.
"""

from __future__ import annotations

import asyncio
import datetime
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

MAX_LINE = 16 * 1024
READ_SIZE = 64 * 1024
KEPT_LINES = 200
ROTATE_BYTES = 10 * 1024 * 1024
ROTATE_FILES = 3
SUPERVISOR = "supervisor"


class RotatingFile:
    """Append lines; at `limit` bytes the file becomes `.1`, which becomes `.2`, and the oldest of `files`
    goes.

    A full disk must not stop the box: lines that can't be written are dropped and counted in `lost`.
    """

    def __init__(self, path: Path, limit: int = ROTATE_BYTES, files: int = ROTATE_FILES) -> None:
        self.path = path
        self.lost = 0
        self._limit = limit
        self._files = files
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = _open_append(path)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Whole lines, newline included."""
        try:
            if self._size and self._size + len(data) > self._limit:
                self._rotate()
            self._size += os.write(self._fd, data)
        except OSError:
            self.lost += data.count(b"\n")

    def _rotate(self) -> None:
        shift(self.path, self._files)
        fd = _open_append(self.path)
        os.close(self._fd)
        self._fd, self._size = fd, 0

    def close(self) -> None:
        os.close(self._fd)


class OwnLog:
    """The supervisor's stdout and stderr as a rotated file. The descriptors themselves point at it, so that a
    traceback of the interpreter lands there too; `rotate_if_large` is called once a second.
    """

    def __init__(self, path: Path, limit: int = ROTATE_BYTES, files: int = ROTATE_FILES) -> None:
        self._path = path
        self._limit = limit
        self._files = files
        path.parent.mkdir(parents=True, exist_ok=True)
        self._redirect()

    def rotate_if_large(self) -> None:
        if os.fstat(2).st_size > self._limit:
            shift(self._path, self._files)
            self._redirect()

    def _redirect(self) -> None:
        fd = _open_append(self._path)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)


def shift(path: Path, files: int) -> None:
    """`path` becomes `path.1` and so on; `files` counts `path` itself."""
    for number in range(files - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
        if newer.exists():
            newer.replace(older)


def _open_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


class LineSplitter:
    """Cut a byte stream into lines of at most MAX_LINE bytes; the rest of a longer one is dropped."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._partial = b""
        self._dropping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield complete lines, without newline."""
        *complete, rest = data.split(b"\n")
        for piece in complete:
            line, self._partial = self._partial + piece, b""
            if self._dropping:
                self._dropping = False
            else:
                yield line[: self._max_line]
        self._partial += rest
        if self._dropping:
            self._partial = b""
        elif len(self._partial) > self._max_line:
            yield self._partial[: self._max_line]
            self._partial = b""
            self._dropping = True

    def finish(self) -> Iterator[bytes]:
        """The last line, if it had no newline."""
        if self._partial:
            yield self._partial
        self._partial = b""


def structured(process: str, raw: bytes, now: datetime.datetime) -> bytes:
    """One log line as it goes into the file, newline included; bytes that aren't UTF-8 are replaced."""
    if raw.startswith(b"{"):
        fields = _fields(raw)
        if fields is not None and "ts" in fields and "event" in fields:
            return raw + b"\n"
    text = raw.decode("utf-8", "replace").rstrip("\r")
    return msgspec.json.encode({"ts": _timestamp(now), "level": "info", "process": process, "event": text}) + b"\n"


def readable(line: bytes) -> list[str]:
    """A structured line for a person who reads an error: `event key=value …`, then its traceback."""
    fields = _fields(line)
    if fields is None:
        return [line.decode("utf-8", "replace").rstrip()]
    head = str(fields.pop("event", ""))
    level = str(fields.pop("level", "info"))
    trace = str(fields.pop("exception", ""))
    rest = " ".join(f"{key}={value}" for key, value in fields.items() if key not in ("ts", "process"))
    first = " ".join(part for part in (f"[{level}]" if level != "info" else "", head, rest) if part)
    return [first, *trace.splitlines()]


def _fields(raw: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _timestamp(now: datetime.datetime) -> str:
    return now.isoformat(timespec="microseconds").replace("+00:00", "Z")


class ProcessLog:
    """One process's log through all its lives: the file, and the last lines for error reports."""

    def __init__(self, process: str, file: RotatingFile) -> None:
        self._process = process
        self._file = file
        self._recent: deque[bytes] = deque(maxlen=KEPT_LINES)

    def add(self, lines: list[bytes]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        whole = [structured(self._process, line, now) for line in lines if line]
        self._recent.extend(whole)
        if whole:
            self._file.write(b"".join(whole))

    def last(self, count: int) -> tuple[str, ...]:
        """The last lines, readable, at most `count`."""
        lines = [text for line in self._recent for text in readable(line)]
        return tuple(lines[-count:])

    def forget_recent(self) -> None:
        """A new life begins: its error report should hold its own lines only."""
        self._recent.clear()

    def close(self) -> None:
        self._file.close()


class Capture:
    """Read one life's stdout and stderr from a pipe. At most READ_SIZE a turn of the loop: a child that
    floods its pipe waits for us, nobody waits for it.
    """

    def __init__(self, log: ProcessLog) -> None:
        self._log = log
        self._splitter = LineSplitter()
        self._loop = asyncio.get_running_loop()
        self._fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._open = True
        self._loop.add_reader(self._fd, self._read)

    def _read(self) -> bool:
        """True when there may be more."""
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        self._log.add(list(self._splitter.feed(data)))
        return True

    def drain(self) -> None:
        """Take what is in the pipe now: its writers have ended, and a report is about to be made."""
        for _ in range(16):
            if not self._open or not self._read():
                return

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            self._log.add(list(self._splitter.finish()))
            os.close(self._fd)
