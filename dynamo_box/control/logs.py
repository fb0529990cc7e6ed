"""Read and follow the log files of every process of a box, whether it runs or not.

The supervisor writes `<process>.log`, one JSON object a line, and renames it to `.log.1`, `.log.2` … when it grows
large. A few lines may be bare text (the interpreter's own last words); they take the time of the line before them.
Memory is bounded by the number of lines asked for: a tail is read backwards from the end of the files, everything else
streams.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import msgspec

from dynamo_box.wording import printable

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
MAX_LINE = 256 * 1024
REORDER_WINDOW = 512
_BLOCK = 64 * 1024
_NOT_IN_MESSAGE = frozenset(("ts", "level", "process", "event", "exception"))
_SUFFIX = ".log"


class Entry(msgspec.Struct, frozen=True):
    """One line. `at` is Unix time; `fields` is the whole object of the line."""

    at: float
    process: str
    level: str
    fields: dict[str, object]


class Mark(NamedTuple):
    """A place in one process's lines: so many bytes into the file with this inode. Names of files move."""

    inode: int
    offset: int


Predicate = Callable[[Entry], bool]
Marks = Mapping[str, Mark]
"""By process; one without a mark is read to its end."""


class _Head(msgspec.Struct, frozen=True):
    """What every structured line has; the rest of it is decoded only if the line is wanted."""

    ts: datetime
    event: str
    level: str = "info"
    process: str = ""


_head = msgspec.json.Decoder(_Head)


def message(entry: Entry) -> str:
    """`event  key=value key=value` on one line, safe for a terminal; the exception is left out."""
    fields = entry.fields
    rest = " ".join(f"{key}={_value(value)}" for key, value in fields.items() if key not in _NOT_IN_MESSAGE)
    return printable(f"{fields.get('event', '')}{'  ' + rest if rest else ''}").replace("\n", "\\n")


def _value(value: object) -> str:
    text = str(value)
    return repr(text) if not text or " " in text or "=" in text else text


def processes_with_logs(directory: Path) -> list[str]:
    """Names of the processes that have ever logged there, sorted."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def tail(
    directory: Path,
    processes: Iterable[str],
    count: int,
    wanted: Predicate,
    since: float = 0.0,
    until: Marks = MappingProxyType({}),
) -> list[Entry]:
    """The last `count` wanted lines of all these processes together, oldest first, none older than `since`."""
    found: list[Entry] = []
    for process in processes:
        found.extend(reversed(_last_of_process(directory, process, count, wanted, since, until.get(process))))
    found.sort(key=_time)
    return found[-count:] if count else []


def since(
    directory: Path,
    processes: Iterable[str],
    start: float,
    wanted: Predicate,
    until: Marks = MappingProxyType({}),
) -> Iterator[Entry]:
    """All wanted lines from `start` on, merged by time."""
    streams = [_from_oldest(directory, process, until.get(process)) for process in processes]
    merged = heapq.merge(*streams, key=_time)
    return in_order(entry for entry in merged if entry.at >= start and wanted(entry))


def in_order(entries: Iterable[Entry], window: int = REORDER_WINDOW) -> Iterator[Entry]:
    """Put right what is out of order by less than `window` lines: a line that the supervisor had to date itself is a
    little younger than its neighbours.
    """
    held: list[tuple[float, int, Entry]] = []
    for number, entry in enumerate(entries):
        item = (entry.at, number, entry)
        if len(held) < window:
            heapq.heappush(held, item)
        else:
            yield heapq.heappushpop(held, item)[2]
    while held:
        yield heapq.heappop(held)[2]


class Follower:
    """New lines of some processes (all, if none are named), across rotations and lives of the box.

    Construction marks the present end of every file; `read` returns what came since, in order.
    """

    def __init__(self, directory: Path, processes: Iterable[str] | None) -> None:
        self._directory = directory
        self._processes = None if processes is None else list(processes)
        self._tails: dict[str, _ProcessTail] = {}
        for process in self._current():
            self._tails[process] = _ProcessTail(directory, process, from_end=True)

    @property
    def marks(self) -> dict[str, Mark]:
        """How far each process's lines have been read."""
        return {process: tail.mark for process, tail in self._tails.items()}

    def read(self) -> list[Entry]:
        for process in self._current():
            if process not in self._tails:
                self._tails[process] = _ProcessTail(self._directory, process, from_end=False)
        found = [entry for each in self._tails.values() for entry in each.read()]
        found.sort(key=_time)
        return found

    def wait(self) -> Iterator[None]:
        """Yields whenever there may be something to read, at least once a second."""
        from watchfiles import watch

        self._directory.mkdir(parents=True, exist_ok=True)
        for _ in watch(
            self._directory, step=10, debounce=50, rust_timeout=1000, yield_on_timeout=True, recursive=False
        ):
            yield

    def _current(self) -> list[str]:
        return processes_with_logs(self._directory) if self._processes is None else self._processes


