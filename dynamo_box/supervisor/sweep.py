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

    cgroups.kill_leftovers(is_leftover)
    return kill_carriers(is_leftover)


def carriers(wanted: Callable[[RunId], bool], process: str | None = None) -> list[int]:
    """Live processes whose run id is wanted (and that belong to the named process of the box), this one
    apart.
    """
    found = []
    for pid in pids():
        if pid == os.getpid():
            continue
        text = environment_variable(pid, RUN_ID_VARIABLE)
        run_id = RunId.parse(text) if text else None
        if run_id is None or not wanted(run_id):
            continue
        if process is None or environment_variable(pid, PROCESS_VARIABLE) == process:
            found.append(pid)
    return found


def kill_carriers(
    wanted: Callable[[RunId], bool], process: str | None = None, deadline_s: float = KILL_DEADLINE_S
) -> SweepReport:
    """KILL until a look around finds none (they may fork meanwhile), or the deadline passes. Blocks."""
    deadline = time.monotonic() + deadline_s
    seen: set[int] = set()
    while (found := carriers(wanted, process)) and time.monotonic() < deadline:
        seen.update(found)
        _kill_and_wait(found, deadline)
    survivors = tuple(found)
    return SweepReport(tuple(sorted(seen)), len(seen) - len(survivors), survivors)


def _kill_and_wait(found: list[int], deadline: float) -> None:
    """KILL through pidfds, so that a reused pid can't be hit, and wait for the ends."""
    waiting = select.poll()
    fds: set[int] = set()
    pending = 0
    try:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                fds.add(fd)
                if environment_variable(pid, RUN_ID_VARIABLE) is not None:  # still the one that was found
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    waiting.register(fd, select.POLLIN)
                    pending += 1
        while pending and (left_s := deadline - time.monotonic()) > 0:
            for fd, _ in waiting.poll(left_s * 1000):
                waiting.unregister(fd)
                pending -= 1
    finally:
        for fd in fds:
            os.close(fd)
