"""The real `dynbox`, run as people run it, against a supervisor of the test's own that speaks the real protocol."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo_box.protocol import control
from dynamo_box.protocol.framing import BlockingChannel, listen_unix
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, ModelInfo, ProcessInfo, Progress

DEADLINE_S = 90


def snapshot(**changes: Any) -> BoxSnapshot:
    """A box with one worker; `changes` are fields of BoxInfo."""
    box = {
        "state": "ready", "profile": "smollm2", "endpoint": "http://127.0.0.1:8000",
        "pid": os.getpid(), "uptime_s": 75.0, **changes,
    }  # fmt: skip
    return BoxSnapshot(
        box=BoxInfo(**box),
        models=(ModelInfo("smollm2", "ready", "", 1, 1),),
        processes=(
            ProcessInfo("router", "router", None, None, "ready", "", 101, 0, None, 40_000_000),
            ProcessInfo(
                "smollm2.aggregated.0", "worker", "smollm2", "aggregated", "starting", "weights", 102, 1, "cpu",
                None, progress=Progress(120 * 2**20, 513 * 2**20, "bytes"),
            ),
            ProcessInfo("frontend", "frontend", None, None, "ready", "", 103, 0, None, 90_000_000),
        ),
    )  # fmt: skip


Handler = Callable[[control.ControlRequest], list[control.ControlReply]]


@dataclass
class FakeSupervisor:
    """Serves control.sock. `handlers` by type of request; a request without one breaks the connection, as it would a
    test. `requests` are all that came.
    """

    path: Path
    handlers: dict[type, Handler] = field(default_factory=dict)
    requests: list[control.ControlRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.state = snapshot()
        self.handlers[control.GetSnapshot] = lambda request: [self.reply(request)]
        self._listener = listen_unix(self.path)
        self._listener.setblocking(True)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def reply(self, request: control.ControlRequest, state: BoxSnapshot | None = None) -> control.SnapshotReply:
        return control.SnapshotReply(request.id, msgspec.Raw(msgspec.msgpack.encode(state or self.state)))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(DEADLINE_S)
            with BlockingChannel(sock, control.request_decoder) as channel:
                while (request := channel.receive(DEADLINE_S)) is not None:
                    self.requests.append(request)
                    if type(request) not in self.handlers:
                        break
                    for reply in self.handlers[type(request)](request):
                        channel.send(reply)


@pytest.fixture
def make_supervisor(box_env: Any) -> Iterator[Callable[[], FakeSupervisor]]:
    """For tests in which the box appears only later."""
    made: list[FakeSupervisor] = []

    def make() -> FakeSupervisor:
        made.append(FakeSupervisor(box_env.run / "control.sock"))
        return made[-1]

    yield make
    for fake in made:
        fake.close()


@pytest.fixture
def supervisor(make_supervisor: Callable[[], FakeSupervisor]) -> FakeSupervisor:
    return make_supervisor()


Dynbox = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def dynbox(box_env: Any) -> Dynbox:
    """Run `dynbox` to its end and hold it to an exit code."""

    def run(*arguments: str, code: int = 0, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "dynamo_box", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env={**os.environ, **environment},
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


Complete = Callable[..., list[str]]


@pytest.fixture
def complete(dynbox: Dynbox) -> Complete:
    """What bash would be offered at the end of a line. Names of a box are only offered if that answers within a second,
    as nobody waits longer for them: with `of_box` they are asked for until it has.
    """

    def run(line: str, *, of_box: bool = False) -> list[str]:
        words = {"_DYNBOX_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        give_up_at = time.monotonic() + DEADLINE_S
        while True:
            done = dynbox(**words)
            assert done.stderr == ""
            if done.stdout or not of_box or time.monotonic() > give_up_at:
                return done.stdout.split()

    return run
