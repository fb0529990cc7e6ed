"""What the kernel says of the cpu device's memory, for this box: the blocks of its memfds that anybody still holds or
maps, and the anonymous memory of its workers.

Weights lie in memfds whose names say box, place, device and layout, so they are found wherever a descriptor or a
mapping of one is left, in processes of others too. A look around takes tens of milliseconds: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_box.gms.names import parse_memfd_name
from dynamo_box.supervisor.identity import PROCESS_VARIABLE
from dynamo_box.supervisor.procfs import environment_variable, pids

_LINK = re.compile(r"/memfd:(.+) \(deleted\)")
_BLOCK = 512


@dataclass
class MemoryFile:
    """One memfd of the box. `holders` are pids."""

    place: str
    device: str
    layout: str
    bytes: int
    holders: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Reading:
    """`files` by inode; `anonymous` bytes by device."""

    files: Mapping[int, MemoryFile]
    anonymous: Mapping[str, int]

    def on_device(self, device: str) -> int:
        files = sum(one.bytes for one in self.files.values() if one.place == "device" and one.device == device)
        return files + self.anonymous.get(device, 0)

    def of_layout(self, layout: str) -> dict[int, MemoryFile]:
        """Its memfds on devices."""
        return {inode: one for inode, one in self.files.items() if one.place == "device" and one.layout == layout}


def read(run_key: str, workers: Iterable[tuple[int, str]]) -> Reading:
    """Look around. `workers` are (pid, device). What ends or can't be read meanwhile is left out."""
    files: dict[int, MemoryFile] = {}
    for pid in pids():
        _add_descriptors(pid, run_key, files)
        _add_mappings(pid, run_key, files)
    anonymous: dict[str, int] = {}
    for pid, device in workers:
        anonymous[device] = anonymous.get(device, 0) + anonymous_bytes(pid)
    return Reading(files, anonymous)


def who(pid: int) -> str:
    """A process of the box by its name, another by its command."""
    name = environment_variable(pid, PROCESS_VARIABLE)
    if name is None:
        try:
            name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        except OSError:
            name = "a process that has just ended"
    return f"{name} (pid {pid})"


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of a process; 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as rollup:
            for line in rollup:
                if line.startswith(b"Anonymous:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def _add_descriptors(pid: int, run_key: str, files: dict[int, MemoryFile]) -> None:
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        path = f"{directory}/{name}"
        try:
            link = os.readlink(path)
            if link.startswith("/memfd:dynbox:"):
                info = os.stat(path)
                _add(files, link, info.st_ino, info.st_blocks * _BLOCK, pid, run_key)
        except OSError:
            continue


def _add_mappings(pid: int, run_key: str, files: dict[int, MemoryFile]) -> None:
    """Whoever maps without a descriptor. Blocks of a file that nobody has open are read through the mapping where the
    kernel lets us, else counted as what is mapped of it."""
    mapped: dict[int, tuple[str, int, str]] = {}
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                if "/memfd:dynbox:" not in line:
                    continue
                addresses, _mode, _offset, _device, number, link = line.split(maxsplit=5)
                start, end = (int(part, 16) for part in addresses.split("-"))
                size = mapped.get(int(number), ("", 0, ""))[1] + end - start
                mapped[int(number)] = (link.strip(), size, addresses)
    except OSError:
        return
    for inode, (link, size, addresses) in mapped.items():
        if inode in files:
            files[inode].holders.add(pid)
            continue
        with contextlib.suppress(OSError):  # the kernel may reserve this for root
            size = os.stat(f"/proc/{pid}/map_files/{addresses}").st_blocks * _BLOCK
        _add(files, link, inode, size, pid, run_key)


def _add(files: dict[int, MemoryFile], link: str, inode: int, size: int, pid: int, run_key: str) -> None:
    match = _LINK.fullmatch(link)
    name = parse_memfd_name(match[1]) if match else None
    if name is not None and name.run_key == run_key:
        found = files.setdefault(inode, MemoryFile(name.place, name.device, name.layout, size))
        found.holders.add(pid)
