"""What the holder of a lock may do with the memory of its epoch: a writer builds and commits it, a reader maps it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from dynamo_box.gms.copying import MoveFailed, OutOfMemory
from dynamo_box.gms.epoch import Epoch
from dynamo_box.gms.keeping import Keeper, NotKept
from dynamo_box.gms.layout import Layout
from dynamo_box.gms.locks import Locks
from dynamo_box.gms.peers import Peer, Peers, Refused
from dynamo_box.gms.places import EpochGone, Places
from dynamo_box.gms.vmm import StillMapped, VmmError
from dynamo_box.gms.vmm.base import round_up
from dynamo_box.protocol import gms
from dynamo_box.protocol.gms import ErrorCode

MAX_ALLOCATIONS = 1024
MAX_ENTRIES = 65_536
MAX_TEXT = 512
"""Characters of the name or the dtype of an entry."""
MAX_DIMENSIONS = 32
MAX_RECORD_BYTES = 8 * 1024 * 1024


class Epochs:
    """Each method answers a message, now or later, or raises Refused."""

    def __init__(self, locks: Locks, peers: Peers, places: Places, keeper: Keeper, granularity: int) -> None:
        self._locks = locks
        self._peers = peers
        self._places = places
        self._keeper = keeper
        self._granularity = granularity

    # Writing

    def allocate(self, peer: Peer, message: gms.Allocate) -> None:
        layout, epoch = self._locks.writing(peer)
        if not 0 < len(message.sizes) <= gms.MAX_DESCRIPTORS or min(message.sizes) <= 0:
            raise Refused("bad_request", f"between 1 and {gms.MAX_DESCRIPTORS} sizes, each above 0, go in one message")
        if len(epoch.sizes) + len(message.sizes) > MAX_ALLOCATIONS:
            raise Refused("bad_request", f"a layout has {MAX_ALLOCATIONS} allocations at most")
        sizes = [round_up(size, self._granularity) for size in message.sizes]
        self._peers.in_background(peer, self._make(peer, layout.name, epoch, sizes))

    async def _make(self, peer: Peer, layout: str, epoch: Epoch, sizes: Sequence[int]) -> None:
        try:
            ids = await self._places.allocate(layout, epoch, sizes)
        except OutOfMemory as error:
            raise Refused("out_of_memory", str(error)) from error
        except EpochGone:
            return
        allocations = tuple(gms.Allocation(id_, size) for id_, size in zip(ids, sizes, strict=True))
        peer.channel.send(gms.Allocated(allocations, len(ids)), self._places.descriptors(epoch, ids))

    def free(self, peer: Peer, message: gms.Free) -> None:
        _, epoch = self._locks.writing(peer)
        self._check_ids(epoch, message.ids)
        self._places.free(epoch, message.ids)
        peer.channel.send(gms.Done())

    def put(self, peer: Peer, message: gms.Put) -> None:
        _, epoch = self._locks.writing(peer)
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

    def commit(self, peer: Peer) -> None:
        layout, epoch = self._locks.writing(peer)
        problem = epoch.problem()
        if problem:
            raise Refused("bad_request", problem)
        epoch.layout_hash = epoch.compute_hash()
        if len(msgspec.msgpack.encode(epoch.record(layout.name))) > MAX_RECORD_BYTES:
            raise Refused("bad_request", f"what describes the layout is over {MAX_RECORD_BYTES} bytes")
        layout.begin_commit()
        self._peers.in_background(peer, self._seal_and_keep(peer, layout, epoch))

    async def _seal_and_keep(self, peer: Peer, layout: Layout, epoch: Epoch) -> None:
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
            self._locks.carry_out(layout, layout.end_commit(error, writer_gone=peer.id not in self._peers))
        if error:
            raise Refused(code, error)

    # Reading

    def describe(self, peer: Peer, message: gms.Describe) -> None:
        _, epoch = self._locks.held(peer)
        if message.start < 0:
            raise Refused("bad_request", "a page starts at entry 0 or later")
        end = message.start + gms.MAX_ENTRIES_A_PAGE
        peer.channel.send(
            gms.Manifest(epoch.allocations, epoch.entries[message.start : end], more=end < len(epoch.entries))
        )

    def export(self, peer: Peer, message: gms.Export) -> None:
        lock, epoch = self._locks.held(peer)
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
