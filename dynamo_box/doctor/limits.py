"""What the kernel lets this user have: locked memory, file descriptors, inotify instances."""

from __future__ import annotations

import os

from dynamo_box import wording
from dynamo_box.doctor import processes
from dynamo_box.doctor.finding import Finding, failed, passed, skipped, warned
from dynamo_box.doctor.machine import Machine

DESCRIPTORS = 4096
"""A connection costs the frontend one, and a request to a worker may cost another; 1,024 is where boxes run dry."""

DESCRIPTORS_MINIMUM = 256
INOTIFY_SPARE = 4
"""Router and frontend watch one directory each; two boxes side by side."""

_CAP_IPC_LOCK = 14
_LIMITS_FILE = "/etc/security/limits.d/90-dynbox.conf"
_SYSCTL_FILE = "/etc/sysctl.d/90-dynbox.conf"

Limit = tuple[int | None, int | None]
"""Soft and hard; None is unlimited."""


def check(machine: Machine) -> list[Finding]:
    limits = parse_limits(machine.lines("proc/self/limits"))
    return [
        judge_memlock(limits.get("Max locked memory"), has_gpu=machine.has_nvidia_driver, exempt=_may_lock(machine)),
        judge_descriptors(limits.get("Max open files")),
        judge_inotify(
            machine.number("proc/sys/fs/inotify/max_user_instances"),
            machine.number("proc/sys/fs/inotify/max_user_watches"),
            inotify_in_use(machine),
        ),
    ]


def parse_limits(lines: list[str]) -> dict[str, Limit]:
    """From /proc/PID/limits: a name of up to 25 characters, then soft and hard limit."""
    found = {}
    for line in lines[1:]:
        values = line[25:].split()
        if len(values) >= 2 and all(value == "unlimited" or value.isdecimal() for value in values[:2]):
            soft, hard = (None if value == "unlimited" else int(value) for value in values[:2])
            found[line[:25].strip()] = (soft, hard)
    return found


def judge_memlock(limit: Limit | None, *, has_gpu: bool, exempt: bool) -> Finding:
    """`exempt`: this process may lock as much as it likes (CAP_IPC_LOCK)."""
    if limit is None:
        return skipped("memlock", "/proc/self/limits doesn't say")
    soft, _ = limit
    if soft is None:
        return passed("memlock", "unlimited")
    if exempt:
        return passed("memlock", f"{wording.size(soft)}, which doesn't bind this user (CAP_IPC_LOCK)")
    if not has_gpu:
        return passed("memlock", f"{wording.size(soft)}; enough without a GPU")
    return warned(
        "memlock",
        wording.size(soft),
        "transports register (lock) the memory that they send; counts from the next login",
        f"echo '* - memlock unlimited' | sudo tee -a {_LIMITS_FILE}",
    )


def judge_descriptors(limit: Limit | None) -> Finding:
    if limit is None:
        return skipped("descriptors", "/proc/self/limits doesn't say")
    soft, hard = limit
    if soft is None or soft >= DESCRIPTORS:
        return passed("descriptors", "unlimited" if soft is None else f"{soft:,}")
    known = f"{soft:,} (at most {'unlimited' if hard is None else f'{hard:,}'})"
    if hard is None or hard >= DESCRIPTORS:
        command = f"ulimit -n {DESCRIPTORS if hard is None else hard}"
    else:
        command = f"echo '* - nofile 65536' | sudo tee -a {_LIMITS_FILE}"
    judge = failed if soft < DESCRIPTORS_MINIMUM else warned
    return judge("descriptors", known, "each connection takes one; without them requests are refused", command)


def judge_inotify(instances: int | None, watches: int | None, used: int) -> Finding:
    if instances is None or watches is None:
        return skipped("inotify", "/proc/sys/fs/inotify doesn't say")
    known = f"{used} of {instances:,} instances in use, {watches:,} watches"
    if instances - used >= INOTIFY_SPARE:
        return passed("inotify", known)
    why = "router and frontend watch the run dir for workers"
    wanted = max(512, 2 * instances)
    command = f"echo fs.inotify.max_user_instances={wanted} | sudo tee -a {_SYSCTL_FILE} && sudo sysctl --system"
    return (failed if used >= instances else warned)("inotify", known, why, command)


def inotify_in_use(machine: Machine) -> int:
    """By processes of this user."""
    mine = (pid for pid in processes.pids(machine) if processes.uid_of(machine, pid) == os.getuid())
    return sum(path == "anon_inode:inotify" for pid in mine for path in processes.open_files(machine, pid))


def _may_lock(machine: Machine) -> bool:
    for line in machine.lines("proc/self/status"):
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
