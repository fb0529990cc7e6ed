"""An engine's way to the KV tiers: jobs in, results out, whatever becomes of the store.

Two threads with a connection each: one carries blocks out (`offer`), the other brings them in (`seek`, `fetch`,
`forgo`), so that a slow offload never delays a request that waits for its prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_box.kv.client.jobs import Copier, Fetch, Forgo, Offer, Result, Seek
from dynamo_box.protocol.kv import KvLayout

QUEUED_BLOCKS = 2048
"""Blocks that may wait for their offload."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the start, in blocks; by tier letter ("2", "3") where it is a mapping. What was found is loaded, failed or
    wasted in the end. `queued` blocks wait for their offload now.
    """

    stored: int = 0
    stored_bytes: int = 0
    store_seconds: float = 0.0
    known: int = 0
    queued: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    matched: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    wasted: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Tiers:
    """`offer`, `seek`, `fetch` and `forgo` never wait and may be called from any thread. Each job but a Forgo gets its
    result exactly once, by a call of `deliver` on a thread of this object (on the caller's after `close`). `deliver`
    must not wait for long, nor call `close`.

    An Offer that finds `queued_blocks` waiting is dropped as queue_full. Without a connection all is answered at once:
    Offered with everything dropped as store_gone, Sought and Fetched with an error.
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
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start both threads. They connect by themselves, again and again."""
        raise NotImplementedError

    def offer(self, job: Offer) -> None:
        raise NotImplementedError

    def seek(self, job: Seek) -> None:
        raise NotImplementedError

    def fetch(self, job: Fetch) -> None:
        raise NotImplementedError

    def forgo(self, job: Forgo) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """End: every job has its result, no copy is under way, and nothing of the arena is mapped. Waits for the copier
        to return from what it is doing.
        """
        raise NotImplementedError

    @property
    def status(self) -> str:
        """ "" while connected, else why not."""
        raise NotImplementedError

    def wait_connected(self, timeout_s: float) -> bool:
        """Whether both connections are up, at the latest after `timeout_s`."""
        raise NotImplementedError

    def rates(self) -> dict[str, float | None]:
        """Bytes a second out of "2" and "3", as measured lately; None before the first fetch from there."""
        raise NotImplementedError

    def totals(self) -> Totals:
        raise NotImplementedError
