"""What /proc says of other processes. Those that are gone, or another user's, are left out or None.

Every process of a box carries `DYNBOX_RUN_ID=<run dir key>.<supervisor pid>.<its start time>`; the supervisor sets it
(`dynamo_box.supervisor.identity`), and a test holds the two readings of it together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.doctor.machine import Machine

RUN_ID_VARIABLE = "DYNBOX_RUN_ID"
RUN_DIR_VARIABLE = "DYNBOX_RUN_DIR"


@dataclass(frozen=True)
class BoxProcess:
    """A process of some box, dead or alive: `key` is that of its run dir, `run_dir` the path if it says so."""

    pid: int
    name: str
    key: str
    box_alive: bool
    run_dir: str | None


def pids(machine: Machine) -> Iterator[int]:
    """All processes that are visible from here, but this one."""
    try:
        entries = os.listdir(machine.root / "proc")
    except OSError:
        return
    yield from (int(entry) for entry in entries if entry.isdecimal() and int(entry) != os.getpid())


def box_processes(machine: Machine) -> list[BoxProcess]:
    """Of every box of this user, by pid."""
    return [found for pid in sorted(pids(machine)) if (found := box_process(machine, pid)) is not None]


def box_process(machine: Machine, pid: int) -> BoxProcess | None:
    """None for a process of no box, and for one whose environment can't be read."""
    variables = _environment(machine, pid)
    key, _, rest = variables.get(RUN_ID_VARIABLE, "").partition(".")
    supervisor, _, start = rest.partition(".")
    if not (key and supervisor.isdecimal() and start.isdecimal()):
        return None
    alive = start_time(machine, int(supervisor)) == int(start)
    return BoxProcess(pid, command(machine, pid) or "?", key, alive, variables.get(RUN_DIR_VARIABLE))


def command(machine: Machine, pid: int) -> str | None:
    """Its name, as the kernel keeps it: at most 15 bytes."""
    text = machine.text(f"proc/{pid}/comm")
    return None if text is None else text.strip()


def start_time(machine: Machine, pid: int) -> int | None:
    """In clock ticks since boot; None for a zombie, which is no process any more."""
    _, _, rest = (machine.text(f"proc/{pid}/stat") or "").rpartition(")")
    fields = rest.split()
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return int(fields[19])


def open_files(machine: Machine, pid: int) -> Iterator[str]:
    """What its descriptors lead to, as the kernel writes it: paths, `anon_inode:inotify`, …"""
    directory = machine.root / f"proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(directory / name)
        except OSError:
            continue  # closed since


def uid_of(machine: Machine, pid: int) -> int | None:
    try:
        return Path(machine.root, f"proc/{pid}").stat().st_uid
    except OSError:
        return None


def _environment(machine: Machine, pid: int) -> dict[str, str]:
    """As it was when the process was executed."""
    try:
        data = Path(machine.root, f"proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in data.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}
