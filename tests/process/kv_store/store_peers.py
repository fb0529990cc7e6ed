"""A real store under the supervisor's end of its status socket, and workers that talk to it in plain messages."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dynamo_box.paths import RunDir
from dynamo_box.protocol import PROTOCOL_VERSION, kv, status
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.figures import KvStoreFigures
from dynamo_box.protocol.framing import STATUS_FD_VARIABLE, BlockingChannel, connect_unix
from dynamo_box.protocol.spec import EVENTS_SUFFIX, KvStoreSpec

MIB = 1024 * 1024
DEADLINE_S = 120.0
BLOCK_BYTES = 5000
"""Not a whole number of pages: slots are longer than blocks."""
LAYOUT = kv.KvLayout("sha256:m", "float32", 16, BLOCK_BYTES, "layers=1,kv=2,tokens=16,heads=1,dim=39")

T = TypeVar("T")


def digest(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(8)


def chain(*numbers: int, priority: int | None = None, after: int | None = None) -> tuple[kv.Block, ...]:
    """Blocks that follow each other."""
    parents = [b"" if after is None else digest(after), *(digest(number) for number in numbers)]
    return tuple(kv.Block(digest(number), parent, priority) for number, parent in zip(numbers, parents, strict=False))


def digests(*numbers: int) -> tuple[bytes, ...]:
    return tuple(digest(number) for number in numbers)


def content(number: int) -> bytes:
    """What the tests store as block `number`."""
    return bytes((number * 31 + place * 7 + 1) % 256 for place in range(256)) * (BLOCK_BYTES // 256 + 1)


def room_for(slots: int, layout: kv.KvLayout = LAYOUT) -> int:
    """Bytes of an arena with so many slots."""
    return kv.arena_headers_bytes(slots) + slots * layout.slot_bytes


class Store:
    """`changes` are fields of the spec."""

    def __init__(self, tmp_path: Path, **changes: Any) -> None:
        self.run = RunDir(tmp_path / "run")
        self.run.create()
        self.path = self.run.worker_socket("kvstore")
        self.events_path = self.run.worker_socket("kvstore" + EVENTS_SUFFIX)
        self.spec = msgspec.structs.replace(KvStoreSpec("kvstore", str(self.run.root), 4 * MIB), **changes)
        self.log = tmp_path / "kvstore.log"
        self.peers: list[Any] = []
        self.number = 0
        self.start()

    def start(self, wrapper: Sequence[str] = ()) -> None:
        self.launch(wrapper)
        self.status.send(status.Start(self.spec))
        self.ready = self.expect(status.Ready)

    def launch(self, wrapper: Sequence[str] = ()) -> None:
        """A process that hasn't been told what to do."""
        ours, theirs = socket.socketpair()
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "dynamo_box.kv.store"],
                env={**os.environ, STATUS_FD_VARIABLE: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )
        theirs.close()
        self.status: BlockingChannel[status.ChildMessage] = BlockingChannel(ours, status.child_decoder)
        self.figures: KvStoreFigures | None = None
        self.notes: list[str] = []

    def expect(self, kind: type[T], fits: Callable[[T], bool] = lambda _message: True) -> T:
        """The next message of this kind that fits."""
        give_up_at = time.monotonic() + DEADLINE_S
        while True:
            try:
                message = self.status.receive(max(0.0, give_up_at - time.monotonic()))
            except (TimeoutError, ConnectionResetError) as error:
                raise AssertionError(f"{error}; last figures {self.figures}\n{self.log.read_text()}") from None
            assert message is not None, f"the store has closed its status socket:\n{self.log.read_text()}"
            if isinstance(message, status.Report):
                assert isinstance(message.figures, KvStoreFigures)
                self.figures = message.figures
            elif isinstance(message, status.Note):
                self.notes.append(message.text)
            if isinstance(message, kind) and fits(message):
                return message

    def figures_when(self, fits: Callable[[KvStoreFigures], bool]) -> KvStoreFigures:
        """The next figures that fit, or the last ones taken in: those that haven't been may be older than this call."""
        if self.figures is None or not fits(self.figures):
            self.expect(status.Report, lambda report: fits(report.figures))  # type: ignore[arg-type]
        assert self.figures is not None
        return self.figures

    def set(self, key: str, value: str) -> status.Answer:
        self.number += 1
        self.status.send(status.Set(self.number, key, value))
        return self.expect(status.Answer, lambda answer: answer.id == self.number)

    def worker(self, owner: str = "w1", layout: kv.KvLayout = LAYOUT) -> Worker:
        """Attached."""
        worker = Worker(self, owner)
        worker.attach(layout)
        return worker

    def ends(self) -> int:
        """Its exit status, once it has ended by itself."""
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        self.status.close()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        self.status.close()


