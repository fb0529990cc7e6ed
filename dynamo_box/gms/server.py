"""Engines' connections, and what they ask for. Decisions are in `layout.py`, bytes in `places.py`; here both meet.

One connection is served one message at a time: what comes while an answer is due waits, within bounds.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from dynamo_box.accepting import Acceptor
from dynamo_box.gms.copying import MoveFailed, OutOfMemory
from dynamo_box.gms.keeping import Keeper, NotKept
from dynamo_box.gms.layout import (
    MAX_ALLOCATIONS,
    MAX_ENTRIES,
    Dead,
    Discard,
    Effect,
    Epoch,
    Grant,
    Layout,
    Refuse,
    timeout_of,
)
from dynamo_box.gms.names import memfd_name
from dynamo_box.gms.places import EpochGone, Places
from dynamo_box.gms.snapshot_files import SnapshotDamaged
from dynamo_box.gms.vmm import StillMapped, Vmm, VmmError
from dynamo_box.gms.vmm.base import round_up
from dynamo_box.log import get_logger
from dynamo_box.protocol import PROTOCOL_VERSION, gms
from dynamo_box.protocol.descriptors import FdChannel
from dynamo_box.protocol.figures import GmsFigures, LayoutFigures
from dynamo_box.protocol.framing import FrameError, peer_pid, peer_uid
from dynamo_box.protocol.gms import ErrorCode, Place
from dynamo_box.protocol.spec import GmsSpec

MAX_CONNECTIONS = 256
MAX_LAYOUTS = 64
MAX_INBOX = 64
"""Messages that a connection may have ahead of its answers."""
MAX_TEXT = 512
"""Characters of an owner, the name or the dtype of an entry."""
MAX_CONTENT = 4096
MAX_DIMENSIONS = 32
MAX_RECORD_BYTES = 8 * 1024 * 1024
QUEUED_EVERY_S = 1.0

Channel = FdChannel[gms.EngineMessage]
M = TypeVar("M", bound=gms.EngineMessage)

log = get_logger()


class Refused(Exception):
    """Answered by GmsError; the connection goes on."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code: ErrorCode = code
        self.text = text


@dataclass
class Moved:
    """The result of a move; see `status.Moved`."""

    error: str = ""
    lost: bool = False
    bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    holders: tuple[str, ...] = ()


