"""What a dead box left behind: processes that carry its run id, its cgroup, its sockets and instance files.

Guards and parent-death signals end nearly everything already. What is left after supervisor and guards were
killed at once (a daemon among the workers' descendants, say) still carries the run id, and the next `up` or
`down` finds it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from dynamo_box.paths import RunDir
from dynamo_box.supervisor import cgroups
from dynamo_box.supervisor.identity import PROCESS_VARIABLE, RUN_ID_VARIABLE, RunId
from dynamo_box.supervisor.lock import Holder, RunDirLock
from dynamo_box.supervisor.procfs import environment_variable, pids

KILL_DEADLINE_S = 10.0
"""Giving back tens of GiB takes a process seconds; longer than this is a process that can't die (device
wait).
"""


@dataclass(frozen=True)
class SweepReport:
    """`pids` were found, `killed` of them are gone, `survivors` are still there."""

    pids: tuple[int, ...] = ()
    killed: int = 0
    survivors: tuple[int, ...] = ()


def sweep(run_dir: RunDir) -> SweepReport:
    """Remove everything that dead boxes of this run dir left. For callers that don't hold its lock.

    Raises:
        RunDirHeld: a box lives there; nothing was touched.
    """
    if not run_dir.root.is_dir():
        return sweep_processes(run_dir)
    lock = RunDirLock.acquire(run_dir.lock, Holder(os.getpid(), "none, it is being swept"))
    try:
        return sweep_locked(run_dir)
    finally:
        lock.release()


def sweep_locked(run_dir: RunDir) -> SweepReport:
    """The same for the holder of the lock."""
    report = sweep_processes(run_dir)
    for path in (*run_dir.root.glob("*.sock"), *run_dir.instances.glob("*")):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            path.unlink()
    return report


def sweep_processes(run_dir: RunDir) -> SweepReport:
    """Kill what carries the id of a dead box of this run dir; a living box's processes are left alone."""

    def is_leftover(run_id: RunId) -> bool:
        return run_id.directory == run_dir.key and not run_id.is_alive

    report = end_processes(is_leftover)
    cgroups.remove_empty(lambda run_id: not run_id.is_alive)
    return report


def processes_of(wanted: Callable[[RunId], bool], process: str | None = None) -> set[int]:
    """Live processes of the boxes whose id is wanted (of one process of theirs): those that carry the id in
    their environment, and those in their cgroups. This one never counts.
    """
    found = cgroups.members(wanted, process)
    for pid in pids():
        text = environment_variable(pid, RUN_ID_VARIABLE)
        run_id = RunId.parse(text) if text else None
        if run_id is None or not wanted(run_id):
            continue
        if process is None or environment_variable(pid, PROCESS_VARIABLE) == process:
            found.add(pid)
    return found - {os.getpid()}


def end_processes(
    wanted: Callable[[RunId], bool], process: str | None = None, deadline_s: float = KILL_DEADLINE_S
) -> SweepReport:
    """KILL until a look around finds none (they may fork meanwhile), or the deadline passes. Blocks."""
    deadline = time.monotonic() + deadline_s
    seen: set[int] = set()
    while (found := processes_of(wanted, process)) and time.monotonic() < deadline:
        seen.update(found)
        pidfds = _open_pidfds(found)
        try:
            confirmed = processes_of(wanted, process)  # none of these can be a reused pid
            cgroups.kill(wanted, process)
            _kill_and_wait({fd for pid, fd in pidfds.items() if pid in confirmed}, deadline)
        finally:
            for fd in pidfds.values():
                os.close(fd)
    return SweepReport(tuple(sorted(seen)), len(seen - found), tuple(sorted(found)))


def _open_pidfds(found: set[int]) -> dict[int, int]:
    fds = {}
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            fds[pid] = os.pidfd_open(pid)
    return fds


def _kill_and_wait(pidfds: set[int], deadline: float) -> None:
    waiting = select.poll()
    for fd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        waiting.register(fd, select.POLLIN)
    pending = len(pidfds)
    while pending and (left_s := deadline - time.monotonic()) > 0:
        for fd, _ in waiting.poll(left_s * 1000):
            waiting.unregister(fd)
            pending -= 1
