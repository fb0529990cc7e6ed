"""Recordings of a box: what `dynbox top --record` writes (`dynamo_box.tui.recorder`) and `--replay` plays.

    dynbox recording 1\\n                            the format, and its version
    {"dynbox": …, "profile": …, "started": …}\\n     the header, one line of JSON
    kind, time, length, payload                     one frame after another

A frame is a snapshot or a batch of log lines, in msgpack, compressed on its own. Whoever opens a recording reads the
13 bytes before each payload and no payload, and whoever seeks reads one frame, so that neither time nor memory grows
much with its length. A frame is written with one system call and nothing is held back: a recorder that is killed leaves
a recording that lacks its last frame at most.

Snapshots are decoded as what comes over the control socket is: unknown fields are left out, those
that an older one didn't write take their defaults. What can't be read nevertheless is skipped and counted.
"""

from __future__ import annotations

import enum
import math
import os
import stat
import struct
import zlib
from array import array
from pathlib import Path

import msgspec

from dynamo_box.control.logs import Entry
from dynamo_box.errors import BoxError, UsageError
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.wording import duration

VERSION = 1
MAX_PAYLOAD = 8 * 1024 * 1024
MAX_BODY = 32 * 1024 * 1024
LONGEST_S = 366 * 86400.0

MAGIC = b"dynbox recording "
FRAME = struct.Struct("<BdI")
"""Kind, seconds since the start, bytes of the payload."""
_MAX_HEADER = 64 * 1024
_AGAIN = "record again with `dynbox top --record FILE`"


class Kind(enum.IntEnum):
    SNAPSHOT = 1
    LOG = 2


class Header(msgspec.Struct, frozen=True):
    """`dynbox` is the version of the program that recorded; `started` is Unix time."""

    dynbox: str
    profile: str
    started: float


def preamble(header: Header) -> bytes:
    """What stands before the first frame."""
    return MAGIC + str(VERSION).encode() + b"\n" + msgspec.json.encode(header) + b"\n"


_snapshots = msgspec.msgpack.Decoder(BoxSnapshot)
_entries = msgspec.msgpack.Decoder(list[Entry])
_headers = msgspec.json.Decoder(Header)


class Recording:
    """An open recording: where its frames lie and when they came, `times` in seconds from the start.

    `cut_short` says that its last frame isn't whole; what is whole plays.
    """

    def __init__(self, path: Path, file: int, header: Header, start: int, end: int) -> None:
        self.path = path
        self.header = header
        self.cut_short = False
        self.times = array("d")
        self._file = file
        self._kinds = bytearray()
        self._unreadable: set[int] = set()
        self._offsets = array("Q")
        self._lengths = array("I")
        self._scan(start, end)

    @classmethod
    def open(cls, path: Path) -> Recording:
        """Raises:
        UsageError: there is no such file, it is no recording, or one of another version.
        BoxError: its frames make no sense from some place on.
        """
        file = _open(path)
        try:
            end = os.fstat(file).st_size
            header, start = _read_header(path, os.pread(file, _MAX_HEADER, 0))
            return cls(path, file, header, start, end)
        except OSError as error:
            os.close(file)
            raise BoxError(f"can't read {path}: {error.strerror}", remedy="copy it to another disk") from error
        except BaseException:
            os.close(file)
            raise

    def __len__(self) -> int:
        return len(self.times)

    @property
    def duration_s(self) -> float:
        return self.times[-1]

    @property
    def skipped(self) -> int:
        """How many frames were asked for and can't be read."""
        return len(self._unreadable)

    def kind(self, number: int) -> Kind:
        return Kind(self._kinds[number])

    def snapshot(self, number: int) -> BoxSnapshot | None:
        """The snapshot in the frame `number`, None if it can't be read."""
        body = self._body(number)
        try:
            snapshot = None if body is None else _snapshots.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            snapshot = None
        if snapshot is None or not math.isfinite(snapshot.at):
            self._unreadable.add(number)
            return None
        return snapshot

    def entries(self, number: int) -> list[Entry]:
        """The log lines in the frame `number`, oldest first; none if they can't be read."""
        body = self._body(number)
        try:
            return [] if body is None else _entries.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._unreadable.add(number)
            return []

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _body(self, number: int) -> bytes | None:
        inflater = zlib.decompressobj()
        try:
            body = inflater.decompress(os.pread(self._file, self._lengths[number], self._offsets[number]), MAX_BODY)
        except (OSError, zlib.error):
            body = b""
        if not inflater.eof:
            self._unreadable.add(number)
            return None
        return body

    def _scan(self, position: int, end: int) -> None:
        last = 0.0
        while position < end:
            raw = os.pread(self._file, FRAME.size, position)
            if len(raw) < FRAME.size:
                self.cut_short = True
                break
            kind, at, length = FRAME.unpack(raw)
            if kind not in (Kind.SNAPSHOT, Kind.LOG) or not last <= at <= LONGEST_S or length > MAX_PAYLOAD:
                raise self._damaged(position, last)
            if position + FRAME.size + length > end:
                self.cut_short = True
                break
            self._kinds.append(kind)
            self.times.append(at)
            self._offsets.append(position + FRAME.size)
            self._lengths.append(length)
            position += FRAME.size + length
            last = at
        if Kind.SNAPSHOT not in self._kinds:
            raise UsageError(f"the recording {self.path} ends before its first snapshot", remedy=_AGAIN)

    def _damaged(self, position: int, last: float) -> BoxError:
        remedy = _AGAIN
        if Kind.SNAPSHOT in self._kinds:
            remedy = f"its first {duration(last)} are whole: `head -c {position} {self.path} > NEW` keeps them"
        return BoxError(f"the recording {self.path} is damaged at byte {position}", remedy=remedy)


def _open(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"can't open {path}: {error.strerror}", remedy="name a recording") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UsageError(f"{path} is not a file", remedy="name a recording")
    return file


def _read_header(path: Path, head: bytes) -> tuple[Header, int]:
    """The header, and where the frames start."""
    if not head:
        raise UsageError(f"{path} is empty: the recording ended before its first snapshot", remedy=_AGAIN)
    first, found, rest = head.partition(b"\n")
    if not first.startswith(MAGIC):
        raise UsageError(f"{path} is not a recording", remedy=_AGAIN)
    version = first[len(MAGIC) :].decode("ascii", "replace")
    if found and version != str(VERSION):
        raise UsageError(
            f"{path} is a recording of format {version[:20]!r}; this program plays format {VERSION}",
            remedy="play it with the dynbox that recorded it",
        )
    line, found, _ = rest.partition(b"\n")
    if not found:
        raise UsageError(f"the recording {path} ends before its first snapshot", remedy=_AGAIN)
    try:
        header = _headers.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the recording {path} has no readable header ({error})", remedy=_AGAIN) from error
    if not math.isfinite(header.started):
        raise UsageError(f"the recording {path} has no readable header (started)", remedy=_AGAIN)
    return header, len(first) + 1 + len(line) + 1
