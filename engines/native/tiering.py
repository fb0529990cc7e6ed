"""The engine's dealings with the KV tiers: everything of them that the compute thread does, and what is told of it.

Copies are made by the threads of `Tiers`, which never look at who uses a block. So a block that is read is pinned, and
one that is written belongs to a sequence that is not computed meanwhile: both until the copy's result has come back as
a command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from dynamo_box.kv.client.jobs import Copier, Fetched, Keep, Kept, Offer, Offered, Result, Sought, Source
from dynamo_box.kv.client.ledger import Totals
from dynamo_box.kv.client.tiers import Tiers
from dynamo_box.paths import RunDir
from dynamo_box.protocol.figures import WorkerFigures, WorkerTiers
from dynamo_box.protocol.kv import KvLayout
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import BlockEvent
from engines.native.blocks import BlockPool
from engines.native.legs import Handovers
from engines.native.offloading import Offloading
from engines.native.onboarding import Onboarding
from engines.native.scheduler import Scheduler
from engines.native.sequence import Sequence


class Pool(Copier, Protocol):
    """The content of the engine's blocks."""

    def clear(self, blocks: Iterable[int]) -> None:
        """Make them zeros: no numbers that aren't may be left for attention to read past a sequence's end."""


class Store(Source, Protocol):
    """`dynamo_box.kv.client.tiers.Tiers`."""

    def start(self) -> None: ...

    def offer(self, job: Offer) -> None: ...

    def keep(self, job: Keep) -> None: ...

    def totals(self) -> Totals: ...

    def close(self) -> None: ...


class Tiering:
    """`deliver` takes results, on any thread; they come back to `take` on the compute thread."""

    def __init__(self, spec: WorkerSpec, layout: KvLayout, content: Pool, pool: BlockPool, store: Store) -> None:
        self._settings = spec.offload
        self._content = content
        self.store = store
        self._offloading = Offloading(pool, store.offer, spec.offload, layout.block_size)
        self.onboarding = Onboarding(
            pool, store, block_size=layout.block_size, block_bytes=layout.block_bytes, ahead=spec.max_batch
        )
        self.handovers = Handovers(store, self._offloading, layout.block_size, self.onboarding.discard)

    def use(self, pool: BlockPool) -> None:
        """After a sleep: another pool, with nothing in it. Nothing may be copied or queued."""
        self._offloading.use(pool)
        self.onboarding.use(pool)

    @property
    def copying(self) -> bool:
        """Whether blocks are being read or written."""
        return self._offloading.copying or self.onboarding.loading or self.handovers.open

    @property
    def offloading(self) -> bool:
        """Whether there is more to offer, or an offer is not answered."""
        return self._offloading.copying or self._offloading.queued > 0

    @property
    def awaited(self) -> bool:
        """Whether a result will come."""
        return self.copying or self.onboarding.seeking

    def added(self, sequence: Sequence) -> None:
        if sequence.awaits_transfer:
            self.onboarding.claim(sequence)

    def cancelled(self, sequence: Sequence) -> None:
        if sequence.handing:
            self.handovers.cancel(sequence)

    def computed(self, sequence: Sequence) -> None:
        """More of it may be in the pool."""
        self._offloading.consider(sequence)

    def measured(self, prompt_tokens: int, other_tokens: int, seconds: float) -> None:
        """A step."""
        self.onboarding.prefill.add(prompt_tokens, other_tokens, seconds)

    def ended(self, sequence: Sequence) -> None:
        self.onboarding.ended(sequence)
        self.handovers.ended(sequence)

    def changed(self, events: Iterable[BlockEvent]) -> None:
        """In the pool."""
        self._offloading.forget(events)

    def offload(self) -> None:
        """Send what waits, as far as may be now; for what waits for more than a result see `handovers.next_s`."""
        self.handovers.send()
        self._offloading.send()

    def queue_everything(self) -> None:
        self._offloading.queue_everything()

    def clear_queue(self) -> None:
        self._offloading.clear_queue()

    def take(self, result: Result, scheduler: Scheduler) -> None:
        match result:
            case Offered() if result.key < 0:
                self.handovers.offered(result)
            case Offered():
                self._offloading.offered(result)
            case Kept():
                self.handovers.kept(result)
            case Sought():
                self.onboarding.sought(result)
            case Fetched():
                arrived = self.onboarding.fetched(result)
                self._content.clear(arrived.spoilt)
                self._offloading.loaded(arrived.request.digests, arrived.first, arrived.priorities)
                scheduler.loaded(arrived.request, arrived.tokens)

    def add_to(self, figures: WorkerFigures) -> WorkerFigures:
        """What the tiers and the legs of requests add to a worker's figures; `told` adds the store's part."""
        return msgspec.structs.replace(
            figures,
            tiers=self.figures,
            handed_over=self.handovers.done,
            handover_seconds=self.handovers.seconds,
            taken_over=self.onboarding.taken_over,
            transfers_failed=self.handovers.failed + self.onboarding.failed,
        )

    @property
    def figures(self) -> WorkerTiers:
        """This side's part of those of the tiers."""
        return WorkerTiers(
            queued=self._offloading.queued,
            pinned=self._offloading.pinned,
            dropped=dict(self._offloading.dropped),
            filtered=self._offloading.filtered,
            unset=self._offloading.unset,
            terminated=dict(self._offloading.terminated),
            min_priority=self._settings.min_priority,
            loads=self.onboarding.loads,
            recomputes=self.onboarding.recomputes,
        )


def connect(spec: WorkerSpec, layout: KvLayout, content: Copier, deliver: Callable[[Result], None]) -> Tiers:
    """To the store that the plan gives the worker, as soon as it is there."""
    return Tiers(RunDir(Path(spec.run_dir)).worker_socket(spec.kvstore), spec.name, layout, content, deliver)
