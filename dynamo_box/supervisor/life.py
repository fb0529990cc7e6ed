"""One life of a child: from the spawn of its guard to the moment when nothing of it is left.

Three descriptors tell what happens: the status socket (the child's own words), the guard's control socket
(the program's pid, its end), and the guard's pidfd (the guard's end, which normally means that no descendant
is left). A guard that ends without having reported the program's end was killed; its orphans are then ours,
since the supervisor is a subreaper, and are killed before the life counts as over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_box.plan.types import ProcessPlan
from dynamo_box.protocol import status
from dynamo_box.protocol.framing import STATUS_FD_VARIABLE, Channel
from dynamo_box.supervisor import guard
from dynamo_box.supervisor.cgroups import BoxCgroup
from dynamo_box.supervisor.identity import PROCESS_VARIABLE, RunId
from dynamo_box.supervisor.logs import Capture, ProcessLog
from dynamo_box.supervisor.sweep import end_processes

TERM_GRACE_S = 5.0
"""What a guard gives its descendants between TERM and KILL when the supervisor is gone."""


@dataclass(frozen=True)
class Ending:
    """How a life ended. `guard_lost`: somebody killed the guard, so the program's own end is unknown."""

    code: int | None = None
    signal: int | None = None
    guard_lost: bool = False
    no_exec: str = ""

    @property
    def text(self) -> str:
        if self.no_exec:
            return f"can't be executed: {self.no_exec}"
        if self.guard_lost:
            return "its guard was killed"
        if self.signal is not None:
            return f"killed by {_signal_name(self.signal)}"
        return f"exited with status {self.code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Surroundings:
    """What every life in a box shares. `guards` are the pids of the guards that now run: any other child of
    the supervisor is an orphan that it adopted.
    """

    run_id: RunId
    environment: Mapping[str, str]
    cgroup: BoxCgroup | None
    guards: set[int] = field(default_factory=set)