@dataclass(eq=False)
class _Peer:
    """One connection. `layout` is what it holds or waits for."""

    id: int
    channel: Channel
    pid: int
    pidfd: int
    layout: Layout | None = None
    inbox: deque[gms.EngineMessage] = field(default_factory=deque)
    busy: bool = False
    expiry: asyncio.TimerHandle | None = None

    def lives(self) -> bool:
        """Asked of the kernel now: its end of the socket is open, and the process that opened it runs."""
        if not self.channel.is_open:
            return False
        if self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(0):
                return False
        try:
            return bool(self.channel.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def stop_waiting(self) -> None:
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None


class GmsServer:
    """`changed()` is called whenever figures may be others than before."""

    def __init__(self, spec: GmsSpec, vmm: Vmm, places: Places, keeper: Keeper, changed: Callable[[], None]) -> None:
        self._spec = spec
        self._vmm = vmm
        self._places = places
        self._keeper = keeper
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._layouts: dict[str, Layout] = {}
        self._peers: dict[int, _Peer] = {}
        self._ids = itertools.count(1)
        self._requests = 0
        self._refused = 0
        self._acceptor = Acceptor(self._open)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None

    # Life

    async def adopt(self) -> list[str]:
        """Take over what a predecessor had committed. Returns what could not be, and why.

        Raises:
            NotKept: the supervisor doesn't say what it keeps.
        """
        problems = []
        for record, descriptors in await self._keeper.inherit():
            problem = self._inherited_problem(record, descriptors)
            if problem:
                for descriptor in descriptors:
                    os.close(descriptor)
                await self._keeper.forget(record.layout)
                problems.append(f"{record.layout} can't be taken over: {problem}")
                continue
            epoch = Epoch.of(record)
            self._places.adopt(epoch, descriptors)
            self._layout(record.layout).adopt(epoch)
        return problems

    def listen(self, sock: socket.socket) -> None:
        self._acceptor.listen(sock)

    def stop_listening(self) -> None:
        self._acceptor.close()

    async def close(self) -> None:
        """The committed epochs stay with the supervisor."""
        self.stop_listening()
        if self._ticker is not None:
            self._ticker.cancel()
        for task in self._tasks:
            task.cancel()
        for peer in self._peers.values():
            peer.stop_waiting()
            peer.channel.close()
            if peer.pidfd >= 0:
                os.close(peer.pidfd)
        self._peers.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def in_flight(self) -> int:
        """Epochs under construction, and layouts on their way."""
        return sum((layout.building is not None) + bool(layout.moving) for layout in self._layouts.values())

    def figures(self) -> GmsFigures:
        return GmsFigures(
            device=self._spec.device,
            capacity_bytes=self._spec.capacity_bytes,
            device_bytes=self._places.used("device"),
            host_capacity_bytes=self._spec.host_capacity_bytes,
            host_bytes=self._places.used("host"),
            disk_bytes=self._places.used("disk"),
            requests=self._requests,
            refused=self._refused,
            layouts=tuple(self._figures_of(layout) for layout in self._layouts.values()),
        )

    # Moves, for the supervisor

    async def move(self, name: str, place: Place) -> Moved:
        layout = self._layouts.get(name)
        if layout is None or layout.committed is None:
            return Moved(f"nothing is committed as {name}")
        epoch = layout.committed
        if epoch.place == place and not layout.moving:
            return Moved(bytes=epoch.bytes)
        refusal = layout.begin_move(place)
        if refusal:
            return Moved(refusal, holders=layout.holders)
        self._changed()
        began = time.monotonic()
        now: Epoch | None = epoch
        result = Moved(f"{name} was not moved")
        text = f"not moved to {place}: the service stops"
        try:
            relocated = await self._places.relocate(name, epoch, place)
            now = relocated.epoch
            text = f"moved to {place} in {time.monotonic() - began:.2f} s"
            result = Moved(bytes=epoch.bytes, phases=relocated.phases)
        except SnapshotDamaged as error:
            text = f"lost: {error}"
            result = await self._lose(name, epoch, str(error))
            now = None if result.lost else epoch
        except (MoveFailed, VmmError, NotKept) as error:
            text = f"not moved to {place}: {error}"
            result = Moved(str(error))
        finally:
            self._carry_out(layout, layout.end_move(now, text))
        log.info("layout moved" if not result.error else "layout not moved", layout=name, place=place, text=text)
        return result

    async def _lose(self, name: str, epoch: Epoch, why: str) -> Moved:
        try:
            await self._keeper.forget(name)
        except NotKept as error:
            return Moved(f"{why}; {error}")
        await self._places.discard(epoch)
        return Moved(why, lost=True)

    # Connections

    def _open(self, sock: socket.socket) -> None:
        if peer_uid(sock) != os.getuid() or len(self._peers) >= MAX_CONNECTIONS:
            log.warning("a connection is refused", uid=peer_uid(sock), connections=len(self._peers))
            sock.close()
            return
        pid = peer_pid(sock)
        try:
            pidfd = os.pidfd_open(pid) if pid else -1
        except OSError:  # it is gone already, which its socket tells too; or no descriptor is left
            pidfd = -1
        id_ = next(self._ids)
        channel: Channel = FdChannel(
            sock,
            gms.engine_decoder,
            lambda _channel, message, _fds: self._on_message(id_, message),
            lambda _channel, reason: self._on_close(id_, reason),
        )
        self._peers[id_] = _Peer(id_, channel, pid, pidfd)

    def _on_close(self, id_: int, reason: Exception | None) -> None:
        peer = self._peers.pop(id_, None)
        if peer is None:
            return
        if reason is not None:
            log.warning("a connection is closed", pid=peer.pid, reason=str(reason))
        peer.stop_waiting()
        peer.inbox.clear()
        if peer.pidfd >= 0:
            os.close(peer.pidfd)
        if peer.layout is not None:
            self._carry_out(peer.layout, peer.layout.leave(id_))

    def _on_message(self, id_: int, message: gms.EngineMessage) -> None:
        peer = self._peers[id_]
        self._requests += 1
        peer.inbox.append(message)
        if len(peer.inbox) > MAX_INBOX:
            peer.channel.abort(FrameError(f"over {MAX_INBOX} messages without waiting for an answer"))
            return
        self._serve(peer)

    def _serve(self, peer: _Peer) -> None:
        while peer.inbox and not peer.busy and peer.channel.is_open:
            message = peer.inbox.popleft()
            try:
                self._handle(peer, message)
            except Refused as refusal:
                self._send_error(peer, refusal.code, refusal.text)
        self._changed()

    def _handle(self, peer: _Peer, message: gms.EngineMessage) -> None:
        match message:
            case gms.Acquire():
                self._acquire(peer, message)
            case gms.Allocate():
                self._allocate(peer, message)
            case gms.Free():
                self._free(peer, message)
            case gms.Put():
                self._put(peer, message)
            case gms.Commit():
                self._commit(peer)
            case gms.Describe():
                self._describe(peer, message)
            case gms.Export():
                self._export(peer, message)
            case gms.Release():
                self._release(peer)

    def _send_error(self, peer: _Peer, code: ErrorCode, text: str) -> None:
        self._refused += 1
        peer.channel.send(gms.GmsError(code, text))

    def _in_background(self, peer: _Peer, work: Coroutine[Any, Any, None]) -> None:
        """Answer later; until then the connection's next message waits."""
        peer.busy = True
        task = self._loop.create_task(self._finish(peer, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, peer: _Peer, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Refused as refusal:
            self._send_error(peer, refusal.code, refusal.text)
        except (MoveFailed, VmmError, NotKept) as error:
            self._send_error(peer, "failed", str(error))
        except Exception as error:
            # A fault of ours: whoever waits for the answer must not wait for ever, and others are served on.
            log.exception("a request failed")
            self._send_error(peer, "failed", f"{type(error).__name__}: {error}")
        finally:
            peer.busy = False
        self._serve(peer)

    # Locks

    def _acquire(self, peer: _Peer, request: gms.Acquire) -> None:
        if request.version != PROTOCOL_VERSION:
            raise Refused("version", f"this service speaks version {PROTOCOL_VERSION}, not {request.version}")
        if peer.layout is not None:
            raise Refused("bad_request", f"this connection has, or waits for, a lock on {peer.layout.name}")
        if len(request.owner) > MAX_TEXT or max(len(request.content), len(request.expect_hash)) > MAX_CONTENT:
            raise Refused("bad_request", "the owner, content or hash is too long")
        if not self._known(request.layout):
            raise Refused("unknown_layout", f"no layout of that name is served here: {request.layout[:80]!r}")
        layout = peer.layout = self._layout(request.layout)
        self._carry_out(layout, layout.acquire(peer.id, request, peer.pid))
        if peer.id in layout.waiting:
            peer.expiry = self._loop.call_later(timeout_of(request), self._expire, peer, layout)
            self._tell_queued(peer, layout)
            if self._ticker is None:
                self._ticker = self._loop.call_later(QUEUED_EVERY_S, self._tick)

    def _expire(self, peer: _Peer, layout: Layout) -> None:
        self._carry_out(layout, layout.expire(peer.id))

    def _tick(self) -> None:
        self._ticker = None
        for layout in self._layouts.values():
            for id_ in layout.waiting:
                self._tell_queued(self._peers[id_], layout)
                self._ticker = self._ticker or self._loop.call_later(QUEUED_EVERY_S, self._tick)

    def _tell_queued(self, peer: _Peer, layout: Layout) -> None:
        peer.channel.send(gms.Queued(*layout.queue_of(peer.id)))

    def _release(self, peer: _Peer) -> None:
        layout = peer.layout
        if layout is None:
            raise Refused("bad_request", "this connection has no lock to give back")
        peer.layout = None
        peer.stop_waiting()
        self._carry_out(layout, layout.leave(peer.id))
        peer.channel.send(gms.Done())

    def _carry_out(self, layout: Layout, effects: Sequence[Effect]) -> None:
        given_up: Epoch | None = None
        for effect in effects:
            match effect:
                case Discard(epoch, forget):
                    if forget:
                        given_up = epoch
                    else:
                        self._places.discard(epoch)
                case Grant(holder, lock, epoch):
                    peer = self._peers[holder]
                    peer.stop_waiting()
                    if lock == "rw":
                        self._places.begin(epoch)
                    if given_up is None:
                        peer.channel.send(self._granted(lock, epoch))
                    else:
                        self._in_background(peer, self._grant_with_room(layout.name, given_up, peer, epoch))
                        given_up = None
                case Refuse(holder, code, text):
                    peer = self._peers[holder]
                    peer.stop_waiting()
                    peer.layout = None
                    self._send_error(peer, code, text)
                case Dead(holder):
                    peer = self._peers[holder]
                    peer.layout = None
                    peer.channel.abort(FrameError("it died while it waited"))
        self._changed()

    async def _grant_with_room(self, layout: str, given_up: Epoch, peer: _Peer, epoch: Epoch) -> None:
        """The writer is told that it may begin once what made room for it is really gone."""
        await self._keeper.forget(layout)
        await self._places.discard(given_up)
        peer.channel.send(self._granted("rw", epoch))

    def _granted(self, lock: Literal["rw", "ro"], epoch: Epoch) -> gms.Granted:
        return gms.Granted(lock, epoch.number, epoch.layout_hash, epoch.bytes, self._vmm.granularity)

    def _writing(self, peer: _Peer) -> tuple[Layout, Epoch]:
        held = peer.layout.held_by(peer.id) if peer.layout is not None else None
        if peer.layout is None or held is None or held[0] != "rw":
            raise Refused("not_allowed", "only a writer may do this")
        return peer.layout, held[1]

    def _held(self, peer: _Peer) -> tuple[Literal["rw", "ro"], Epoch]:
        held = peer.layout.held_by(peer.id) if peer.layout is not None else None
        if held is None:
            raise Refused("not_allowed", "only a reader or a writer may do this")
        return held

    # Writing

    def _allocate(self, peer: _Peer, message: gms.Allocate) -> None:
        layout, epoch = self._writing(peer)
        if not 0 < len(message.sizes) <= gms.MAX_DESCRIPTORS or min(message.sizes) <= 0:
            raise Refused("bad_request", f"between 1 and {gms.MAX_DESCRIPTORS} sizes, each above 0, go in one message")
        if len(epoch.sizes) + len(message.sizes) > MAX_ALLOCATIONS:
            raise Refused("bad_request", f"a layout has {MAX_ALLOCATIONS} allocations at most")
        sizes = [round_up(size, self._vmm.granularity) for size in message.sizes]
        self._in_background(peer, self._make(peer, layout.name, epoch, sizes))

    async def _make(self, peer: _Peer, layout: str, epoch: Epoch, sizes: Sequence[int]) -> None:
        try:
            ids = await self._places.allocate(layout, epoch, sizes)
        except OutOfMemory as error:
            raise Refused("out_of_memory", str(error)) from error
        except EpochGone:
            return
        allocations = tuple(gms.Allocation(id_, size) for id_, size in zip(ids, sizes, strict=True))
        peer.channel.send(gms.Allocated(allocations, len(ids)), self._places.descriptors(epoch, ids))

    def _free(self, peer: _Peer, message: gms.Free) -> None:
        _, epoch = self._writing(peer)
        self._check_ids(epoch, message.ids)
        self._places.free(epoch, message.ids)
        peer.channel.send(gms.Done())

    def _put(self, peer: _Peer, message: gms.Put) -> None:
        _, epoch = self._writing(peer)
        if len(message.entries) > gms.MAX_ENTRIES_A_PAGE or len(epoch.entries) + len(message.entries) > MAX_ENTRIES:
            raise Refused("bad_request", f"a page has {gms.MAX_ENTRIES_A_PAGE} entries at most, a layout {MAX_ENTRIES}")
        for entry in message.entries:
            if (
                max(len(entry.name), len(entry.dtype)) > MAX_TEXT
                or max(len(entry.shape), len(entry.stride)) > MAX_DIMENSIONS
            ):
                raise Refused("bad_request", f"entry {entry.name[:80]!r} is described at too great length")
        epoch.entries += message.entries
        peer.channel.send(gms.Done())

    def _commit(self, peer: _Peer) -> None:
        layout, epoch = self._writing(peer)
        problem = epoch.problem()
        if problem:
            raise Refused("bad_request", problem)
        epoch.layout_hash = epoch.compute_hash()
        if len(msgspec.msgpack.encode(epoch.record(layout.name))) > MAX_RECORD_BYTES:
            raise Refused("bad_request", f"what describes the layout is over {MAX_RECORD_BYTES} bytes")
        layout.begin_commit()
        self._in_background(peer, self._seal_and_keep(peer, layout, epoch))

    async def _seal_and_keep(self, peer: _Peer, layout: Layout, epoch: Epoch) -> None:
        """The commit has happened when the supervisor has said that it keeps the epoch, whoever lives then."""
        code: ErrorCode = "failed"
        error = "the service stops"
        try:
            await self._places.seal(epoch)
            await self._keeper.keep(epoch.record(layout.name), self._places.descriptors(epoch))
            error = ""
        except StillMapped as failure:
            code, error = "still_mapped", str(failure)
        except (VmmError, NotKept) as failure:
            error = str(failure)
        finally:
            self._carry_out(layout, layout.end_commit(error, writer_gone=peer.id not in self._peers))
        if error:
            raise Refused(code, error)

    # Reading

    def _describe(self, peer: _Peer, message: gms.Describe) -> None:
        _, epoch = self._held(peer)
        if message.start < 0:
            raise Refused("bad_request", "a page starts at entry 0 or later")
        end = message.start + gms.MAX_ENTRIES_A_PAGE
        peer.channel.send(
            gms.Manifest(epoch.allocations, epoch.entries[message.start : end], more=end < len(epoch.entries))
        )

    def _export(self, peer: _Peer, message: gms.Export) -> None:
        lock, epoch = self._held(peer)
        self._check_ids(epoch, message.ids)
        answer = gms.Exported(message.ids, len(message.ids))
        if lock == "rw":
            peer.channel.send(answer, self._places.descriptors(epoch, message.ids))
            return
        try:
            descriptors = self._places.readonly(epoch, message.ids)
        except OutOfMemory as error:
            raise Refused("out_of_memory", str(error)) from error
        except MoveFailed as error:
            raise Refused("failed", str(error)) from error
        peer.channel.send(answer, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _check_ids(self, epoch: Epoch, ids: Sequence[int]) -> None:
        if not 0 < len(ids) <= gms.MAX_DESCRIPTORS or len(set(ids)) < len(ids):
            raise Refused("bad_request", f"between 1 and {gms.MAX_DESCRIPTORS} allocations, each once, in one message")
        unknown = [id_ for id_ in ids if id_ not in epoch.sizes]
        if unknown:
            raise Refused("bad_request", f"no allocation {unknown[0]} is in epoch {epoch.number}")

    # Layouts

    def _known(self, name: str) -> bool:
        if name in self._layouts:
            return True
        if self._spec.layouts:
            return name in self._spec.layouts
        if len(name) > gms.MAX_LAYOUT_NAME:
            return False
        try:
            memfd_name("0" * 12, "device", self._spec.device, name)
        except ValueError:
            return False
        for idle in [one for one, layout in self._layouts.items() if layout.idle]:
            if len(self._layouts) >= MAX_LAYOUTS:
                del self._layouts[idle]
        return len(self._layouts) < MAX_LAYOUTS

    def _layout(self, name: str) -> Layout:
        layout = self._layouts.get(name)
        if layout is None:
            layout = self._layouts[name] = Layout(name, self._lives, time.time)
        return layout

    def _lives(self, id_: int) -> bool:
        peer = self._peers.get(id_)
        return peer is not None and peer.lives()

    def _inherited_problem(self, record: gms.EpochRecord, descriptors: Sequence[int]) -> str:
        if not self._known(record.layout):
            return "it is none of the layouts that are served here"
        if self._layout(record.layout).committed is not None:
            return "it was handed over twice"
        wanted = [allocation.size for allocation in record.allocations] if record.place != "disk" else []
        found = [os.fstat(descriptor).st_size for descriptor in descriptors]
        return f"its descriptors have {found} bytes instead of {wanted}" if found != wanted else ""

    def _figures_of(self, layout: Layout) -> LayoutFigures:
        committed, building = layout.committed, layout.building
        shown = committed or building
        size = committed.bytes if committed is not None else 0
        place = committed.place if committed is not None else ""
        return LayoutFigures(
            name=layout.name,
            state=layout.state,
            place=place,
            epoch=shown.number if shown is not None else 0,
            layout_hash=committed.layout_hash if committed is not None else "",
            bytes=shown.bytes if shown is not None else 0,
            device_bytes=(size if place == "device" else 0) + (building.bytes if building is not None else 0),
            host_bytes=size if place == "host" else 0,
            disk_bytes=size if place == "disk" else 0,
            allocations=len(shown.sizes) if shown is not None else 0,
            entries=len(shown.entries) if shown is not None else 0,
            moving=layout.moving,
            writer=layout.writer,
            readers=layout.readers,
            waiters=layout.waiters,
            history=tuple(layout.history),
        )
