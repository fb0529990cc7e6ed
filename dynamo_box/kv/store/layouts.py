"""The KV layouts of the store: each gets an even share of the host tier's memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from dynamo_box.kv.store.arena import Arena, NoMemory
from dynamo_box.kv.store.counts import Counts
from dynamo_box.kv.store.disk_port import DiskEvents
from dynamo_box.kv.store.events import MAX_HASHES, EventPlane, Pages
from dynamo_box.kv.store.layout import Disk, LayoutStore
from dynamo_box.log import get_logger
from dynamo_box.protocol.figures import KvLayoutFigures
from dynamo_box.protocol.kv import MAX_LAYOUTS, KvLayout, Tier
from dynamo_box.protocol.spec import KvStoreSpec

log = get_logger()


class NoRoom(Exception):
    """There is no share left for another layout."""


class OtherKind(Exception):
    """Blocks without bytes in tiers that are real, or the other way round."""


class Layouts:
    """`events` hears of blocks that came to the tiers or left them. The same block may be in several layouts (of
    workers that cut it up differently): it is there as long as it is in one.
    """

    def __init__(self, spec: KvStoreSpec, run_key: str, counts: Counts, note: Callable[[str, str], None]) -> None:
        self._shares = min(max(spec.layouts, 1), MAX_LAYOUTS)
        self._host_bytes = spec.host_bytes
        self._share_bytes = spec.host_bytes // self._shares
        self._modelled = spec.rehearsal is not None
        self._run_key = run_key
        self._counts = counts
        self._note = note
        self._by_name: dict[str, LayoutStore] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="arena")
        self._without_memory: dict[str, str] = {}
        self.events = EventPlane(self._pages)
        self.disk: Disk | None = None

    def __iter__(self) -> Iterator[LayoutStore]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        for store in self:
            store.close()

    @property
    def host_bytes(self) -> int:
        """What the host tier may take: as asked for, without what the kernel didn't give."""
        short = [store for store in self if store.arena.shortage or store.name in self._without_memory]
        return self._host_bytes - sum(self._share_bytes - store.arena.backed_bytes for store in short)

    def host_state(self) -> tuple[str, str]:
        """As in `TierFigures`: the state, and why it isn't as asked for."""
        if not self._host_bytes:
            return "off", ""
        arenas = [store.arena for store in self]
        shortage = next(iter([*self._without_memory.values(), *(one.shortage for one in arenas if one.shortage)]), "")
        if shortage:
            return "on" if any(arena.backed for arena in arenas) else "suspended", shortage
        if arenas and not any(arena.slots for arena in arenas):
            smallest = min(arena.slot_bytes for arena in arenas)
            return "off", f"{self._share_bytes} bytes a KV layout hold no block of {smallest}"
        return "on", ""

    async def attach(self, layout: KvLayout, connection: int, owner: str) -> LayoutStore:
        """The layout, made if need be, with memory for its first slots; `LayoutStore.end` detaches.

        Raises:
            NoRoom, OtherKind: see there.
        """
        if layout.modelled != self._modelled:
            ours, yours = ("a rehearsal", "real") if self._modelled else ("no rehearsal", "modelled")
            raise OtherKind(f"these KV tiers are those of {ours}: they take no {yours} blocks")
        store = self._by_name.get(layout.name)
        if store is None:
            self._make_share()
            store = self._by_name[layout.name] = self._make(layout)
            if self.disk is not None and store.arena.slots:
                self.disk.port.attach(layout)
        store.owners[connection] = owner
        try:
            await store.make_room(1)
        except BaseException:
            store.end(connection, may_still_write=False)
            raise
        return store

    def disk_changed(self, events: DiskEvents) -> None:
        self._tell("g3", [(False, digest) for digest in events.removed])
        self._tell("g3", [(True, digest) for digest in events.stored])

    def figures(self) -> tuple[KvLayoutFigures, ...]:
        return tuple(self._figures_of(store) for store in self)

    def _make_share(self) -> None:
        if len(self._by_name) < self._shares:
            return
        idle = [store for store in self if not store.busy]
        if not idle:
            raise NoRoom(
                f"all {self._shares} shares of the host tier are taken by other KV layouts: "
                f"{', '.join(sorted({owner for store in self for owner in store.owners.values()})) or 'in use'}"
            )
        store = min(idle, key=lambda each: (each.tier.held > 0, each.left_at))
        log.info("a KV layout is given up for another", layout=store.name, blocks=store.tier.held)
        self._counts.host_evicted += store.tier.evicted + store.tier.held
        del self._by_name[store.name]
        self._tell_removed(iter(store.tier.digests()))
        self._without_memory.pop(store.name, None)
        store.close()

    def _tell_removed(self, digests: Iterator[bytes]) -> None:
        """A few each turn of the loop."""
        some = list(itertools.islice(digests, MAX_HASHES))
        if some:
            self._tell("g2", [(False, digest) for digest in some])
            asyncio.get_running_loop().call_soon(self._tell_removed, digests)

    def _make(self, layout: KvLayout) -> LayoutStore:
        name = f"dynbox:kv:{self._run_key}:{layout.name}"
        try:
            arena = Arena(name, layout, self._share_bytes)
        except NoMemory as error:
            self._without_memory[layout.name] = str(error)
            self._note("warning", f"the host tier of KV layout {layout.name} is off: {error}")
            arena = Arena(name, layout, 0)
        return LayoutStore(layout, arena, self.disk, self._counts, self._executor, self._note, self._host_changed)

    def _host_changed(self, changes: Sequence[tuple[bool, bytes]]) -> None:
        self._tell("g2", changes)

    def _tell(self, tier: Tier, changes: Sequence[tuple[bool, bytes]]) -> None:
        """Pass on what changes for the box: runs of the same kind together. What is there again, or still in another
        layout, has not gone.
        """
        stores = list(self)
        run: list[bytes] = []
        run_stored = True
        for stored, digest in changes:
            if not stored and any(self._holds(tier, store, digest) for store in stores):
                continue
            if stored != run_stored:
                self._tell_run(tier, run_stored, run)
                run, run_stored = [], stored
            run.append(digest)
        self._tell_run(tier, run_stored, run)

    def _tell_run(self, tier: Tier, stored: bool, digests: Sequence[bytes]) -> None:
        if stored:
            self.events.stored(tier, digests)
        else:
            self.events.removed(tier, digests)

    def _holds(self, tier: Tier, store: LayoutStore, digest: bytes) -> bool:
        if tier == "g2":
            return store.tier.slot_of(digest) >= 0
        return self.disk is not None and self.disk.port.has(store.name, digest)

    def _pages(self) -> Pages:
        for store in self:
            for start in range(0, store.tier.slots, MAX_HASHES):
                yield "g2", store.tier.digests_in(range(start, min(start + MAX_HASHES, store.tier.slots)))
        if self.disk is not None:
            for store in self:
                digests = self.disk.port.digests(store.name)
                for start in range(0, len(digests), MAX_HASHES):
                    yield "g3", digests[start : start + MAX_HASHES]

    def _figures_of(self, store: LayoutStore) -> KvLayoutFigures:
        layout, tier = store.layout, store.tier
        return KvLayoutFigures(
            name=store.name,
            fingerprint=layout.fingerprint,
            kv_dtype=layout.kv_dtype,
            block_size=layout.block_size,
            block_bytes=layout.block_bytes,
            owners=tuple(sorted(store.owners.values())),
            host_slots=store.arena.backed if store.arena.shortage else store.arena.slots,
            host_blocks=tier.held,
            host_free=tier.free + (store.arena.slots - tier.slots if store.arena.may_grow else 0),
            host_leased=tier.leased_slots,
            host_writing=tier.writing,
            disk_blocks=self.disk.port.blocks(store.name) if self.disk is not None else 0,
        )
