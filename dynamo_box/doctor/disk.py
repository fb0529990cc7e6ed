"""Room on the disks that the box writes to, and how fast the models' disk is.

The speed is measured on a file without a name, so that nothing is left whatever happens, around the page cache where
the file system allows that, and for a fraction of a second.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dynamo_box import wording
from dynamo_box.doctor.finding import Finding, failed, passed, skipped, warned
from dynamo_box.doctor.machine import Machine

SPACE_LEAST = 256 << 20
SPACE_TIGHT = 5 << 30
INODES_TIGHT = 1000
SLOW_READ = 100 << 20
"""Bytes a second: 16 GB of weights take almost three minutes."""

BLOCK = 4 << 20
PROBE_BYTES = 64 << 20
PROBE_S = 0.2


@dataclass(frozen=True)
class Room:
    """Of one file system; `purposes` are those of our directories that lie on it. File systems without a count of
    inodes have None.
    """

    path: Path
    purposes: tuple[str, ...]
    free: int
    total: int
    inodes_free: int | None


@dataclass(frozen=True)
class Speed:
    """Bytes a second; `read` is None where it would only tell of the page cache."""

    write: float
    read: float | None


def check_space(machine: Machine) -> list[Finding]:
    return [judge_room(room) for room in read_rooms(machine)]


def check_speed(machine: Machine) -> list[Finding]:
    directory = _existing(machine.home.models)
    if directory != machine.home.models:
        return [skipped("disk speed", f"measured once {machine.home.models} is there")]
    try:
        return [judge_speed(measure(directory))]
    except OSError as error:
        why = "models can't be brought into the store"
        return [failed("disk speed", f"{directory}: {error.strerror}", why, f"ls -ld {directory}")]


def read_rooms(machine: Machine) -> list[Room]:
    """One a file system."""
    home = machine.home
    places = {"models": home.models, "logs": home.logs, "run dir": machine.run.root, "KV tier": home.kv}
    by_device: dict[int, list[str]] = {}
    for purpose, path in places.items():
        by_device.setdefault(_existing(path).stat().st_dev, []).append(purpose)
    return [_room(_existing(places[purposes[0]]), tuple(purposes)) for purposes in by_device.values()]


def judge_room(room: Room) -> Finding:
    name = "disk space" if "models" in room.purposes else f"space for {room.purposes[0]}"
    known = f"{wording.size(room.free)} free of {wording.size(room.total)} for {', '.join(room.purposes)} ({room.path})"
    if room.inodes_free is not None and room.inodes_free < INODES_TIGHT:
        why = "no file can be made without one"
        return failed(name, f"{known}, {room.inodes_free} inodes left", why, f"df -i {room.path}")
    tight, why, command = SPACE_LEAST, "sockets, logs and state are written there", f"df -h {room.path}"
    if "models" in room.purposes:
        tight, why, command = SPACE_TIGHT, "a pull needs room for the model twice", "dynbox models"
    if room.free < SPACE_LEAST:
        return failed(name, known, why, command)
    return warned(name, known, why, command) if room.free < tight else passed(name, known)


def judge_speed(speed: Speed) -> Finding:
    known = f"write {wording.size(int(speed.write))}/s"
    if speed.read is None:
        return passed("disk speed", known)
    known += f", read {wording.size(int(speed.read))}/s"
    if speed.read >= SLOW_READ:
        return passed("disk speed", known)
    why = "the first start of a model reads all its weights"
    return warned("disk speed", known, why, "export DYNBOX_HOME=/a/faster/disk")


def measure(directory: Path) -> Speed:
    """Takes about twice PROBE_S, or one block's time each way on a disk that is slower than that.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file, mmap.mmap(-1, BLOCK) as block:
        descriptor = file.fileno()
        block.write(os.urandom(1 << 16) * (BLOCK >> 16))
        direct = _bypass_cache(descriptor)

        def write(offset: int) -> int:
            return os.pwrite(descriptor, block, offset)

        written, write_s = _repeat(write, PROBE_BYTES, lambda: os.fdatasync(descriptor))
        if not direct:
            return Speed(written / write_s, None)
        read, read_s = _repeat(lambda offset: os.preadv(descriptor, [block], offset), written, lambda: None)
        return Speed(written / write_s, read / read_s)


def _repeat(transfer: Callable[[int], int], limit: int, finish: Callable[[], None]) -> tuple[int, float]:
    """Bytes moved block by block until `limit` or PROBE_S, and the seconds that took."""
    start = time.perf_counter()
    moved = 0
    while moved < limit and time.perf_counter() - start < PROBE_S:
        count = transfer(moved)
        if count == 0:
            break
        moved += count
    finish()
    return moved, max(time.perf_counter() - start, 1e-9)


def _bypass_cache(descriptor: int) -> bool:
    """False where the file system has no such thing."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there already."""
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def _room(path: Path, purposes: tuple[str, ...]) -> Room:
    status = os.statvfs(path)
    inodes = status.f_favail if status.f_files else None
    return Room(path, purposes, status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, inodes)