class _ProcessTail:
    """How far one process's files have been read: a file, known by its inode since names move, and an offset in it."""

    def __init__(self, directory: Path, process: str, *, from_end: bool) -> None:
        self._directory = directory
        self._process = process
        self._inode = 0
        self._offset = 0
        self._last_at = 0.0
        self._current = directory / f"{process}{_SUFFIX}"
        if from_end:
            for file in _open_all(directory, process):  # the newest is the last; none is current while it is rotated
                with file:
                    info = os.fstat(file.fileno())
                    self._inode, self._offset = info.st_ino, info.st_size

    @property
    def mark(self) -> Mark:
        return Mark(self._inode, self._offset)

    def read(self) -> Iterator[Entry]:
        if self._unchanged():
            return
        for file in self._unread():
            with file:
                info = os.fstat(file.fileno())
                if info.st_ino != self._inode or info.st_size < self._offset:
                    self._inode, self._offset = info.st_ino, 0
                file.seek(self._offset)
                while (line := file.readline(MAX_LINE)).endswith(b"\n") or len(line) == MAX_LINE:
                    self._offset += len(line)
                    entry = parse(line, self._process) or bare(line, self._process, self._last_at)
                    self._last_at = entry.at
                    yield entry

    def _unchanged(self) -> bool:
        """Whether the file that was being read is still the newest and no longer: most looks find just that."""
        try:
            info = os.stat(self._current)
        except FileNotFoundError:
            return False
        return info.st_ino == self._inode and info.st_size == self._offset

    def _unread(self) -> list[BinaryIO]:
        """The file that was being read and all newer ones, opened before any is read, oldest first."""
        files = _open_all(self._directory, self._process)
        inodes = [os.fstat(file.fileno()).st_ino for file in files]
        first = inodes.index(self._inode) if self._inode in inodes else 0
        for file in files[:first]:
            file.close()
        return files[first:]


def parse(line: bytes, process: str) -> Entry | None:
    """A line of `process`'s file; None if it is no log object."""
    try:
        head = _head.decode(line)
        fields: dict[str, object] = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return Entry(head.ts.timestamp(), head.process or process, head.level.lower(), fields)


def bare(line: bytes, process: str, at: float) -> Entry:
    """A line of text, as the event of a log object with the time of its neighbour."""
    event = line.decode("utf-8", "replace").rstrip("\r\n")
    stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return Entry(at, process, "info", {"ts": stamp, "level": "info", "process": process, "event": event})


def _time(entry: Entry) -> float:
    return entry.at


def _paths(directory: Path, process: str) -> list[Path]:
    """Oldest first: `.log.2`, `.log.1`, `.log`."""
    current = directory / f"{process}{_SUFFIX}"
    rotated = [
        (int(number), path)
        for path in directory.glob(f"{process}{_SUFFIX}.*")
        if (number := path.name.rpartition(".")[2]).isdecimal()
    ]
    return [path for _, path in sorted(rotated, reverse=True)] + [current]


def _open_all(directory: Path, process: str) -> list[BinaryIO]:
    """All of them, oldest first, as they were at one moment: of files that are renamed while they are being opened, one
    would be missing.
    """
    while True:
        files: list[BinaryIO] = []
        for path in _paths(directory, process):
            with contextlib.suppress(FileNotFoundError):  # rotated away meanwhile, or not there yet
                files.append(path.open("rb"))
        if [os.fstat(file.fileno()).st_ino for file in files] == _inodes(directory, process):
            return files
        for file in files:
            file.close()


def _inodes(directory: Path, process: str) -> list[int]:
    found: list[int] = []
    for path in _paths(directory, process):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_ino)
    return found


@contextlib.contextmanager
def _opened(directory: Path, process: str, until: Mark | None) -> Iterator[list[tuple[BinaryIO, int]]]:
    """Files, oldest first, and how many bytes of each lie before the mark."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(file) for file in _open_all(directory, process)]
        known = [(file, os.fstat(file.fileno())) for file in files]
        inodes = [info.st_ino for _, info in known]
        if until is None or until.inode not in inodes:
            yield [(file, info.st_size) for file, info in known]
            return
        last = inodes.index(until.inode)
        yield [*((file, info.st_size) for file, info in known[:last]), (files[last], until.offset)]


def _from_oldest(directory: Path, process: str, until: Mark | None) -> Iterator[Entry]:
    at = 0.0
    with _opened(directory, process, until) as files:
        for file, size in files:
            while file.tell() < size and (line := file.readline(MAX_LINE)):
                entry = parse(line, process) or bare(line, process, at)
                at = entry.at
                yield entry


def _last_of_process(
    directory: Path, process: str, count: int, wanted: Predicate, start: float, until: Mark | None
) -> list[Entry]:
    """At most `count` wanted lines, newest first."""
    found: list[Entry] = []
    undated: deque[bytes] = deque(maxlen=max(count, 1))
    with _opened(directory, process, until) as files:
        for line in (line for file, size in reversed(files) for line in _lines_backwards(file, size)):
            if len(found) >= count:
                break
            entry = parse(line, process)
            if entry is None:
                undated.append(line)
                continue
            if entry.at < start:
                return found
            dated = (*(bare(each, process, entry.at) for each in undated), entry)
            found.extend(each for each in dated if wanted(each))
            undated.clear()
    found.extend(each for line in undated if wanted(each := bare(line, process, start)))
    return found[:count]


def _lines_backwards(file: BinaryIO, position: int) -> Iterator[bytes]:
    """Lines that end at `position` or before, the last one first; one longer than MAX_LINE loses its beginning."""
    rest = b""
    while position:
        size = min(_BLOCK, position)
        position -= size
        file.seek(position)
        first, *lines = (file.read(size) + rest).split(b"\n")
        yield from (line for line in reversed(lines) if line)
        rest = first[-MAX_LINE:]
    if rest:
        yield rest
