"""A real service of weight memory beside the workers of a test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.framing import STATUS_FD_VARIABLE, BlockingChannel
from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.spec import GmsSpec

DEADLINE_S = 90.0
NAME = "gms@cpu"
GIB = 1024**3


class GmsProcess:
    """Ready when constructed. Nobody keeps its epochs: what it holds ends with it."""

    def __init__(self, run_dir: Path, layouts: tuple[str, ...] = ("m",), capacity_bytes: int = 2 * GIB) -> None:
        self.run_dir = RunDir(run_dir)
        self.run_dir.create()
        ours, theirs = socket.socketpair()
        environment = {**os.environ, STATUS_FD_VARIABLE: str(theirs.fileno()), "DYNBOX_PROCESS": NAME}
        self.log_path = run_dir / "gms.log"
        with theirs, self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dynamo_box.gms"], env=environment, stderr=log, pass_fds=[theirs.fileno()]
            )
        self.status: BlockingChannel[status.ChildMessage] = BlockingChannel(ours, status.child_decoder)
        self._numbers = iter(range(1, 1000))
        spec = GmsSpec(NAME, str(run_dir), "cpu", capacity_bytes, capacity_bytes, str(run_dir / "snapshots"), layouts)
        self.status.send(status.Start(spec))
        self.await_status(status.Ready)

    def await_status(self, kind: type) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            message = self.status.receive(max(0.01, deadline - time.monotonic()))
            assert message is not None, self.log_path.read_text()
            if isinstance(message, kind):
                return message

    def move(self, layout: str, place: Place) -> status.Moved:
        self.status.send(status.Move(next(self._numbers), layout, place))
        moved: status.Moved = self.await_status(status.Moved)
        return moved

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def end(self) -> None:
        self.status.close()
        self.kill()

    def __enter__(self) -> GmsProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
