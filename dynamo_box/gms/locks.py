"""Who gets a lock, and is told so. Layouts decide (`layout.py`); what they decide is carried out here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

from dynamo_box.gms.epoch import Epoch
from dynamo_box.gms.keeping import Keeper
from dynamo_box.gms.layout import Dead, Discard, Effect, Grant, Layout, Refuse, timeout_of
from dynamo_box.gms.layouts import Layouts
from dynamo_box.gms.peers import Peer, Peers, Refused
from dynamo_box.gms.places import Places
from dynamo_box.protocol import PROTOCOL_VERSION, gms
from dynamo_box.protocol.framing import FrameError

MAX_OWNER = 512
"""Characters."""
MAX_CONTENT = 4096
QUEUED_EVERY_S = 1.0


class Locks:
    """`granularity` is that of addresses, which a grant tells; `changed` as of `Peers`."""

    def __init__(
        self,
        layouts: Layouts,
        peers: Peers,
        places: Places,
        keeper: Keeper,
        granularity: int,
        changed: Callable[[], None],
    ) -> None:
        self._layouts = layouts
        self._peers = peers
        self._places = places
        self._keeper = keeper
        self._granularity = granularity
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._ticker: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()

    # What peers ask for

    def acquire(self, peer: Peer, request: gms.Acquire) -> None:
        if request.version != PROTOCOL_VERSION:
            raise Refused("version", f"this service speaks version {PROTOCOL_VERSION}, not {request.version}")
        if peer.layout is not None:
            raise Refused("bad_request", f"this connection has, or waits for, a lock on {peer.layout.name}")
        if len(request.owner) > MAX_OWNER or max(len(request.content), len(request.expect_hash)) > MAX_CONTENT:
            raise Refused("bad_request", "the owner, content or hash is too long")
        if not self._layouts.knows(request.layout):
            raise Refused("unknown_layout", f"no layout of that name is served here: {request.layout[:80]!r}")
        layout = peer.layout = self._layouts[request.layout]
        self.carry_out(layout, layout.acquire(peer.id, request, peer.pid))
        if peer.id in layout.waiting:
            peer.expiry = self._loop.call_later(timeout_of(request), self._expire, peer, layout)
            self._tell_queued(peer, layout)
            if self._ticker is None:
                self._ticker = self._loop.call_later(QUEUED_EVERY_S, self._tick)

    def release(self, peer: Peer) -> None:
        layout = peer.layout
        if layout is None:
            raise Refused("bad_request", "this connection has no lock to give back")
        peer.layout = None
        peer.stop_waiting()
        self.carry_out(layout, layout.leave(peer.id))
        peer.channel.send(gms.Done())

    def gone(self, peer: Peer) -> None:
        """Its connection is closed."""
        if peer.layout is not None:
            self.carry_out(peer.layout, peer.layout.leave(peer.id))

    # What peers may do

    def writing(self, peer: Peer) -> tuple[Layout, Epoch]:
        """
        Raises:
            Refused: it is no writer.
        """
        held = peer.layout.held_by(peer.id) if peer.layout is not None else None
        if peer.layout is None or held is None or held[0] != "rw":
            raise Refused("not_allowed", "only a writer may do this")
        return peer.layout, held[1]

    def held(self, peer: Peer) -> tuple[Literal["rw", "ro"], Epoch]:
        """
        Raises:
            Refused: it has no lock.
        """
        held = peer.layout.held_by(peer.id) if peer.layout is not None else None
        if held is None:
            raise Refused("not_allowed", "only a reader or a writer may do this")
        return held

    # What layouts decide

    def carry_out(self, layout: Layout, effects: Sequence[Effect]) -> None:
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
                        self._peers.in_background(peer, self._grant_with_room(layout.name, given_up, peer, epoch))
                        given_up = None
                case Refuse(holder, code, text):
                    peer = self._peers[holder]
                    peer.stop_waiting()
                    peer.layout = None
                    self._peers.refuse(peer, code, text)
                case Dead(holder):
                    peer = self._peers[holder]
                    peer.layout = None
                    peer.channel.abort(FrameError("it died while it waited"))
        self._changed()

    async def _grant_with_room(self, layout: str, given_up: Epoch, peer: Peer, epoch: Epoch) -> None:
        """The writer is told that it may begin once what made room for it is really gone."""
        await self._keeper.forget(layout)
        await self._places.discard(given_up)
        peer.channel.send(self._granted("rw", epoch))

    def _granted(self, lock: Literal["rw", "ro"], epoch: Epoch) -> gms.Granted:
        return gms.Granted(lock, epoch.number, epoch.layout_hash, epoch.bytes, self._granularity)

    # While peers wait

    def _expire(self, peer: Peer, layout: Layout) -> None:
        self.carry_out(layout, layout.expire(peer.id))

    def _tick(self) -> None:
        self._ticker = None
        for layout in self._layouts:
            for id_ in layout.waiting:
                self._tell_queued(self._peers[id_], layout)
                self._ticker = self._ticker or self._loop.call_later(QUEUED_EVERY_S, self._tick)

    def _tell_queued(self, peer: Peer, layout: Layout) -> None:
        peer.channel.send(gms.Queued(*layout.queue_of(peer.id)))
