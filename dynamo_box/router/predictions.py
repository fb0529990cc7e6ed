"""What was routed to a worker a moment ago counts as cached there, although its first block event is still to
come.

Without this, siblings of a burst that share a long new prompt would be spread over all workers, each of which
then computes the same prefix. A prediction lasts 5 s, in which a real event either confirms it or is not
coming.
"""

from __future__ import annotations

from collections.abc import Sequence

PREDICTION_TTL_S = 5.0
MAX_PREDICTED_BLOCKS = 2**13


class Predictions:
    """Blocks that one worker is expected to hold soon.

    Invariant: a block never outlasts its parent, since a prompt is noted from its last block to its first and
    the oldest go first. So what is predicted of a prompt is a prefix of it, found by bisection.
    """

    def __init__(self, ttl_s: float = PREDICTION_TTL_S, max_blocks: int = MAX_PREDICTED_BLOCKS) -> None:
        self._ttl_s = ttl_s
        self._max_blocks = max_blocks
        self._expiry: dict[int, float] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._expiry)

    def note(self, hashes: Sequence[int], now: float) -> None:
        """A request with these blocks (a whole prompt, from its start) was just placed."""
        expiry, expires_at = self._expiry, now + self._ttl_s
        for block in reversed(hashes[: self._max_blocks]):
            expiry.pop(block, None)
            expiry[block] = expires_at
        self._drop_oldest(now, limit=2 * len(hashes) + 1)

    def match(self, hashes: Sequence[int], now: float) -> int:
        """Blocks from the start of `hashes` that are predicted."""
        expiry = self._expiry
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if expiry.get(hashes[middle], now) > now:
                low = middle + 1
            else:
                high = middle
        return low

    def clear(self) -> None:
        self._expiry.clear()

    def _drop_oldest(self, now: float, limit: int) -> None:
        """Drop what is over its time or over the cap: up to twice what came in, so that it runs out."""
        over = len(self._expiry) - self._max_blocks
        stale: list[int] = []
        for block, expires_at in self._expiry.items():
            if (expires_at > now and len(stale) >= over) or len(stale) == limit:
                break
            stale.append(block)
        for block in stale:
            del self._expiry[block]
