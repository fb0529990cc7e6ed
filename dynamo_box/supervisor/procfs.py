"""What /proc says of processes. Whatever can't be read (gone, another user's) is None or left out, never an
error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.supervisor.guard import descendants

PAGE = os.sysconf("SC_PAGE_SIZE")
STAT_BLOCK = 512
"""Bytes of a unit of st_blocks, on every file system."""


def pids() -> Iterator[int]:
    """All processes that are visible from here."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            yield int(entry)


def environment_variable(pid: int, name: str) -> str | None:
    """A variable as it was when the process was executed. Zombies have none."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    key = os.fsencode(name) + b"="
    for entry in data.split(b"\0"):
        if entry.startswith(key):
            return os.fsdecode(entry[len(key) :])
    return None


def resident_bytes(root: int) -> int | None:
    """Resident bytes of a process and all its descendants; None when it is gone."""
    own = _resident(root)
    if own is None:
        return None
    return own + sum(_resident(pid) or 0 for pid in descendants(root))


def _resident(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
    except OSError:
        return None
    return int(fields[1]) * PAGE


@dataclass(frozen=True)
class Proportional:
    """Resident bytes, each page divided by the number of processes that have mapped it. `shared` are those of memory
    files and of other shared memory.
    """

    anonymous: int = 0
    file: int = 0
    shared: int = 0

    def __add__(self, other: Proportional) -> Proportional:
        return Proportional(self.anonymous + other.anonymous, self.file + other.file, self.shared + other.shared)


_PROPORTIONAL_FIELDS = {b"Pss_Anon:": "anonymous", b"Pss_File:": "file", b"Pss_Shmem:": "shared"}


def proportional_bytes(pid: int, root: Path = Path("/")) -> Proportional | None:
    """None when the process is gone, is another user's, or the kernel doesn't tell (before 5.4). The kernel walks the
    whole address space for it.
    """
    try:
        with open(root / f"proc/{pid}/smaps_rollup", "rb") as file:
            found = {
                _PROPORTIONAL_FIELDS[words[0]]: int(words[1]) * 1024
                for words in map(bytes.split, file)
                if words[0] in _PROPORTIONAL_FIELDS
            }
    except OSError:
        return None
    return Proportional(**found) if len(found) == len(_PROPORTIONAL_FIELDS) else None


def memory_files(pid: int, root: Path = Path("/")) -> dict[int, int]:
    """Bytes by inode of the memory files that a process has open, whether or not anybody maps them."""
    found: dict[int, int] = {}
    directory = root / f"proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return found
    for name in names:
        path = directory / name
        try:
            if os.readlink(path).startswith("/memfd:"):
                info = os.stat(path)
                found[info.st_ino] = info.st_blocks * STAT_BLOCK
        except OSError:  # closed meanwhile
            continue
    return found
