"""The service put together: engines ask through `peers.py`, `locks.py` and `epochs.py` answer, and the supervisor moves
what is committed. Decisions are in `layout.py`, bytes in `places.py`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from dynamo_box.gms.copying import MoveFailed, OutOfMemory
from dynamo_box.gms.epoch import Epoch
from dynamo_box.gms.epochs import Epochs
from dynamo_box.gms.keeping import Keeper, NotKept
from dynamo_box.gms.layouts import Layouts
from dynamo_box.gms.locks import Locks
from dynamo_box.gms.peers import Peer, Peers
from dynamo_box.gms.places import Places
from dynamo_box.gms.snapshot_directories import SnapshotDamaged
from dynamo_box.gms.vmm import Vmm, VmmError
from dynamo_box.log import get_logger
from dynamo_box.protocol import gms, status
from dynamo_box.protocol.figures import GmsFigures
from dynamo_box.protocol.spec import GmsSpec

log = get_logger()


class GmsServer:
    """`changed()` is called whenever figures may be others than before."""

    def __init__(self, spec: GmsSpec, vmm: Vmm, places: Places, keeper: Keeper, changed: Callable[[], None]) -> None:
        self._spec = spec
        self._places = places
        self._keeper = keeper
        self._changed = changed
        self._peers = Peers(self._handle, lambda peer: self._locks.gone(peer), changed)
        self._layouts = Layouts(spec, self._peers.lives)
        self._locks = Locks(self._layouts, self._peers, places, keeper, vmm.granularity, changed)
        self._epochs = Epochs(self._locks, self._peers, places, keeper, vmm.granularity)

    async def adopt(self) -> list[str]:
        """Take over what a predecessor had committed. Returns what could not be, and why.

        Raises:
            NotKept: the supervisor doesn't say what it keeps.
        """
        problems = []
        for record, descriptors in await self._keeper.inherit():
            problem = self._layouts.inherited_problem(record, descriptors)
            if problem:
                for descriptor in descriptors:
                    os.close(descriptor)
                await self._keeper.forget(record.layout)
                problems.append(f"{record.layout} can't be taken over: {problem}")
                continue
            epoch = Epoch.of(record)
            self._places.adopt(epoch, descriptors)
            self._layouts[record.layout].adopt(epoch)
        return problems

    def listen(self, sock: socket.socket) -> None:
        self._peers.listen(sock)

    def stop_listening(self) -> None:
        self._peers.stop_listening()

    async def close(self) -> None:
        """The committed epochs stay with the supervisor."""
        self._locks.close()
        await self._peers.close()

    @property
    def in_flight(self) -> int:
        """Epochs under construction, and layouts on their way."""
        return sum((layout.building is not None) + bool(layout.moving) for layout in self._layouts)

    def figures(self) -> GmsFigures:
        return GmsFigures(
            device=self._spec.device,
            capacity_bytes=self._spec.capacity_bytes,
            device_bytes=self._places.used("device"),
            host_capacity_bytes=self._spec.host_capacity_bytes,
            host_bytes=self._places.used("host"),
            disk_bytes=self._places.used("disk"),
            requests=self._peers.requests,
            refused=self._peers.refused,
            layouts=self._layouts.figures(),
        )

    # For the supervisor

    async def move(self, order: status.Move) -> status.Moved:
        name, place = order.layout, order.place
        layout = self._layouts.get(name)
        if layout is None or layout.committed is None:
            return status.Moved(order.id, f"nothing is committed as {name}")
        epoch = layout.committed
        if epoch.place == place and not layout.moving:
            return status.Moved(order.id, bytes=epoch.bytes)
        refusal = layout.begin_move(place)
        if refusal:
            return status.Moved(order.id, refusal, holders=layout.holders)
        self._changed()
        began = time.monotonic()
        now: Epoch | None = epoch
        result = status.Moved(order.id, f"{name} was not moved")
        text = f"not moved to {place}: the service stops"
        try:
            relocated = await self._places.relocate(name, epoch, place)
            now = relocated.epoch
            text = f"moved to {place} in {time.monotonic() - began:.2f} s"
            result = status.Moved(order.id, bytes=epoch.bytes, phases=relocated.phases)
        except SnapshotDamaged as error:
            text = f"lost: {error}"
            result = await self._lose(order, epoch, str(error))
            now = None if result.lost else epoch
        except (MoveFailed, VmmError, NotKept) as error:
            text = f"not moved to {place}: {error}"
            result = status.Moved(order.id, str(error), no_room=isinstance(error, OutOfMemory))
        finally:
            self._locks.carry_out(layout, layout.end_move(now, text))
        log.info("layout moved" if not result.error else "layout not moved", layout=name, place=place, text=text)
        return result

    async def _lose(self, order: status.Move, epoch: Epoch, why: str) -> status.Moved:
        try:
            await self._keeper.forget(order.layout)
        except NotKept as error:
            return status.Moved(order.id, f"{why}; {error}")
        await self._places.discard(epoch)
        return status.Moved(order.id, why, lost=True)

    # For engines

    def _handle(self, peer: Peer, message: gms.EngineMessage) -> None:
        match message:
            case gms.Acquire():
                self._locks.acquire(peer, message)
            case gms.Allocate():
                self._epochs.allocate(peer, message)
            case gms.Free():
                self._epochs.free(peer, message)
            case gms.Put():
                self._epochs.put(peer, message)
            case gms.Commit():
                self._epochs.commit(peer)
            case gms.Describe():
                self._epochs.describe(peer, message)
            case gms.Export():
                self._epochs.export(peer, message)
            case gms.Release():
                self._locks.release(peer)
