"""The mock's dealings with the KV tiers of a rehearsal: the store and its books are real, and no byte is copied.

Copies take their time on the threads of `Tiers`; all else happens on the event loop, where results come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dynamo_box.kv.client.jobs import Fetched, Kept, Offered, Result, Sought
from dynamo_box.kv.client.tiers import Tiers
from dynamo_box.paths import RunDir
from dynamo_box.protocol.figures import WorkerTiers
from dynamo_box.protocol.kv import MODELLED, KvLayout
from dynamo_box.protocol.spec import WorkerSpec
from engines.mock.cache import BlockPool
from engines.mock.handing import ThroughTiers
from engines.mock.offloading import Offloading
from engines.mock.onboarding import Loaded, Onboarding
from engines.mock.options import MockOptions
from engines.mock.timing import copy_seconds
from engines.tier_figures import told


class TimedCopies:
    """A `Copier` of blocks without bytes: each direction has a thread of `Tiers`, and so a link, to itself. What one
    wait overshoots is taken off the next, as far as the next is as long.
    """

    def __init__(self, options: MockOptions, block_size: int) -> None:
        self._options = options
        self._block_size = block_size
        self._ended = threading.Event()
        self._overshot = {"out": 0.0, "in": 0.0}

    def copy_out(self, blocks: Sequence[int], slots: Sequence[memoryview]) -> None:
        self._take("out", len(blocks))

    def copy_in(self, slots: Sequence[memoryview], blocks: Sequence[int]) -> None:
        self._take("in", len(blocks))

    def prepare(self) -> bool:
        return False

    def end(self) -> None:
        """Whatever is copied is copied now."""
        self._ended.set()

    def _take(self, way: str, blocks: int) -> None:
        began = time.monotonic()
        takes = copy_seconds(self._options, blocks * self._block_size)
        left = takes - self._overshot[way]
        self._ended.wait(max(0.0, left))
        self._overshot[way] = min(time.monotonic() - began - left, takes)


class Tiering:
    """The scheduler's `Tiers`. `arrived` is told of prompts that were loaded, on the event loop, and `wake` lets
    the step loop plan again.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        options: MockOptions,
        kv_dtype: str,
        pool: BlockPool,
        arrived: Callable[[Loaded], None],
        wake: Callable[[], None],
    ) -> None:
        size = spec.model.block_size
        layout = KvLayout(spec.model.fingerprint, kv_dtype, size, options.kv_bytes_per_token * size, MODELLED)
        self._loop = asyncio.get_running_loop()
        self._block_size = size
        self._min_priority = spec.offload.min_priority
        self._arrived = arrived
        self._wake = wake
        self._copies = TimedCopies(options, size)
        self._store = Tiers(
            RunDir(Path(spec.run_dir)).worker_socket(spec.kvstore),
            spec.name,
            layout,
            self._copies,
            self._deliver,
            queued_blocks=spec.offload.queue_blocks,
        )
        self._offloading = Offloading(self._store.offer, spec.offload, size)
        self._onboarding = Onboarding(
            pool, self._store, options, block_size=size, ahead=spec.max_batch, arrived=self._loaded
        )
        self.way = ThroughTiers(self._store, self._offloading, self._onboarding, size)
        self.look_ahead = self._onboarding.look_ahead
        self.may_admit = self._onboarding.may_admit
        self.to_load = self._onboarding.to_load
        self.admitted = self._onboarding.admitted
        self.computed = self._offloading.consider
        self.ended = self._onboarding.ended

    def start(self) -> None:
        self._store.start()

    async def close(self) -> None:
        self._copies.end()
        await asyncio.to_thread(self._store.close)

    def evicted(self, digests: Iterable[bytes]) -> None:
        """From the pool."""
        self._offloading.forget(digests)

    @property
    def figures(self) -> WorkerTiers:
        own = WorkerTiers(
            queued=self._store.totals().queued,
            filtered=self._offloading.filtered,
            unset=self._offloading.unset,
            terminated={reason: count for reason, count in self._offloading.terminated.items() if count},
            min_priority=self._min_priority,
            loads=self._onboarding.loads,
            recomputes=self._onboarding.recomputes,
        )
        return told(own, self._store, self._block_size)

    def _deliver(self, result: Result) -> None:
        """On any thread; once the loop is closed nobody is left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, result)

    def _take(self, result: Result) -> None:
        match result:
            case Offered() if result.key < 0:
                self.way.offered(result)
            case Offered():
                self._offloading.offered(result)
            case Kept():
                self.way.kept(result)
            case Sought():
                self._onboarding.sought(result)
                self._wake()
            case Fetched():
                self._onboarding.fetched(result)

    def _loaded(self, loaded: Loaded) -> None:
        if not loaded.sequence.ending:
            chain = loaded.sequence.digests_of(loaded.blocks * self._block_size, self._block_size)
            self._offloading.loaded(chain[loaded.first :], loaded.priorities)
        self._arrived(loaded)
