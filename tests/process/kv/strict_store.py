"""A kvstore on threads of the test's own, for what no real one can be made to do at a given moment. It refuses what the
real one refuses: slots that aren't the connection's, leases that it didn't give, calls without an Attach.

`script` sees each request before it is answered and may wait, raise `HangUp`, or return something else to answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.framing import FrameError, listen_unix
from dynamo_box.protocol.kv import (
    BUSY,
    FULL,
    HEADER_BYTES,
    KNOWN,
    MAX_BATCH,
    Abandon,
    Attach,
    Attached,
    Block,
    Commit,
    Committed,
    Distrust,
    Find,
    Found,
    KvLayout,
    Load,
    Loaded,
    Refused,
    Release,
    Reserve,
    Reserved,
    arena_headers_bytes,
    pack_header,
    request_decoder,
)

DEADLINE_S = 120.0
SILENCE = object()
"""What a script returns for: answer nothing."""


class HangUp(Exception):
    """The connection ends here."""


def as_it_is(request: Any) -> Any:
    """A script that changes nothing."""
    return None


@dataclass(frozen=True)
class Held:
    slot: int
    generation: int
    block: Block


@dataclass
class Peer:
    """One connection."""

    channel: BlockingFdChannel[Any]
    attached: bool = False
    reserved: dict[int, Block] = field(default_factory=dict)
    leases: dict[int, list[bytes]] = field(default_factory=dict)


class StrictStore:
    """`disk` has blocks that are on disk only; a Load brings them into free slots. Nothing is evicted."""

    def __init__(
        self,
        path: Path,
        layout: KvLayout,
        slots: int = 64,
        script: Callable[[Any], Any] = as_it_is,
    ) -> None:
        self.path, self.layout, self.slots, self.script = path, layout, slots, script
        self.headers_bytes = arena_headers_bytes(slots)
        self.arena_bytes = self.headers_bytes + slots * layout.slot_bytes
        self.fd = os.memfd_create("strict-arena", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.arena_bytes)
        self.inode = os.fstat(self.fd).st_ino
        self.held: dict[bytes, Held] = {}
        self.disk: dict[bytes, bytes] = {}
        self.loaded_to: dict[bytes, int] = {}
        self.free = list(range(slots))
        self.last_generation = self.last_lease = 0
        self.seen: list[Any] = []
        self.faults: list[str] = []
        self.guard = threading.Condition()
        self.listener = listen_unix(path)
        self.listener.setblocking(True)
        self.here = threading.local()
        self.peers: list[Peer] = []
        self.sockets: list[socket.socket] = []
        self.closing = False
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def close(self) -> None:
        """Die: no goodbye on any connection. What it was asked to do and shouldn't have been fails the test here."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        with self.guard:
            self.closing = True
            for one in self.sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self.guard.notify_all()
        for thread in self.threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        self.listener.close()
        os.close(self.fd)
        assert self.faults == []

    def wait_for(self, kind: type, count: int = 1) -> list[Any]:
        """The first `count` requests of this kind, once they came."""
        with self.guard:
            assert self.guard.wait_for(lambda: len(self.of(kind)) >= count, DEADLINE_S), f"{kind.__name__} didn't come"
            return self.of(kind)[:count]

    def of(self, kind: type) -> list[Any]:
        return [one for one in self.seen if isinstance(one, kind)]

    def put(self, block: Block, data: bytes) -> int:
        """As if a worker had stored it."""
        with self.guard:
            slot = self.free.pop(0)
            self._write(slot, data)
            self._hold(slot, block)
            return slot

    def overwrite_header(self, slot: int, header: bytes = bytes(HEADER_BYTES)) -> None:
        os.pwrite(self.fd, header, slot * HEADER_BYTES)

    def read(self, digest: bytes) -> bytes:
        offset = self.headers_bytes + self.held[digest].slot * self.layout.slot_bytes
        return os.pread(self.fd, self.layout.block_bytes, offset)

    def answer(self, request: Any) -> Any:
        """The right one, for a script."""
        with self.guard:
            return self._answer(self.here.peer, request)

    def later(self, request: Any) -> Callable[[], None]:
        """For a script: what gives the right answer, once it is called."""
        peer = self.here.peer

        def answer() -> None:
            with self.guard:
                peer.channel.send(self._answer(peer, request))

        return answer

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with self.guard:
                if self.closing:
                    sock.close()
                    return
                self.sockets.append(sock)
            self.threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
            self.threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with BlockingFdChannel(sock, request_decoder) as channel:
            peer = self.here.peer = Peer(channel)
            with self.guard:
                self.peers.append(peer)
            try:
                while (came := channel.receive()) is not None:
                    self._take(peer, came[0])
            except (HangUp, FrameError, OSError):
                pass
            except AssertionError as error:
                self.faults.append(f"{type(error).__name__}: {error}")
        with self.guard:
            self.peers.remove(peer)
            self.free += peer.reserved

    def _take(self, peer: Peer, request: Any) -> None:
        with self.guard:
            self.seen.append(request)
            self.guard.notify_all()
        answer = self.script(request)
        if answer is SILENCE:
            return
        if answer is None:
            answer = self.answer(request)
        if answer is not None:
            peer.channel.send(answer, (self.fd,) if getattr(answer, "descriptors", 0) else ())
        if isinstance(answer, Refused):
            raise HangUp

    def _answer(self, peer: Peer, request: Any) -> Any:
        assert peer.attached != isinstance(request, Attach), f"{request} out of turn"
        match request:
            case Attach(version, _, layout):
                assert version == PROTOCOL_VERSION
                peer.attached = True
                if layout != self.layout:
                    return Refused("another layout", permanent=True)
                return Attached(self.slots, layout.slot_bytes, self.headers_bytes, self.arena_bytes)
            case Reserve(number, blocks):
                assert 0 < len(blocks) <= MAX_BATCH
                return Reserved(number, tuple(self._reserve(peer, block) for block in blocks))
            case Commit(number, slots):
                assert slots and set(slots) <= set(peer.reserved), f"{slots} are not this connection's"
                for slot in slots:
                    self._hold(slot, peer.reserved.pop(slot))
                return Committed(number, tuple(self.last_generation - len(slots) + 1 + n for n in range(len(slots))))
            case Abandon(slots):
                assert slots and set(slots) <= set(peer.reserved)
                for slot in slots:
                    del peer.reserved[slot]
                    self.free.append(slot)
            case Find(number, digests):
                assert 0 < len(digests) <= MAX_BATCH
                return self._find(peer, number, digests)
            case Load(number, lease, start, count):
                if lease not in peer.leases:
                    return Loaded(number, (), (), 0.0, "no such lease")
                return self._load(number, peer.leases[lease][start : start + count], count)
            case Release(lease, loaded, failed, wasted):
                leased = peer.leases.pop(lease, None)
                assert leased is not None, f"lease {lease} was not given, or was released before"
                assert sum([*loaded.values(), *failed.values(), *wasted.values()]) == len(leased)
            case Distrust(slots):
                for held in [one for one in self.held.values() if one.slot in slots]:
                    del self.held[held.block.digest]
        return None

    def _reserve(self, peer: Peer, block: Block) -> int:
        if block.digest in self.held or block.digest in self.disk:
            return KNOWN
        if any(block.digest == other.digest for one in self.peers for other in one.reserved.values()):
            return BUSY
        if not self.free:
            return FULL
        slot = self.free.pop(0)
        peer.reserved[slot] = block
        return slot

    def _find(self, peer: Peer, number: int, digests: tuple[bytes, ...]) -> Found:
        found = []
        for digest in digests:
            if digest not in self.held and digest not in self.disk:
                break
            found.append(digest)
        if not found:
            return Found(number, 0, "")
        self.last_lease += 1
        peer.leases[self.last_lease] = found
        held = [self.held.get(digest) for digest in found]
        return Found(
            number,
            self.last_lease,
            "".join("2" if one else "3" for one in held),
            tuple(one.slot if one else -1 for one in held),
            tuple(one.generation if one else 0 for one in held),
            tuple(one.block.priority if one else None for one in held),
        )

    def _load(self, number: int, digests: list[bytes], count: int) -> Loaded:
        assert len(digests) == count
        assert all(digest in self.disk for digest in digests)
        loaded: list[Held] = []
        for digest in digests:
            if not self.free:
                break
            slot = self.free.pop(0)
            self._write(slot, self.disk[digest])
            self.last_generation += 1
            loaded.append(Held(slot, self.last_generation, Block(digest)))
            self.loaded_to[digest] = slot
            self.overwrite_header(slot, pack_header(self.last_generation, digest, b"", None))
        error = "" if len(loaded) == count else "no free slot"
        return Loaded(number, tuple(one.slot for one in loaded), tuple(one.generation for one in loaded), 0.0, error)

    def _hold(self, slot: int, block: Block) -> None:
        self.last_generation += 1
        self.held[block.digest] = Held(slot, self.last_generation, block)
        self.overwrite_header(slot, pack_header(self.last_generation, block.digest, block.parent, block.priority))

    def _write(self, slot: int, data: bytes) -> None:
        os.pwrite(self.fd, data, self.headers_bytes + slot * self.layout.slot_bytes)


def replace(message: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(message, **changes)