class Worker:
    """A connection of this process."""

    def __init__(self, store: Store, owner: str = "w1") -> None:
        self.owner = owner
        self.number = 0
        self.arena: mmap.mmap | None = None
        self.attached = kv.Attached(0, 0, 0, 0)
        self.channel: BlockingFdChannel[kv.StoreReply] = BlockingFdChannel(connect_unix(store.path), kv.reply_decoder)
        store.peers.append(self)

    def send(self, message: Any) -> None:
        self.channel.send(message)

    def receive(self) -> Any:
        got = self.channel.receive(DEADLINE_S)
        assert got is not None, "the store has closed the connection"
        message, descriptors = got
        if isinstance(message, kv.Attached):
            self.arena = mmap.mmap(descriptors[0], message.arena_bytes) if message.slots else None
        for descriptor in descriptors:
            os.close(descriptor)
        return message

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()

    def refusal(self, message: Any) -> kv.Refused:
        """What the store says to it before it closes the connection."""
        self.send(message)
        answer = self.receive()
        assert isinstance(answer, kv.Refused), answer
        assert self.channel.receive(DEADLINE_S) is None
        return answer

    def attach(self, layout: kv.KvLayout = LAYOUT) -> kv.Attached:
        answer = self.ask(kv.Attach(PROTOCOL_VERSION, self.owner, layout))
        assert isinstance(answer, kv.Attached), answer
        self.attached = answer
        return answer

    def _id(self) -> int:
        self.number += 1
        return self.number

    def reserve(self, *blocks: kv.Block) -> tuple[int, ...]:
        answer = self.ask(kv.Reserve(self._id(), blocks))
        assert isinstance(answer, kv.Reserved) and answer.id == self.number, answer
        return answer.slots

    def commit(self, *slots: int) -> kv.Committed:
        answer = self.ask(kv.Commit(self._id(), slots))
        assert isinstance(answer, kv.Committed) and answer.id == self.number, answer
        return answer

    def store(self, *blocks: kv.Block) -> tuple[int, ...]:
        """Reserve, fill with their contents and commit; all must be new."""
        slots = self.reserve(*blocks)
        assert min(slots) >= 0, slots
        for block, slot in zip(blocks, slots, strict=True):
            self.fill(slot, content(int.from_bytes(block.digest[:8], "big")))
        assert not self.commit(*slots).lost
        return slots

    def find(self, *numbers: int) -> kv.Found:
        answer = self.ask(kv.Find(self._id(), digests(*numbers)))
        assert isinstance(answer, kv.Found) and answer.id == self.number, answer
        return answer

    def found(self, *numbers: int) -> str:
        """The tiers of what is found; the lease is given back."""
        answer = self.find(*numbers)
        if answer.lease:
            self.send(kv.Release(answer.lease))
        return answer.tiers

    def load(self, lease: int, start: int, count: int) -> kv.Loaded:
        answer = self.ask(kv.Load(self._id(), lease, start, count))
        assert isinstance(answer, kv.Loaded) and answer.id == self.number, answer
        return answer

    def fill(self, slot: int, data: bytes) -> None:
        assert self.arena is not None
        start = self._start(slot)
        self.arena[start : start + BLOCK_BYTES] = data[:BLOCK_BYTES]

    def read(self, slot: int) -> bytes:
        assert self.arena is not None
        return self.arena[self._start(slot) : self._start(slot) + BLOCK_BYTES]

    def header(self, slot: int) -> bytes:
        assert self.arena is not None
        return self.arena[slot * kv.HEADER_BYTES : (slot + 1) * kv.HEADER_BYTES]

    def _start(self, slot: int) -> int:
        return self.attached.headers_bytes + slot * self.attached.slot_bytes

    def close(self) -> None:
        self.channel.close()
        if self.arena is not None:
            self.arena.close()
            self.arena = None
