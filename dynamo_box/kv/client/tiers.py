"""An engine's way to the KV tiers: jobs in, results out, whatever becomes of the store.

Two threads with a connection each: one carries blocks out (`offer`), the other brings them in (`seek`, `fetch`,
`forgo`), so that a slow offload never delays a request that waits for its prefix.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dynamo_box.kv.client.arena import SharedArena
from dynamo_box.kv.client.inbound import InboundLane
from dynamo_box.kv.client.jobs import Copier, Fetch, Fetched, Forgo, Keep, Offer, Offered, Result, Seek
from dynamo_box.kv.client.lane import Limits
from dynamo_box.kv.client.ledger import Ledger, Totals
from dynamo_box.kv.client.outbound import OutboundLane
from dynamo_box.kv.client.session import StoreSession
from dynamo_box.protocol.kv import KvLayout

QUEUED_BLOCKS = 2048
"""Blocks that may wait for their offload."""

log = logging.getLogger(__name__)


class Tiers:
    """`offer`, `seek`, `fetch` and `forgo` never wait and may be called from any thread. Each job but a Forgo gets its
    result exactly once, by a call of `deliver` on a thread of this object (on the caller's after `close`). `deliver`
    must not wait for long, nor call `close`.

    An Offer that would make more than `queued_blocks` wait is dropped as queue_full, unless none waits. A Seek looks at
    its first MAX_BATCH digests. Without a connection all is answered at once: Offered with everything dropped as
    store_gone, Sought and Fetched with an error.
    """

    def __init__(
        self,
        socket_path: Path,
        owner: str,
        layout: KvLayout,
        copier: Copier,
        deliver: Callable[[Result], None],
        *,
        queued_blocks: int = QUEUED_BLOCKS,
        limits: Limits | None = None,
    ) -> None:
        self._to_engine = deliver
        self._changed = threading.Condition()
        self._ledger = Ledger()
        dial = partial(StoreSession.connect, socket_path, owner, layout)
        shared, limits, size = SharedArena(layout.bytes_in_slot), limits or Limits(), layout.block_bytes
        self._out = OutboundLane(
            dial, shared, limits, self._on_status, copier, self._deliver, size, queued_blocks=queued_blocks
        )
        self._in = InboundLane(dial, shared, limits, self._on_status, copier, self._deliver, size, ledger=self._ledger)

    def start(self) -> None:
        """Start both threads. They connect by themselves, again and again."""
        self._out.start()
        self._in.start()

    def offer(self, job: Offer) -> None:
        """Raises:
        ValueError: not one pool block a block.
        """
        if len(job.pool_blocks) != len(job.blocks):
            raise ValueError(f"an Offer of {len(job.blocks)} blocks names {len(job.pool_blocks)} pool blocks")
        self._out.offer(job)

    def keep(self, job: Keep) -> None:
        """Its hold covers what the Offers before it stored, as soon as they have."""
        self._out.put(job)

    def seek(self, job: Seek) -> None:
        self._in.put(job)

    def fetch(self, job: Fetch) -> None:
        self._in.put(job)

    def forgo(self, job: Forgo) -> None:
        self._in.put(job)

    def close(self) -> None:
        """End: every job has its result, no copy is under way, and nothing of the arena is mapped. Waits for the copier
        to return from what it is doing.
        """
        self._out.close()
        self._in.close()
        self._out.join()
        self._in.join()

    @property
    def status(self) -> str:
        """ "" while both threads are connected, else why not."""
        return self._in.status or self._out.status

    def wait_connected(self, timeout_s: float) -> bool:
        """Whether both threads are connected, at the latest after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.status, timeout_s)

    def rates(self) -> dict[str, float | None]:
        """Bytes a second out of "2" and "3", as measured lately; None before the first fetch from there."""
        return self._ledger.rates()

    def totals(self) -> Totals:
        return self._ledger.totals(self._out.queued)

    def _on_status(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _deliver(self, result: Result) -> None:
        if isinstance(result, Offered):
            self._ledger.offered(result)
        elif isinstance(result, Fetched):
            self._ledger.fetched(result)
        try:
            self._to_engine(result)
        except Exception:  # the engine's own; the threads go on for its other jobs
            log.exception("the engine could not take a %s", type(result).__name__)
