"""What a worker's side of the tiers has done, and how fast: written by its threads, read by the engine's."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, field

from dynamo_box.kv.client.jobs import Fetched, Offered

RATE_WINDOW_BYTES = 256 * 1024 * 1024
"""A rate is that of the last so many bytes, those before fading out."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the start, in blocks; by tier letter ("2", "3") where it is a mapping. What was matched is loaded, failed
    or wasted in the end. `queued` blocks wait for their offload now.
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


class Rate:
    """Bytes a second; every measurement weighs as much as its bytes."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def add(self, count: int, seconds: float) -> None:
        fade = math.exp(-count / RATE_WINDOW_BYTES)
        self._bytes = self._bytes * fade + count
        self._seconds = self._seconds * fade + seconds

    @property
    def value(self) -> float | None:
        return self._bytes / self._seconds if self._seconds > 0 else None


class Ledger:
    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._rates = {"2": Rate(), "3": Rate()}
        self._offered = Offered(0)
        self._dropped: Counter[str] = Counter()
        self._matched: Counter[str] = Counter()
        self._loaded: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._wasted: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}

    def offered(self, result: Offered) -> None:
        with self._guard:
            before = self._offered
            self._offered = Offered(
                0,
                stored=before.stored + result.stored,
                known=before.known + result.known,
                bytes=before.bytes + result.bytes,
                seconds=before.seconds + result.seconds,
            )
            self._dropped.update(result.dropped)

    def matched(self, tiers: str) -> None:
        with self._guard:
            self._matched.update(tiers)

    def used(self, loaded: str, failed: str, wasted: str) -> None:
        """What became of a lease, a tier letter for each block."""
        with self._guard:
            self._loaded.update(loaded)
            self._failed.update(failed)
            self._wasted.update(wasted)

    def fetched(self, result: Fetched) -> None:
        with self._guard:
            self._bytes.update(result.bytes)
            for tier, seconds in result.seconds.items():
                self._seconds[tier] = self._seconds.get(tier, 0.0) + seconds
                self._rates[tier].add(result.bytes.get(tier, 0), seconds)

    def rates(self) -> dict[str, float | None]:
        with self._guard:
            return {tier: rate.value for tier, rate in self._rates.items()}

    def totals(self, queued: int) -> Totals:
        with self._guard:
            return Totals(
                stored=self._offered.stored,
                stored_bytes=self._offered.bytes,
                store_seconds=self._offered.seconds,
                known=self._offered.known,
                queued=queued,
                dropped=dict(self._dropped),
                matched=dict(self._matched),
                loaded=dict(self._loaded),
                failed=dict(self._failed),
                wasted=dict(self._wasted),
                bytes=dict(self._bytes),
                seconds=dict(self._seconds),
            )
