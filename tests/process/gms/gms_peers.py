"""A service of weight memory under a supervisor's ends of its two sockets, and engines that talk to it."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dynamo_box.paths import RunDir
from dynamo_box.protocol import PROTOCOL_VERSION, gms, status
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.figures import GmsFigures, LayoutFigures
from dynamo_box.protocol.framing import STATUS_FD_VARIABLE, BlockingChannel, connect_unix
from dynamo_box.protocol.spec import GmsSpec

MIB = 1024 * 1024
DEADLINE_S = 90.0

T = TypeVar("T")


class Service:
    """One box's weight memory: lives of the service, one after the other, and what the supervisor keeps for them."""

    def __init__(self, tmp_path: Path, **changes: Any) -> None:
        run = RunDir(tmp_path / "run")
        run.create()
        self.path = run.worker_socket("gms@cpu")
        self.snapshots = tmp_path / "snapshots"
        spec = GmsSpec("gms@cpu", str(run.root), "cpu", 64 * MIB, 64 * MIB, str(self.snapshots), ("m", "other"))
        self.spec = msgspec.structs.replace(spec, **changes)
        self.log = tmp_path / "gms.log"
        self.kept: dict[str, tuple[gms.EpochRecord, list[int]]] = {}
        self.keeps_answers = True
        self.number = 0
        self.engines: list[Engine] = []
        self.start()

    def start(self, *, ready: bool = True, environment: dict[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        keeper, their_keeper = socket.socketpair()
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dynamo_box.gms"],
                env={
                    **os.environ,
                    STATUS_FD_VARIABLE: str(theirs.fileno()),
                    gms.KEEPER_FD_VARIABLE: str(their_keeper.fileno()),
                    **(environment or {}),
                },
                pass_fds=[theirs.fileno(), their_keeper.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )
        theirs.close()
        their_keeper.close()
        self.status: BlockingChannel[status.ChildMessage] = BlockingChannel(ours, status.child_decoder)
        self.keeper: BlockingFdChannel[gms.KeeperRequest] = BlockingFdChannel(keeper, gms.keeper_request_decoder)
        self.messages: list[status.ChildMessage] = []
        self.parts: list[int] = []
        self.figures: GmsFigures | None = None
        self.status.send(status.Start(self.spec))
        for record, descriptors in self.kept.values():
            step = gms.MAX_DESCRIPTORS
            for start in range(0, max(len(descriptors), 1), step):
                part = descriptors[start : start + step]
                self.keeper.send(gms.Adopt(record, start + step < len(descriptors), len(part)), part)
        self.keeper.send(gms.Adopted())
        if ready:
            self.expect(status.Ready)

    def pump(self, timeout_s: float) -> None:
        """Answer the keeper, collect what the status socket brings; returns once something came."""
        readable, _, _ = select.select([self.status, self.keeper], [], [], timeout_s)
        if self.keeper in readable:
            got = self.keeper.receive(DEADLINE_S)
            if got is not None:
                self._keep(*got)
            elif self.status not in readable:
                readable, _, _ = select.select([self.status], [], [], timeout_s)
        if self.status in readable:
            message = self.status.receive(DEADLINE_S)
            assert message is not None, f"the service has closed its status socket:\n{self.log.read_text()}"
            self.messages.append(message)
            if isinstance(message, status.Report):
                assert isinstance(message.figures, GmsFigures)
                self.figures = message.figures

    def _keep(self, message: gms.KeeperRequest, descriptors: list[int]) -> None:
        if isinstance(message, gms.Forget):
            self._let_go(message.layout)
        else:
            self.parts += descriptors
            if message.more:
                return
            self._let_go(message.record.layout)
            self.kept[message.record.layout] = (message.record, self.parts)
            self.parts = []
        if self.keeps_answers:
            self.keeper.send(gms.Kept(message.number))

    def _let_go(self, layout: str) -> None:
        for descriptor in self.kept.pop(layout, (None, []))[1]:
            os.close(descriptor)

    def pump_until(self, true: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + DEADLINE_S
        while not true():
            left = give_up_at - time.monotonic()
            assert left > 0, f"in vain; last figures {self.figures}\n{self.log.read_text()}"
            self.pump(left)

    def expect(self, kind: type[T], fits: Callable[[T], bool] = lambda _message: True) -> T:
        """The first message of this kind that fits; it is taken, and what came before is dropped."""
        found: list[T] = []

        def came() -> bool:
            while self.messages and not found:
                message = self.messages.pop(0)
                if isinstance(message, kind) and fits(message):
                    found.append(message)
            return bool(found)

        self.pump_until(came)
        return found[0]

    def layout(self, fits: Callable[[LayoutFigures], bool] = lambda _: True, name: str = "m") -> LayoutFigures:
        """Its figures as soon as they fit."""

        def now() -> list[LayoutFigures]:
            return [one for one in (self.figures.layouts if self.figures else ()) if one.name == name and fits(one)]

        self.pump_until(lambda: bool(now()))
        return now()[0]

    def figures_when(self, fits: Callable[[GmsFigures], bool]) -> GmsFigures:
        self.pump_until(lambda: self.figures is not None and fits(self.figures))
        assert self.figures is not None
        return self.figures

    def move(self, place: gms.Place, layout: str = "m") -> status.Moved:
        self.number += 1
        self.status.send(status.Move(self.number, layout, place))
        return self.expect(status.Moved, lambda moved: moved.id == self.number)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        self._drain_keeper()
        self.status.close()
        self.keeper.close()

    def _drain_keeper(self) -> None:
        """What it had sent before it died has arrived, and counts."""
        self.keeps_answers, before = False, self.keeps_answers
        try:
            while (got := self.keeper.receive(DEADLINE_S)) is not None:
                self._keep(*got)
        except OSError:
            pass  # it died in the middle of something
        self.keeps_answers = before

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def engine(self, owner: str = "w1") -> Engine:
        engine = Engine(self, owner)
        self.engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        self.status.close()
        self.keeper.close()
        for layout in list(self.kept):
            self._let_go(layout)


class Engine:
    """A connection of this process. The service's keeper is answered while an answer is awaited."""

    def __init__(self, service: Service, owner: str) -> None:
        self.service = service
        self.owner = owner
        self.channel: BlockingFdChannel[gms.ServerMessage] = BlockingFdChannel(
            connect_unix(service.path), gms.server_decoder
        )

    def send(self, message: Any) -> None:
        self.channel.send(message)

    def receive(self) -> tuple[Any, list[int]]:
        give_up_at = time.monotonic() + DEADLINE_S
        while time.monotonic() < give_up_at:
            try:
                got = self.channel.receive(0.005)
            except TimeoutError:
                self.service.pump(0.005)
                continue
            assert got is not None, "the service has closed the connection"
            if not isinstance(got[0], gms.Queued):
                return got
        raise AssertionError("no answer")

    def ask(self, message: Any) -> Any:
        self.send(message)
        answer, descriptors = self.receive()
        assert not descriptors
        return answer

    def acquire(self, lock: gms.Lock, **changes: Any) -> Any:
        return self.ask(self.request(lock, **changes))

    def request(self, lock: gms.Lock, **changes: Any) -> gms.Acquire:
        fields: dict[str, Any] = {"layout": "m", "content": "c"}
        return gms.Acquire(PROTOCOL_VERSION, self.owner, lock=lock, **{**fields, **changes})

    def allocate(self, *sizes: int) -> tuple[tuple[gms.Allocation, ...], list[int]]:
        self.send(gms.Allocate(sizes))
        answer, descriptors = self.receive()
        assert isinstance(answer, gms.Allocated), answer
        return answer.allocations, descriptors

    def write(self, *contents: bytes, names: str = "t") -> gms.Granted:
        """Allocate, fill, describe and commit; the lock must be rw."""
        allocations, descriptors = self.allocate(*(len(content) for content in contents))
        for descriptor, content in zip(descriptors, contents, strict=True):
            with mmap.mmap(descriptor, len(content)) as mapped:
                mapped[:] = content
            os.close(descriptor)
        entries = tuple(
            gms.Entry(f"{names}{one.id}", one.id, 0, "u8", (len(content),), (1,), len(content))
            for one, content in zip(allocations, contents, strict=True)
        )
        assert self.ask(gms.Put(entries)) == gms.Done()
        granted = self.ask(gms.Commit())
        assert isinstance(granted, gms.Granted), granted
        return granted

    def export(self) -> list[int]:
        manifest = self.ask(gms.Describe())
        assert isinstance(manifest, gms.Manifest), manifest
        ids = tuple(one.id for one in manifest.allocations)
        self.send(gms.Export(ids))
        answer, descriptors = self.receive()
        assert isinstance(answer, gms.Exported), answer
        return descriptors

    def read(self) -> list[bytes]:
        """The bytes of every allocation; the lock must be ro."""
        found = []
        for descriptor in self.export():
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
                found.append(mapped[:])
            os.close(descriptor)
        return found

    def close(self) -> None:
        self.channel.close()


def patterns(*mebibytes: int, seed: int = 1) -> list[bytes]:
    """Contents that differ from each other and from zeroes in each piece of 64 KiB."""
    piece = 64 * 1024
    return [
        b"".join(
            (seed * 1_000_003 + number * 10_007 + at).to_bytes(8, "little") * (piece // 8)
            for at in range(size * MIB // piece)
        )
        for number, size in enumerate(mebibytes)
    ]


__all__ = ["DEADLINE_S", "MIB", "Engine", "Service", "patterns"]
