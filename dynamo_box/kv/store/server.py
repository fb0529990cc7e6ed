"""Workers' connections, and what they ask for. What comes of it is in `layout.py`.

Answers carry the number of their question, so that what waits for memory or the disk holds up nothing else.

A slot that a connection was filling when it ended is free at once if the worker ended it, since its copies are over
then: it died, or it closes only after them. If it was the store that ended it, the worker may still be copying into the
slot; it stays out of use until that process is gone, or attaches again, which it does only after its copies.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_box.accepting import Acceptor
from dynamo_box.kv.store.counts import Counts
from dynamo_box.kv.store.layout import LayoutStore
from dynamo_box.kv.store.layouts import Layouts, NoRoom, OtherKind
from dynamo_box.log import get_logger
from dynamo_box.protocol import PROTOCOL_VERSION, kv
from dynamo_box.protocol.descriptors import FdChannel
from dynamo_box.protocol.framing import peer_pid, peer_uid
from dynamo_box.protocol.kv import MAX_BATCH, MAX_CONNECTIONS, KvLayout

MAX_FRAME = 1024 * 1024
MAX_WAITING = 1024
"""Questions of one connection that wait for memory or the disk."""
MAX_LEASES = 4096
"""Of one connection; to one that has them nothing is found."""
MAX_BACKLOG = 4 * 1024 * 1024
MAX_TEXT = 512
MAX_BLOCK_BYTES = 2**36

Channel = FdChannel[kv.WorkerRequest]

log = get_logger()


class BadRequest(Exception):
    """The connection is answered with Refused and closed."""

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


@dataclass(eq=False)
class _Peer:
    """One connection. `store` is what it is attached to. `ended_here`: the store ends it."""

    id: int
    channel: Channel
    pid: int
    owner: str = ""
    store: LayoutStore | None = None
    attaching: bool = False
    ended_here: bool = False
    leases: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass(eq=False)
class _Quarantine:
    """Slots of a connection that the store ended, while its process lives. `pidfd` is -1 if it can't be watched."""

    pid: int
    pidfd: int
    owner: int
    store: LayoutStore
    slots: list[int]


