"""The store as a child of the supervisor. A life that ends loses the host tier; what is on disk comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import msgspec

from dynamo_box.child_life import Life
from dynamo_box.child_main import allow_all_descriptors
from dynamo_box.errors import BoxError
from dynamo_box.kv.store.counts import Counts
from dynamo_box.kv.store.disk import DiskTier
from dynamo_box.kv.store.disk_port import DiskEvents, DiskPort
from dynamo_box.kv.store.layout import Disk
from dynamo_box.kv.store.layouts import Layouts
from dynamo_box.kv.store.modelled_disk import ModelledDisk
from dynamo_box.kv.store.server import KvServer
from dynamo_box.kv.store.write_back import WriteBack
from dynamo_box.log import get_logger
from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import KvStoreFigures, TierFigures
from dynamo_box.protocol.framing import listen_unix
from dynamo_box.protocol.spec import EVENTS_SUFFIX, ChildSpec, KvStoreSpec, TierRehearsal

CLEAR_SLICE = 512
"""Blocks forgotten in one turn of the loop."""
LOOK_EVERY_S = 0.1
LOOK_AT_DISK_EVERY_S = 1.0
BYTES_PER_SLOT = 55
BYTES_PER_BLOCK = 134
"""What the tables take, measured (tests/bench/kv_metadata.py): a slot by itself, and what the block in it adds."""

log = get_logger()


class KvStoreService:
    """See `child_life.Service`."""

    def __init__(self, spec: KvStoreSpec, life: Life) -> None:
        self._spec = spec
        self._life = life
        self._run = RunDir(Path(spec.run_dir))
        self._counts = Counts()
        self._layouts = Layouts(spec, self._run.key, self._counts, life.note)
        self._disk_timer: asyncio.TimerHandle | None = None
        if spec.disk_bytes:
            self._layouts.disk = self._disk()
        self._server = KvServer(self._layouts, self._counts, life.changed)

    async def start(self) -> dict[str, str]:
        allow_all_descriptors()
        if self._layouts.disk is not None:
            if self._spec.rehearsal is not None:
                self._life.note("info", "the disk tier for KV is simulated: nothing is written, and it begins empty")
            self._layouts.disk.port.start()
            self._tend_disk(self._layouts.disk)
        self._server.listen(listen_unix(self._run.worker_socket(self._spec.name)))
        await self._layouts.events.listen(listen_unix(self._run.worker_socket(self._spec.name + EVENTS_SUFFIX)))
        return {"host_bytes": str(self._spec.host_bytes), "disk_bytes": str(self._spec.disk_bytes)}

    def _disk(self) -> Disk:
        spec = self._spec
        port = self._real_disk() if spec.rehearsal is None else self._modelled_disk(spec.rehearsal)
        write_back = WriteBack(
            port, spec.disk_admission, spec.write_queue_blocks, self._counts.disk_dropped, self._life.changed
        )
        return Disk(port, write_back)

    def _real_disk(self) -> DiskPort:
        spec = self._spec
        if not spec.directory:
            raise BoxError("the disk tier has no directory", remedy="set `directory`, or `disk_bytes` to 0")
        return DiskTier(
            Path(spec.directory),
            spec.disk_bytes,
            threads=spec.disk_threads,
            changed=self._disk_changed,
            note=self._life.note,
            owner=spec.run_dir,
            write_queue_blocks=spec.write_queue_blocks,
        )

    def _modelled_disk(self, rates: TierRehearsal) -> DiskPort:
        spec = self._spec
        return ModelledDisk(
            spec.disk_bytes, rates, changed=self._disk_changed, write_queue_blocks=spec.write_queue_blocks
        )

    def _tend_disk(self, disk: Disk) -> None:
        """What it refused is offered again, and reports keep up with it."""
        disk.write_back.pump()
        self._life.changed()
        pause = LOOK_AT_DISK_EVERY_S if disk.port.settled else LOOK_EVERY_S
        self._disk_timer = asyncio.get_running_loop().call_later(pause, self._tend_disk, disk)

    def _disk_changed(self, events: DiskEvents) -> None:
        self._layouts.disk_changed(events)
        self._life.changed()

    async def close(self) -> None:
        if self._disk_timer is not None:
            self._disk_timer.cancel()
        await self._server.close()
        if self._layouts.disk is not None:
            await self._layouts.disk.port.close(0.0)
        self._layouts.events.close()
        self._layouts.close()

    async def drain(self, deadline_s: float, life: Life) -> None:
        """What waits for the disk may be written until `flush_s`."""
        self._server.stop_listening()
        self._layouts.events.stop_listening()
        if self._layouts.disk is not None:
            write_back = self._layouts.disk.write_back
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._spec.flush_s, deadline_s)):
                    write_back.pump()
                    while not write_back.idle.is_set():
                        life.draining(write_back.waiting)
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(write_back.idle.wait(), LOOK_EVERY_S)
        life.draining(0)

    async def command(self, message: status.ParentMessage) -> None:
        match message:
            case status.Set(key="clear"):
                self._life.send(await self._clear(message))
            case status.Set():
                self._life.send(status.Answer(message.id, error=f"a KV store has no setting {message.key!r}: clear"))
            case status.CancelRequest():
                self._life.send(status.Answer(message.id, error="a KV store runs no requests; the frontend does"))
            case _:
                log.warning("a message that is for another kind of process", message=type(message).__name__)

    async def _clear(self, message: status.Set) -> status.Answer:
        if message.value not in ("g2", "g3", "all"):
            return status.Answer(message.id, error=f"clear is g2, g3 or all, not {message.value!r}")
        gone = stay = 0
        words: list[str] = []
        if message.value in ("g2", "all"):
            for store in self._layouts:
                digests = store.tier.digests()
                for start in range(0, len(digests), CLEAR_SLICE):
                    went, stayed = store.clear(digests[start : start + CLEAR_SLICE])
                    gone, stay = gone + went, stay + stayed
                    await asyncio.sleep(0)  # others' turn
            words.append(
                f"{gone} blocks gone from host memory" + (f", {stay} stay: they are being read" if stay else "")
            )
        if message.value in ("g3", "all"):
            cleared = self._layouts.disk.port.clear() if self._layouts.disk is not None else 0
            words.append(f"{cleared} blocks gone from disk")
        self._life.changed()
        return status.Answer(message.id, text="; ".join(words))

    def figures(self) -> KvStoreFigures:
        disk = self._layouts.disk
        tiers = [store.tier for store in self._layouts]
        return KvStoreFigures(
            host=self._host_figures(),
            disk=self._disk_figures(),
            layouts=self._layouts.figures(),
            directory=self._spec.directory,
            admission=self._spec.disk_admission,
            simulated=self._spec.rehearsal is not None,
            indexing=disk.port.indexing if disk is not None else 0,
            indexed_in_s=disk.port.indexed_in_s if disk is not None else None,
            leases=sum(tier.leases for tier in tiers),
            reclaimed=self._counts.reclaimed,
            connections=self._server.connections,
            requests=self._counts.requests,
            refused=self._counts.refused,
            metadata_bytes=sum(tier.slots * BYTES_PER_SLOT + tier.held * BYTES_PER_BLOCK for tier in tiers),
        )

    def _host_figures(self) -> TierFigures:
        counts = self._counts
        stores = list(self._layouts)
        state, reason = self._layouts.host_state()
        return TierFigures(
            state=state,
            reason=reason,
            capacity_bytes=self._layouts.host_bytes,
            used_bytes=sum(store.tier.held * store.arena.slot_bytes for store in stores),
            blocks=sum(store.tier.held for store in stores),
            lookups=counts.host_lookups,
            hits=counts.host_hits,
            in_blocks=counts.host_in_blocks,
            in_bytes=counts.host_in_bytes,
            in_seconds=counts.host_in_s,
            out_blocks=counts.host_out_blocks,
            out_bytes=counts.host_out_bytes,
            out_seconds=counts.host_out_s,
            evicted=counts.host_evicted + sum(store.tier.evicted for store in stores),
            failed=counts.host_failed,
            dropped={reason: count for reason, count in counts.host_dropped.items() if count},
            queued=sum(store.tier.writing for store in stores),
        )

    def _disk_figures(self) -> TierFigures:
        disk = self._layouts.disk
        if disk is None:
            return TierFigures("off")
        figures = disk.port.figures()
        dropped = Counter(figures.dropped) + self._counts.disk_dropped
        return msgspec.structs.replace(
            figures,
            lookups=self._counts.disk_lookups,
            hits=self._counts.disk_hits,
            dropped=dict(dropped),
            queued=disk.write_back.waiting,
        )


def make(spec: ChildSpec, life: Life) -> KvStoreService:
    if not isinstance(spec, KvStoreSpec):
        raise BoxError(f"a KV store was handed the spec of {spec.name}, which is another kind")
    return KvStoreService(spec, life)
