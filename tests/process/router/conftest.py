"""Real processes under a supervisor's end of a status socket, and the small peers that router tests talk through."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from dynamo_box.discovery.instances import Instance, announce, process_start_time, withdraw
from dynamo_box.paths import RunDir
from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.figures import RouterFigures
from dynamo_box.protocol.framing import (
    STATUS_FD_VARIABLE,
    BlockingChannel,
    connect_unix,
    listen_unix,
)
from dynamo_box.protocol.request import Hello, KvDump, PeerMessage, Subscribe, peer_decoder
from dynamo_box.protocol.route import Place, Placed, Policy, RouterMessage, Unplaced, router_decoder
from dynamo_box.protocol.spec import EVENTS_SUFFIX, ChildSpec, ModelSpec, RouterSpec
from dynamo_box.protocol.status import ChildMessage, Ready, Report, Start, child_decoder

DEADLINE_S = 120.0
BLOCK = 16
STORE = "kvstore"
SPEC = ModelSpec("smollm2", "/nowhere", "f00", context_length=8192, block_size=BLOCK)

T = TypeVar("T")


class Child:
    """A child process as its supervisor sees it."""

    def __init__(self, module: str, spec: ChildSpec, log: Path) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, STATUS_FD_VARIABLE: str(theirs.fileno()), "DYNBOX_PROCESS": spec.name}
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )
        theirs.close()
        self.status: BlockingChannel[ChildMessage] = BlockingChannel(ours, child_decoder)
        self.figures: RouterFigures | None = None
        self.status.send(Start(spec))

    def expect(self, kind: type[T], fits: Callable[[T], bool] = lambda _message: True) -> T:
        """The next message of this kind that fits; others are passed over."""
        give_up_at = time.monotonic() + DEADLINE_S
        while True:
            message = self.status.receive(max(give_up_at - time.monotonic(), 0.001))
            assert message is not None, f"the child has closed its status socket:\n{self.log.read_text()}"
            if isinstance(message, kind) and fits(message):
                return message

    def figures_when(self, fits: Callable[[RouterFigures], bool]) -> RouterFigures:
        """The router's figures as soon as they fit: the last ones told, or those to come."""
        while self.figures is None or not fits(self.figures):
            self._note_figures(self.expect(Report))
        return self.figures

    def indexed(self, blocks: int) -> RouterFigures:
        return self.figures_when(lambda figures: figures.indexed_blocks == blocks)

    def figures_within(self, timeout_s: float) -> RouterFigures | None:
        """The last figures told, after waiting for new ones for `timeout_s` at most."""
        with contextlib.suppress(TimeoutError):
            message = self.status.receive(timeout_s)
            if isinstance(message, Report):
                self._note_figures(message)
        return self.figures

    def _note_figures(self, report: Report) -> None:
        assert isinstance(report.figures, RouterFigures)
        self.figures = report.figures

    def exit_status(self) -> int:
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.status.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)


class Frontend:
    """A frontend's connection to the router."""

    def __init__(self, path: Path) -> None:
        self.channel: BlockingChannel[RouterMessage] = BlockingChannel(connect_unix(path), router_decoder)
        self.next_id = 0
        self.policies: list[str] = []
        """All that it has heard of."""

    def send(self, message: Any) -> None:
        self.channel.send(message)

    def place(self, hashes: tuple[int, ...] = (), **changes: Any) -> Placed | Unplaced:
        self.next_id += 1
        fields = {
            "id": self.next_id,
            "request_id": f"req-{self.next_id}",
            "model": SPEC.name,
            "hashes": hashes,
            "prompt_tokens": max(len(hashes) * BLOCK, 1),
        }
        self.send(Place(**{**fields, **changes}))
        reply = self.receive()
        assert reply is not None
        return reply

    def receive(self) -> Placed | Unplaced | None:
        """The next answer; None at the end of the connection."""
        while isinstance(message := self.channel.receive(DEADLINE_S), Policy):
            self.policies.append(message.name)
        return message

    def placed(self, hashes: tuple[int, ...] = (), **changes: Any) -> Placed:
        reply = self.place(hashes, **changes)
        assert isinstance(reply, Placed), reply
        return reply

    def close(self) -> None:
        self.channel.close()