class KvServer:
    """`changed()` is called whenever figures may be others than before."""

    def __init__(self, layouts: Layouts, counts: Counts, changed: Callable[[], None]) -> None:
        self._layouts = layouts
        self._counts = counts
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._peers: dict[int, _Peer] = {}
        self._ids = itertools.count(1)  # 0 is layout.STORE
        self._acceptor = Acceptor(self._open)
        self._quarantined: set[_Quarantine] = set()

    # Life

    @property
    def connections(self) -> int:
        return len(self._peers)

    def listen(self, sock: socket.socket) -> None:
        self._acceptor.listen(sock)

    def stop_listening(self) -> None:
        self._acceptor.close()

    async def close(self) -> None:
        self.stop_listening()
        tasks = [task for peer in self._peers.values() for task in peer.tasks]
        for task in tasks:
            task.cancel()
        for peer in self._peers.values():
            peer.channel.close()
        self._peers.clear()
        for quarantine in list(self._quarantined):
            self._lift(quarantine)
        await asyncio.gather(*tasks, return_exceptions=True)

    # Connections

    def _open(self, sock: socket.socket) -> None:
        if peer_uid(sock) != os.getuid():
            log.warning("a connection of another user is refused", uid=peer_uid(sock))
            sock.close()
            return
        id_ = next(self._ids)
        channel: Channel = FdChannel(
            sock,
            kv.request_decoder,
            lambda _channel, message, _fds: self._on_message(id_, message),
            lambda _channel, reason: self._on_close(id_, reason),
            max_frame=MAX_FRAME,
            max_backlog=MAX_BACKLOG,
        )
        peer = self._peers[id_] = _Peer(id_, channel, peer_pid(sock))
        if len(self._peers) > MAX_CONNECTIONS:
            self._refuse(peer, BadRequest(f"{MAX_CONNECTIONS} connections are the most"))
        self._changed()

    def _on_close(self, id_: int, reason: Exception | None) -> None:
        peer = self._peers.pop(id_, None)
        if peer is None:
            return
        if reason is not None:
            log.warning("a connection is closed", owner=peer.owner, pid=peer.pid, reason=str(reason))
        for task in peer.tasks:
            task.cancel()
        if peer.store is not None:
            ended_here = peer.ended_here or reason is not None
            slots = peer.store.end(peer.id, may_still_write=ended_here)
            if slots:
                self._quarantine(peer, peer.store, slots)
        self._changed()

    def _refuse(self, peer: _Peer, refusal: BadRequest) -> None:
        log.warning("a connection is refused", owner=peer.owner, pid=peer.pid, reason=str(refusal))
        self._counts.refused += 1
        peer.ended_here = True
        peer.channel.send(kv.Refused(str(refusal), refusal.permanent))
        peer.channel.close()

    def _quarantine(self, peer: _Peer, store: LayoutStore, slots: list[int]) -> None:
        try:
            pidfd = os.pidfd_open(peer.pid) if peer.pid else -1
        except ProcessLookupError:
            store.abandon(peer.id, slots)
            return
        except OSError as error:
            log.warning("slots stay out of use until their writer attaches again", pid=peer.pid, error=str(error))
            pidfd = -1
        quarantine = _Quarantine(peer.pid, pidfd, peer.id, store, slots)
        self._quarantined.add(quarantine)
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._lift, quarantine)

    def _lift(self, quarantine: _Quarantine) -> None:
        self._quarantined.discard(quarantine)
        if quarantine.pidfd >= 0:
            self._loop.remove_reader(quarantine.pidfd)
            os.close(quarantine.pidfd)
        quarantine.store.abandon(quarantine.owner, quarantine.slots)
        self._changed()

    # Messages

    def _on_message(self, id_: int, message: kv.WorkerRequest) -> None:
        peer = self._peers.get(id_)
        if peer is None or peer.ended_here:
            return
        self._counts.requests += 1
        try:
            self._handle(peer, message)
        except BadRequest as refusal:
            self._refuse(peer, refusal)
        self._changed()

    def _handle(self, peer: _Peer, message: kv.WorkerRequest) -> None:
        if isinstance(message, kv.Attach):
            _check_attach(peer, message)
            peer.attaching = True
            peer.owner = message.owner
            self._in_background(peer, self._attach(peer, message.layout))
            return
        store = peer.store
        if store is None:
            raise BadRequest(f"{type(message).__name__} came before the answer to Attach")
        match message:
            case kv.Reserve():
                _check_blocks(message.blocks)
                if store.must_grow(len(message.blocks)):
                    self._in_background(peer, self._reserve_with_room(peer, store, message))
                else:
                    peer.channel.send(store.reserve(peer.id, message))
            case kv.Commit():
                _check_slots(store, message.slots)
                peer.channel.send(store.commit(peer.id, message))
            case kv.Abandon():
                _check_slots(store, message.slots)
                store.abandon(peer.id, message.slots)
            case kv.Find():
                _check_digests(message.digests)
                _check_key(message.claim)
                if peer.leases >= MAX_LEASES:
                    log.warning("a connection has all the leases it may have", owner=peer.owner)
                    peer.channel.send(kv.Found(message.id, 0, ""))
                else:
                    found = store.find(peer.id, message)
                    peer.leases += found.lease > 0
                    peer.channel.send(found)
            case kv.Hold():
                _check_hold(message)
                peer.channel.send(store.hold(message))
            case kv.Load():
                self._in_background(peer, self._load(peer, store, _checked_load(store, peer, message)))
            case kv.Release():
                _check_counts(message)
                peer.leases -= store.release(peer.id, message)
            case kv.Distrust():
                _check_slots(store, message.slots)
                store.distrust(message.slots)

    def _in_background(self, peer: _Peer, work: Coroutine[Any, Any, None]) -> None:
        if len(peer.tasks) >= MAX_WAITING:
            work.close()
            raise BadRequest(f"over {MAX_WAITING} questions without waiting for an answer")
        task = self._loop.create_task(self._finish(peer, work))
        peer.tasks.add(task)
        task.add_done_callback(peer.tasks.discard)

    async def _finish(self, peer: _Peer, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BadRequest as refusal:
            self._refuse(peer, refusal)
        except Exception as error:
            # A fault of ours: whoever waits for the answer must not wait for ever, and others are served on.
            log.exception("a request failed")
            self._refuse(peer, BadRequest(f"{type(error).__name__}: {error}"))
        self._changed()

    async def _attach(self, peer: _Peer, layout: KvLayout) -> None:
        for quarantine in [each for each in self._quarantined if each.pid == peer.pid]:
            self._lift(quarantine)
        try:
            store = await self._layouts.attach(layout, peer.id, peer.owner)
        except NoRoom as error:
            raise BadRequest(str(error)) from error
        except OtherKind as error:
            raise BadRequest(str(error), permanent=True) from error
        peer.store = store
        arena = store.arena
        peer.channel.send(kv.Attached(arena.slots, arena.stride, arena.headers_bytes, arena.bytes, 1), [arena.fd])

    async def _reserve_with_room(self, peer: _Peer, store: LayoutStore, message: kv.Reserve) -> None:
        await store.make_room(len(message.blocks))
        if peer.channel.is_open:
            peer.channel.send(store.reserve(peer.id, message))

    async def _load(self, peer: _Peer, store: LayoutStore, message: kv.Load) -> None:
        peer.channel.send(await store.load(peer.id, message))


def _check_attach(peer: _Peer, message: kv.Attach) -> None:
    layout = message.layout
    if message.version != PROTOCOL_VERSION:
        raise BadRequest(f"this store speaks version {PROTOCOL_VERSION}, not {message.version}", permanent=True)
    if peer.attaching:
        raise BadRequest("a connection attaches once")
    if max(len(text) for text in (message.owner, layout.fingerprint, layout.kv_dtype, layout.shape)) > MAX_TEXT:
        raise BadRequest(f"a text in Attach is over {MAX_TEXT} characters", permanent=True)
    if not 0 < layout.block_bytes <= MAX_BLOCK_BYTES or layout.block_size <= 0:
        raise BadRequest(
            f"a layout with {layout.block_bytes} bytes and {layout.block_size} tokens a block can't be", permanent=True
        )


def _check_length(count: int) -> None:
    if count > MAX_BATCH:
        raise BadRequest(f"a batch of {count} is over the cap of {MAX_BATCH}")


def _check_digests(digests: Sequence[bytes]) -> None:
    _check_length(len(digests))
    if any(len(digest) != kv.DIGEST_BYTES for digest in digests):
        raise BadRequest(f"a digest has {kv.DIGEST_BYTES} bytes")


def _check_key(key: bytes) -> None:
    if key and len(key) != kv.DIGEST_BYTES:
        raise BadRequest(f"the key of a hold has {kv.DIGEST_BYTES} bytes, not {len(key)}")


def _check_hold(message: kv.Hold) -> None:
    _check_digests(message.digests)
    _check_key(message.key)
    if not message.key or not message.digests:
        raise BadRequest("a hold has a key and blocks")
    if not 0 < message.ttl_s <= kv.LONGEST_HOLD_S:  # false for NaN
        raise BadRequest(f"ttl_s of a hold is above 0 and at most {kv.LONGEST_HOLD_S:g}, not {message.ttl_s}")


def _check_blocks(blocks: Sequence[kv.Block]) -> None:
    _check_digests([block.digest for block in blocks])
    _check_digests([block.parent for block in blocks if block.parent])
    for block in blocks:
        if block.priority is not None and not kv.LOWEST_PRIORITY <= block.priority <= kv.HIGHEST_PRIORITY:
            raise BadRequest(f"a priority is from {kv.LOWEST_PRIORITY} to {kv.HIGHEST_PRIORITY}, not {block.priority}")


def _check_slots(store: LayoutStore, slots: Sequence[int]) -> None:
    _check_length(len(slots))
    if slots and not 0 <= min(slots) <= max(slots) < store.arena.slots:
        raise BadRequest(f"slots are from 0 to {store.arena.slots - 1}; got {min(slots)} to {max(slots)}")


def _checked_load(store: LayoutStore, peer: _Peer, message: kv.Load) -> kv.Load:
    _check_length(message.count)
    lease = store.tier.lease_of(peer.id, message.lease)
    end = message.start + message.count
    if message.start < 0 or message.count < 0 or (lease is not None and end > len(lease.digests)):
        raise BadRequest(f"blocks {message.start} to {end} are not in lease {message.lease}")
    return message


def _check_counts(message: kv.Release) -> None:
    for counts in (message.loaded, message.failed, message.wasted):
        if any(not 0 <= count <= MAX_BATCH for count in counts.values()):
            raise BadRequest(f"a lease has from 0 to {MAX_BATCH} blocks of a tier")
