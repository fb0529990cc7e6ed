"""What runs where. A placement is a lease on a worker's load: it counts until it is released, abandoned with
its connection, or expired for want of renewal.

A request in two legs is one lease on two workers: its prompt counts where it is computed, its blocks where they arrive.

A lease points at its worker's load object, not at a name. When the worker leaves, its load object is dropped
in one step; leases that still point at it end later and change nothing that anybody asks for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LEASES = 8192

LeaseKey = tuple[int, int]
"""(connection, id chosen by the frontend)"""


class WorkerLoad:
    """Active load of one life of a worker: prompt tokens still to be computed, and KV blocks in use.

    Requests with a common prefix share its blocks, which count once. Hashes are chains, and a request holds
    all blocks of its prompt, so the active blocks of a worker always include the parents of each: how many of
    a new prompt are active already is found by bisection.
    """

    __slots__ = ("_references", "prefill_tokens", "private_blocks")

    def __init__(self) -> None:
        self._references: dict[int, int] = {}
        self.prefill_tokens = 0
        self.private_blocks = 0

    @property
    def blocks(self) -> int:
        return len(self._references) + self.private_blocks

    def blocks_with(self, hashes: Sequence[int], private_blocks: int) -> int:
        """Active blocks if a request with these blocks were added."""
        references = self._references
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in references:
                low = middle + 1
            else:
                high = middle
        return self.blocks + len(hashes) - low + private_blocks

    def add(self, hashes: Sequence[int], private_blocks: int) -> None:
        references = self._references
        for block in hashes:
            references[block] = references.get(block, 0) + 1
        self.private_blocks += private_blocks

    def remove(self, hashes: Sequence[int], private_blocks: int) -> None:
        references = self._references
        for block in hashes:
            left = references[block] - 1
            if left:
                references[block] = left
            else:
                del references[block]
        self.private_blocks -= private_blocks


@dataclass(slots=True)
class _Lease:
    load: WorkerLoad
    hashes: tuple[int, ...]
    private_blocks: int
    prefill_load: WorkerLoad
    prefill_tokens: int
    expires_at: float


class Leases:
    """All live leases. Times are seconds of any one clock that never goes back."""

    def __init__(self, ttl_s: float, max_leases: int = MAX_LEASES) -> None:
        self._ttl_s = ttl_s
        self._max_leases = max_leases
        self._leases: dict[LeaseKey, _Lease] = {}  # those that expire first come first
        self._of_connection: dict[int, set[int]] = {}
        self._ended: deque[_Lease] = deque()
        self.expired = 0

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, key: LeaseKey) -> bool:
        return key in self._leases

    @property
    def full(self) -> bool:
        """Leases that have ended but are not settled count too: they hold memory."""
        return len(self._leases) + len(self._ended) >= self._max_leases

    def add(
        self,
        key: LeaseKey,
        load: WorkerLoad,
        hashes: tuple[int, ...],
        *,
        private_blocks: int,
        prefill_tokens: int,
        now: float,
        prefill_load: WorkerLoad | None = None,
    ) -> None:
        """Count a request: its blocks as `load`, and its prompt as `prefill_load` if another worker computes it. `key`
        must not be in use, and there must be room.
        """
        if key in self._leases or self.full:
            raise ValueError(f"lease {key} is in use, or there are {self._max_leases} already")
        load.add(hashes, private_blocks)
        computed = prefill_load or load
        computed.prefill_tokens += prefill_tokens
        self._leases[key] = _Lease(load, hashes, private_blocks, computed, prefill_tokens, now + self._ttl_s)
        self._of_connection.setdefault(key[0], set()).add(key[1])

    def prefill_done(self, key: LeaseKey) -> None:
        """The prompt has been computed; no effect the second time, or when the lease has ended."""
        lease = self._leases.get(key)
        if lease is not None:
            lease.prefill_load.prefill_tokens -= lease.prefill_tokens
            lease.prefill_tokens = 0

    def release(self, key: LeaseKey) -> None:
        """End a lease and settle it; no effect when it has ended."""
        lease = self._pop(key)
        if lease is not None:
            _settle(lease)

    def renew(self, connection: int, ids: Iterable[int], now: float) -> None:
        for lease_id in ids:
            lease = self._leases.pop((connection, lease_id), None)
            if lease is not None:
                lease.expires_at = now + self._ttl_s
                self._leases[connection, lease_id] = lease

    def abandon(self, connection: int) -> None:
        """End all leases of a connection that has closed; their load goes with `settle_one`."""
        for lease_id in list(self._of_connection.get(connection, ())):
            self._end((connection, lease_id))

    def expire(self, now: float) -> int:
        """End leases that nobody has renewed in time, and say how many; their load goes with `settle_one`."""
        stale = []
        for key, lease in self._leases.items():
            if lease.expires_at > now:
                break
            stale.append(key)
        for key in stale:
            self._end(key)
        self.expired += len(stale)
        return len(stale)

    def settle_one(self) -> bool:
        """Take the load of one ended lease off its worker; whether there are more.

        A thousand long prompts that end at once are tens of milliseconds of work: too much for one turn of
        the loop.
        """
        if self._ended:
            _settle(self._ended.popleft())
        return bool(self._ended)

    def _end(self, key: LeaseKey) -> None:
        lease = self._pop(key)
        if lease is not None:
            self._ended.append(lease)

    def _pop(self, key: LeaseKey) -> _Lease | None:
        lease = self._leases.pop(key, None)
        if lease is not None:
            ids = self._of_connection[key[0]]
            ids.discard(key[1])
            if not ids:
                del self._of_connection[key[0]]
        return lease


def _settle(lease: _Lease) -> None:
    lease.load.remove(lease.hashes, lease.private_blocks)
    lease.prefill_load.prefill_tokens -= lease.prefill_tokens