class Life:
    """Made by `begin`. `ended` is done once nothing is left; `program_ended` is called as soon as the program
    is.
    """

    def __init__(
        self,
        plan: ProcessPlan,
        surroundings: Surroundings,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        capture: Capture,
        program_ended: Callable[[], None],
        program_started: Callable[[], None],
    ) -> None:
        self.pid: int | None = None
        self.killed = False
        self._plan = plan
        self._surroundings = surroundings
        self._process = process
        self._control = control
        self._capture = capture
        self._program_ended = program_ended
        self._program_started = program_started
        self._ending: Ending | None = None
        self._no_exec = ""
        self._channel: Channel[status.ChildMessage] | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Ending] = self._loop.create_future()
        surroundings.guards.add(process.pid)
        self._pidfd = os.pidfd_open(process.pid)
        self._cleaning: asyncio.Task[None] | None = None
        self._loop.add_reader(self._pidfd, self._on_guard_end)
        self._loop.add_reader(self._control.fileno(), self._on_report)

    @classmethod
    async def begin(
        cls,
        plan: ProcessPlan,
        surroundings: Surroundings,
        *,
        inherited: Mapping[str, int],
        log: ProcessLog,
        on_message: Callable[[status.ChildMessage], None],
        on_status_closed: Callable[[Exception | None], None],
        program_ended: Callable[[], None],
        program_started: Callable[[], None],
    ) -> Life:
        """Spawn the guard with its program, and send the child its spec. Call it on the main thread: the
        guard's parent-death signal follows the thread that spawned it. `inherited` are descriptors for the
        program, by the variables that tell it of them.

        Raises:
            OSError: no process or descriptor to be had.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            control, guard_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.callback(control.close)
            theirs.callback(guard_control.close)
            parent_end, child_end = socket.socketpair()
            ours.callback(parent_end.close)
            theirs.callback(child_end.close)
            capture = Capture(log)
            ours.callback(capture.close)
            theirs.callback(os.close, capture.write_fd)
            child_fds = [child_end.fileno()]
            environment = dict(surroundings.environment) | plan.env
            environment[PROCESS_VARIABLE] = plan.name
            environment[STATUS_FD_VARIABLE] = str(child_end.fileno())
            for variable, descriptor in inherited.items():
                child_fds.append(descriptor)
                environment[variable] = str(descriptor)
            cgroup = surroundings.cgroup.join_path(plan.name) if surroundings.cgroup else ""
            process = subprocess.Popen(
                _guard_command(plan, guard_control.fileno(), child_fds, cgroup),
                stdin=subprocess.DEVNULL,
                stdout=capture.write_fd,
                stderr=capture.write_fd,
                pass_fds=(guard_control.fileno(), *child_fds),
                env=environment,
            )
            control.setblocking(False)
            life = cls(plan, surroundings, process, control, capture, program_ended, program_started)
            ours.pop_all()
        await life._open_status(parent_end, on_message, on_status_closed)
        return life

    async def _open_status(
        self,
        sock: socket.socket,
        on_message: Callable[[status.ChildMessage], None],
        on_closed: Callable[[Exception | None], None],
    ) -> None:
        sock.setblocking(False)
        _, self._channel = await self._loop.create_unix_connection(
            lambda: Channel(
                status.child_decoder,
                lambda _channel, message: on_message(message),
                lambda _channel, error: on_closed(error),
            ),
            sock=sock,
        )
        self._channel.send(status.Start(self._plan.spec))

    @property
    def guard_pid(self) -> int:
        return self._process.pid

    def send(self, message: status.ParentMessage) -> None:
        """To the child; dropped when it is gone."""
        if self._channel is not None:
            self._channel.send(message)

    def terminate(self, grace_s: float) -> None:
        """TERM to everything below the guard now, KILL in `grace_s`."""
        with contextlib.suppress(OSError):  # the guard is gone, which its pidfd tells too
            self._control.send(b"stop %f" % grace_s)

    def kill(self) -> None:
        """KILL the guard itself; its descendants follow. For a guard that doesn't answer."""
        self.killed = True
        self._process.kill()

    def _on_report(self) -> None:
        try:
            words = self._control.recv(4096).decode("utf-8", "replace").split(" ", 1)
        except BlockingIOError:
            return
        except OSError:
            words = [""]
        match words:
            case ["pid", pid]:
                self.pid = int(pid)
                self._program_started()
            case ["exit" | "signal" as how, number]:
                value = int(number)
                self._note_end(Ending(code=value) if how == "exit" else Ending(signal=value))
            case ["noexec", text]:
                self._no_exec = text
            case _:
                self._loop.remove_reader(self._control.fileno())

    def _note_end(self, ending: Ending) -> None:
        if self._no_exec:
            ending = Ending(code=ending.code, no_exec=self._no_exec)
        if ending.signal == signal.SIGKILL:
            self.killed = True
        self._ending = ending
        self.pid = None
        self._program_ended()

    def _on_guard_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._process.wait()
        self._surroundings.guards.discard(self._process.pid)
        while self._ending is None and self._control_has_more():
            self._on_report()
        self._loop.remove_reader(self._control.fileno())
        if self._ending is None:
            self.pid = None
            self._program_ended()
        self._cleaning = self._loop.create_task(self._finish())

    def _control_has_more(self) -> bool:
        try:
            return bool(self._control.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    async def _finish(self) -> None:
        """Close everything; after a lost guard, first end what it left."""
        ending = self._ending
        if ending is None:
            await asyncio.to_thread(end_processes, self._surroundings.run_id.__eq__, self._plan.name)
            self.killed = True
            ending = Ending(guard_lost=True)
        self._capture.drain()
        self._capture.close()
        if self._channel is not None:
            self._channel.close()
        os.close(self._pidfd)
        self._control.close()
        self.ended.set_result(ending)


def _guard_command(plan: ProcessPlan, control_fd: int, child_fds: list[int], cgroup: str) -> list[str]:
    program = list(plan.program)
    if program[0] == "python":
        program[0] = str(Path(plan.venv) / "bin" / "python") if plan.venv else sys.executable
    return [
        sys.executable,
        "-I",
        "-S",
        guard.__file__,
        str(control_fd),
        ",".join(map(str, child_fds)),
        ",".join(map(str, plan.cores)),
        str(TERM_GRACE_S),
        cgroup,
        *program,
    ]