class Peer:
    """Somebody who holds KV blocks, and whose every word the test chooses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.channel: BlockingChannel[PeerMessage] | None = None
        self.listen()

    def listen(self) -> None:
        self.listening = listen_unix(self.path)
        self.listening.settimeout(DEADLINE_S)

    def accept(self) -> None:
        """The router's next connection, up to its subscription."""
        connection, _ = self.listening.accept()
        self.hang_up()
        self.channel = BlockingChannel(connection, peer_decoder)
        assert self.channel.receive(DEADLINE_S) == Hello("router", PROTOCOL_VERSION)
        self.expect_subscribe()

    def expect_subscribe(self) -> None:
        assert self.channel is not None
        assert self.channel.receive(DEADLINE_S) == Subscribe()

    def send(self, *messages: Any) -> None:
        assert self.channel is not None
        for message in messages:
            self.channel.send(message)

    def dump(self, next_event_id: int, hashes: tuple[int, ...] = ()) -> None:
        self.send(KvDump(next_event_id, hashes, first=True, more=False))

    def die(self) -> None:
        """As a killed process goes: nobody can connect again."""
        self.listening.close()
        self.hang_up()

    def hang_up(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def close(self) -> None:
        self.hang_up()
        self.listening.close()


class PeerWorker(Peer):
    """A worker. It is announced with the pid of the test process."""

    def __init__(self, run_dir: RunDir, name: str, role: str) -> None:
        super().__init__(run_dir.worker_socket(name))
        self.run_dir = run_dir
        self.name = name
        start_time = process_start_time(os.getpid())
        assert start_time is not None
        self.instance = Instance(
            name=name,
            model=SPEC.name,
            role=role,
            engine="peer",
            socket=str(run_dir.worker_socket(name)),
            pid=os.getpid(),
            start_time=start_time,
            fingerprint=SPEC.fingerprint,
            block_size=BLOCK,
            kv_blocks_total=1000,
            kv_dtype="float32",
            context_length=SPEC.context_length,
        )

    def announce(self) -> None:
        announce(self.run_dir.instances, self.instance)

    def withdraw(self) -> None:
        withdraw(self.run_dir.instances, self.name)

    def die(self) -> None:
        """And its supervisor has taken its file away."""
        self.withdraw()
        super().die()

    def close(self) -> None:
        self.withdraw()
        super().close()


class PeerStore(Peer):
    """The owner of the box's KV tiers."""

    def tiers(self, next_event_id: int, *, host: tuple[int, ...] = (), disk: tuple[int, ...] = ()) -> None:
        """Its dump."""
        self.send(
            KvDump(next_event_id, host, first=True, more=True, tier="g2"),
            KvDump(next_event_id, disk, first=False, more=False, tier="g3"),
        )


@dataclass
class Stage:
    """A run dir, and everything that a test puts on it."""

    run_dir: RunDir
    logs: Path
    _open: list[Any] = field(default_factory=list)

    def child(self, module: str, spec: ChildSpec) -> Child:
        return self._keep(Child(module, spec, self.logs / f"{spec.name}.log"))

    def start_router(self, **changes: Any) -> Child:
        """A router process that has its spec."""
        fields = {"name": "router", "run_dir": str(self.run_dir.root), "models": (SPEC,), "seed": 0}
        return self.child("dynamo_box.router", RouterSpec(**{**fields, **changes}))

    def router(self, **changes: Any) -> Child:
        """A router process that is ready."""
        router = self.start_router(**changes)
        router.expect(Ready)
        return router

    def frontend(self) -> Frontend:
        return self._keep(Frontend(self.run_dir.router_socket))

    def worker(self, number: int = 0, role: str = "aggregated") -> PeerWorker:
        """A worker that is listening, not announced."""
        return self._keep(PeerWorker(self.run_dir, f"{SPEC.name}.{role}.{number}", role))

    def store(self) -> PeerStore:
        """The store of a router with `kvstore=STORE`, listening."""
        return self._keep(PeerStore(self.run_dir.worker_socket(STORE + EVENTS_SUFFIX)))

    def subscribed_worker(
        self, router: Child, number: int = 0, hashes: tuple[int, ...] = (), role: str = "aggregated"
    ) -> PeerWorker:
        """A worker that the router has connected to and whose dump, up to event 0, it has taken in."""
        worker = self.worker(number, role)
        before = router.figures.indexed_blocks if router.figures is not None else 0
        worker.announce()
        worker.accept()
        worker.dump(0, hashes)
        router.figures_when(
            lambda figures: worker.name in figures.workers and figures.indexed_blocks >= before + len(hashes)
        )
        return worker

    def close(self) -> None:
        for each in reversed(self._open):
            each.close()

    def _keep(self, opened: T) -> T:
        self._open.append(opened)
        return opened


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    stage = Stage(run_dir, tmp_path)
    yield stage
    stage.close()
