"""What a worker says of its dealings with the KV tiers: the engine's part, and that of its `Tiers`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import msgspec

from dynamo_box.kv.client.ledger import Totals
from dynamo_box.protocol.figures import TierUse, WorkerTiers


class Store(Protocol):
    """What is needed of `dynamo_box.kv.client.tiers.Tiers`."""

    def totals(self) -> Totals: ...

    @property
    def status(self) -> str: ...


def told(own: WorkerTiers, store: Store, block_size: int) -> WorkerTiers:
    """Figures complete with what the store's side has counted by now. For any thread."""
    totals = store.totals()
    return msgspec.structs.replace(
        own,
        connected=store.status,
        offloaded=totals.stored,
        offloaded_bytes=totals.stored_bytes,
        offload_seconds=totals.store_seconds,
        known=totals.known,
        dropped=dict(Counter(own.dropped) + Counter(totals.dropped)),
        host=_use(totals, "2", block_size),
        disk=_use(totals, "3", block_size),
    )


def _use(totals: Totals, tier: str, block_size: int) -> TierUse:
    def tokens(blocks: Mapping[str, int]) -> int:
        return blocks.get(tier, 0) * block_size

    return TierUse(
        matched=tokens(totals.matched),
        loaded=tokens(totals.loaded),
        failed=tokens(totals.failed),
        wasted=tokens(totals.wasted),
        bytes=totals.bytes.get(tier, 0),
        seconds=totals.seconds.get(tier, 0.0),
    )
