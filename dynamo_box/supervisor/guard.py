"""The guard: the process between the supervisor and one child, run as `python -I -S guard.py …` by path.

It exists so that a child can't outlive the box, whatever happens to anyone. It is a child subreaper, so every
orphan below it becomes its own child and "no child left" means "no descendant left". It ends its descendants
(TERM, a grace period, then KILL until nothing is left) when told to, when the program itself ends, and when
the supervisor is gone: it sees that as the end of the control socket, and as the parent-death signal in case
somebody else holds that socket open. The program has a parent-death signal too: it doesn't survive the guard.

    guard.py CONTROL_FD CHILD_FDS CORES GRACE_S CGROUP PROGRAM [ARGUMENT…]

CONTROL_FD is a SOCK_SEQPACKET socket. Guard to supervisor: `pid N`, then `exit N` or `signal N` as soon as
the program ends, or `noexec TEXT`. Supervisor to guard: `stop SECONDS` (TERM, then KILL after so long).
CHILD_FDS are inherited by the program only; CORES is an affinity (empty: any); CGROUP is a directory the
program joins (empty: none). The guard's own exit status is the program's.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36

LEFTOVER_GRACE_S = 0.5
"""For what the program leaves behind when it ends by itself."""

KILL_AGAIN_S = 0.05
"""A descendant may fork while the others are being killed: how soon to look again."""


def prctl(option: int, value: int) -> None:
    """Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def descendants(root: int) -> list[int]:
    """Every process below `root`, zombies included, parents first."""
    found: list[int] = []
    waiting = [root]
    while waiting:
        children = children_of(waiting.pop())
        found += children
        waiting += children
    return found


def children_of(pid: int) -> list[int]:
    """Children of any thread of `pid`; empty when it is gone."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
        except OSError:
            if not os.path.exists("/proc/thread-self/children"):
                return _children_by_scan(pid)
            continue  # only that thread has gone
    return found


def _children_by_scan(pid: int) -> list[int]:
    """For kernels without CONFIG_PROC_CHILDREN."""
    found: list[int] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                stat = file.read()
        except OSError:
            continue
        if int(stat[stat.rindex(b")") + 2 :].split()[1]) == pid:
            found.append(int(entry))
    return found


class Guard:
    """One program and everything below it."""

    def __init__(self, control_fd: int, grace_s: float) -> None:
        self._control: int | None = control_fd
        self._grace_s = grace_s
        self._program: int | None = None
        self._status: int | None = None
        self._kill_at: float | None = None
        self._told_to_stop = False
        self._wakeup_r, self._wakeup_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self, program: list[str], child_fds: list[int], cores: set[int], cgroup: str) -> int:
        """Run the program; return its wait status once nothing is left of it."""
        signal.set_wakeup_fd(self._wakeup_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._program = self._spawn(program, child_fds, cores, cgroup)
        for fd in child_fds:
            os.close(fd)
        self._report(f"pid {self._program}")
        while self._reap():
            self._wait()
            if self._told_to_stop:
                self._told_to_stop = False
                self._stop(self._grace_s)
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._signal_all(signal.SIGKILL)
        return self._status or 0

    def _spawn(self, program: list[str], child_fds: list[int], cores: set[int], cgroup: str) -> int:
        guard = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setpgid(0, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard:
                os._exit(1)
            usable = cores & os.sched_getaffinity(0)
            if usable:
                os.sched_setaffinity(0, usable)
            _join(cgroup)
            for fd in child_fds:
                os.set_inheritable(fd, True)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.execvp(program[0], program)  # noqa: S606  # an argument list, no shell
        except OSError as error:
            self._report(f"noexec {program[0]}: {error.strerror}")
        finally:
            os._exit(127)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._told_to_stop = True

    def _reap(self) -> bool:
        """Collect what has ended; False once nothing is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._program:
                self._status = status
                code = os.waitstatus_to_exitcode(status)
                self._report(f"exit {code}" if code >= 0 else f"signal {-code}")
                self._stop(LEFTOVER_GRACE_S)

    def _wait(self) -> None:
        """Until a signal, a word from the supervisor, or the time to kill."""
        poll = select.poll()
        poll.register(self._wakeup_r, select.POLLIN)
        if self._control is not None:
            poll.register(self._control, select.POLLIN)
        timeout_ms = None
        if self._kill_at is not None:
            timeout_ms = max(self._kill_at - time.monotonic(), KILL_AGAIN_S) * 1000
        for fd, _ in poll.poll(timeout_ms):
            if fd == self._wakeup_r:
                os.read(fd, 4096)
            else:
                self._obey()

    def _obey(self) -> None:
        if self._control is None:
            return
        try:
            words = os.read(self._control, 4096).split()
        except ConnectionResetError:
            words = []
        if not words:
            os.close(self._control)
            self._control = None
            self._stop(self._grace_s)
        elif words[0] == b"stop":
            self._stop(float(words[1]))

    def _stop(self, grace_s: float) -> None:
        """TERM now, KILL in `grace_s`; a second call can only bring the KILL forward."""
        kill_at = time.monotonic() + grace_s
        if self._kill_at is None:
            self._signal_all(signal.SIGTERM)
            self._kill_at = kill_at
        else:
            self._kill_at = min(self._kill_at, kill_at)

    def _signal_all(self, number: int) -> None:
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):
                continue  # gone, or changed its user: the cgroup and the sweep are there for those

    def _report(self, text: str) -> None:
        if self._control is None:
            return
        try:
            os.write(self._control, text.encode())
        except OSError:
            return  # the supervisor is gone, which the control socket tells us too


def _join(cgroup: str) -> None:
    if not cgroup:
        return
    try:
        with open(f"{cgroup}/cgroup.procs", "w") as file:
            file.write("0")
    except OSError as error:
        print(f"guard: can't join {cgroup}: {error}", file=sys.stderr)  # noqa: T201  # the child's log


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def _end_like(status: int) -> None:
    """Exit as the program did, without a core dump of our own."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        os._exit(code)
    prctl(PR_SET_DUMPABLE, 0)
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


def main(arguments: list[str]) -> None:
    control, child_fds, cores, grace_s, cgroup, *program = arguments
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = Guard(int(control), float(grace_s))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    fds = _numbers(child_fds)
    for fd in (int(control), *fds):
        os.set_inheritable(fd, False)
    _end_like(guard.run(program, fds, set(_numbers(cores)), cgroup))


if __name__ == "__main__":
    main(sys.argv[1:])
