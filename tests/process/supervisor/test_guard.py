"""The guard by itself: it needs nothing but the standard library, and nothing of its program outlives it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from supervised_box import DEADLINE_S, alive, eventually

from dynamo_box.supervisor import guard

DAEMON = (
    "import os, signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        print(os.getpid(), flush=True)\n"
    "        signal.pause()\n"
    "    os._exit(0)\n"
    "os.wait()\n"
)
"""Python that leaves a daemon which ignores TERM, and prints its pid."""


class Guarded:
    def __init__(self, program: list[str], grace_s: float = 0.3, cores: str = "") -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(DEADLINE_S)
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno()), "", cores),
                    *(str(grace_s), "", *program),
                ],
                pass_fds=(theirs.fileno(),),
                stdout=subprocess.PIPE,
                text=True,
            )

    def says(self) -> str:
        return self.control.recv(4096).decode()

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def guarded(*program: str, cores: str = "") -> Iterator[Guarded]:
    started = Guarded(list(program), cores=cores)
    try:
        yield started
    finally:
        started.control.close()
        started.process.communicate(timeout=DEADLINE_S)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code)


@pytest.mark.parametrize("code", [0, 3, 127])
def test_it_exits_as_its_program_does(code: int) -> None:
    with guarded(*python(f"raise SystemExit({code})")) as started:
        pid = int(started.says().removeprefix("pid "))
        assert pid != started.process.pid
        assert started.says() == f"exit {code}"
        assert started.process.wait(DEADLINE_S) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_it_dies_of_the_signal_that_killed_its_program(number: signal.Signals) -> None:
    with guarded(*python(f"import os; os.kill(os.getpid(), {number.value})")) as started:
        started.says()
        assert started.says() == f"signal {number.value}"
        assert started.process.wait(DEADLINE_S) == -number


def test_it_says_why_a_program_can_not_be_executed() -> None:
    with guarded("/nowhere/program") as started:
        said = {started.says().split(" ")[0] for _ in range(3)}
        assert said == {"pid", "noexec", "exit"}


def test_it_reports_the_end_first_and_then_ends_what_the_program_left() -> None:
    with guarded(*python(DAEMON)) as started:
        started.says()
        daemon = int(started.read_line())
        assert started.says() == "exit 0"
        assert started.process.wait(DEADLINE_S) == 0
        assert not alive(daemon)


@pytest.mark.parametrize("how", ["word", "signal", "end of the control socket"])
def test_told_to_stop_it_leaves_nothing(how: str) -> None:
    with guarded(*python(DAEMON + "signal.pause()")) as started:
        program = int(started.says().removeprefix("pid "))
        daemon = int(started.read_line())
        match how:
            case "word":
                started.control.send(b"stop 0.1")
            case "signal":
                started.process.terminate()
            case _:
                started.control.close()
        assert started.process.wait(DEADLINE_S) == -signal.SIGKILL
        assert not alive(program)
        assert not alive(daemon)


def test_a_program_that_heeds_term_is_not_killed() -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print(1, flush=True)\n"
        "signal.pause()\n"
    )
    with guarded(*python(code)) as started:
        started.says()
        started.read_line()
        started.control.send(b"stop 60")
        assert started.says() == "exit 7"


def test_without_its_guard_the_program_dies() -> None:
    with guarded(*python("import signal; signal.pause()")) as started:
        program = int(started.says().removeprefix("pid "))
        started.process.kill()
        eventually(lambda: not alive(program), "the program is gone")


def test_children_that_fork_while_they_are_killed_are_all_ended() -> None:
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(1, flush=True)\n"
        "while True:\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(0.02)\n"
        "        if os.fork(): os._exit(0)\n"
        "        time.sleep(30)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.01)\n"
    )
    with guarded(*python(code)) as started:
        started.says()
        started.read_line()
        eventually(lambda: len(guard.descendants(started.process.pid)) > 20, "a family has grown")
        started.control.send(b"stop 0.0")
        started.process.wait(DEADLINE_S)
    assert not _family_in_session(started.process.pid)


def _family_in_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and alive(int(entry.name)):
            try:
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def test_it_pins_its_program_to_cores() -> None:
    core = max(os.sched_getaffinity(0))
    with guarded(*python("import os; print(os.sched_getaffinity(0))"), cores=f"{core},4095") as started:
        assert started.read_line().strip() == str({core})


def test_it_is_small_and_quick() -> None:
    with guarded(*python("import signal; signal.pause()")) as started:
        started.says()
        spent = psutil.Process(started.process.pid).cpu_times()
        assert spent.user + spent.system < 0.5
        pages = int(Path(f"/proc/{started.process.pid}/statm").read_text().split()[1])
        assert pages * resource.getpagesize() < 24 * 2**20


def test_children_are_found_by_a_scan_too() -> None:
    with guarded(*python("import signal; signal.pause()")) as started:
        program = int(started.says().removeprefix("pid "))
        assert guard.children_of(started.process.pid) == [program]
        assert guard._children_by_scan(started.process.pid) == [program]
