"""Instance files: `<run dir>/instances/<name>.json`, written under a temporary name and renamed.

A worker writes its file when it can answer and removes it when it drains. The supervisor, which learns of a death at
once, removes the file of a dead worker. Readers believe a file only while the process that it names (pid and start
time) lives, so that no ghost survives anyone's crash.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

TEMPORARY_PREFIX = ".tmp_"


class Instance(msgspec.Struct, frozen=True):
    """A worker that can answer. `socket` is a path; `start_time` is in clock ticks since boot (see proc(5), stat)."""

    name: str
    model: str
    role: str
    engine: str
    socket: str
    pid: int
    start_time: int
    fingerprint: str
    block_size: int
    kv_blocks_total: int
    kv_dtype: str
    context_length: int
    capabilities: tuple[str, ...] = ()


_decoder = msgspec.json.Decoder(Instance)


def process_start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def announce(directory: Path, instance: Instance) -> None:
    """Write the instance's file, atomically."""
    temporary = directory / f"{TEMPORARY_PREFIX}{instance.name}.{os.getpid()}"
    temporary.write_bytes(msgspec.json.encode(instance))
    temporary.replace(directory / f"{instance.name}.json")


def withdraw(directory: Path, name: str) -> None:
    """Remove the instance's file; no error if there is none."""
    with contextlib.suppress(FileNotFoundError):
        (directory / f"{name}.json").unlink()


def read_instances(directory: Path) -> dict[str, Instance]:
    """Live instances by name. Temporary, unreadable and foreign files, and those of dead processes, are left out."""
    found: dict[str, Instance] = {}
    try:
        paths = sorted(directory.glob("*.json"))
    except FileNotFoundError:
        return found
    for path in paths:
        if path.name.startswith(TEMPORARY_PREFIX):
            continue
        try:
            instance = _decoder.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError):
            continue
        if process_start_time(instance.pid) == instance.start_time:
            found[instance.name] = instance
    return found
