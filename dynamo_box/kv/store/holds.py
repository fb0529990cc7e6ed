"""Blocks on their way from one worker to another: kept by a key, for whoever claims them, until then or for a time.

A hold is a lease of nobody's connection, so it outlives the worker that asked for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from dynamo_box.kv.store.slots import Lease
from dynamo_box.log import get_logger
from dynamo_box.protocol import kv

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Held:
    lease: Lease
    expiry: asyncio.TimerHandle


class Holds:
    """Of one layout. `give_back` ends a lease."""

    def __init__(self, layout: str, give_back: Callable[[Lease], None]) -> None:
        self._layout = layout
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()
        self._held: dict[bytes, _Held] = {}
        self.expired = 0

    def __len__(self) -> int:
        return len(self._held)

    def why_not(self, key: bytes) -> str:
        """Why nothing can be held by this key; "" if it can."""
        if key in self._held:
            return "there is a hold with this key"
        if len(self._held) >= kv.MAX_HOLDS:
            return f"{kv.MAX_HOLDS} holds are the most"
        return ""

    def add(self, key: bytes, lease: Lease, ttl_s: float) -> None:
        """Keep what is leased. The key must be free."""
        self._held[key] = _Held(lease, self._loop.call_later(ttl_s, self._expire, key))

    def end(self, key: bytes) -> bool:
        """It has been claimed; whether there was one."""
        held = self._held.pop(key, None)
        if held is None:
            return False
        held.expiry.cancel()
        self._give_back(held.lease)
        return True

    def close(self) -> None:
        for key in list(self._held):
            self.end(key)

    def _expire(self, key: bytes) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.expired += 1
            log.warning("nobody claimed what was held", layout=self._layout, blocks=len(held.lease.digests))
            self._give_back(held.lease)
