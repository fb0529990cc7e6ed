"""From the mock's pool to the KV tiers, behind the steps: which blocks are offered, and which need not be.

A block that a step has filled, or that a request found in the pool, is judged by the priority filter and, if it passes,
offered at once: there are no bytes, so nothing of the pool needs to be kept for the copy. One that was stored is not
offered again soon, unless a request thinks more of it than those before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from dynamo_box.kv.client.jobs import Offer, Offered
from dynamo_box.kv.offload import LengthMismatch, block_priorities, judge
from dynamo_box.protocol.kv import UNSET_PRIORITY_COUNTS_AS, Block
from dynamo_box.protocol.spec import Offload
from engines.log import get_logger
from engines.mock.sequence import MockSequence

OFFER_AGAIN_S = 60.0

log = get_logger()


@dataclass(slots=True)
class _Known:
    """A block of the pool that was offered; `stored_at` is when the tiers said that they have it."""

    priority: int | None
    stored_at: float | None = None


class Offloading:
    def __init__(
        self,
        offer: Callable[[Offer], None],
        settings: Offload,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._offer = offer
        self._settings = settings
        self._block_size = block_size
        self._clock = clock
        self._keys = count(1)
        self._known: dict[bytes, _Known] = {}
        self._offered: dict[int, tuple[Block, ...]] = {}
        self.filtered = self.unset = 0
        self.terminated: Counter[str] = Counter()

    def consider(self, sequence: MockSequence) -> None:
        """Judge what is new among the sequence's blocks in the pool, and offer what passes."""
        first, request = sequence.judged, sequence.request
        new = len(sequence.digests) - first
        if new <= 0 or sequence.offload_over:
            return
        sequence.judged += new
        try:
            priorities = block_priorities(
                first,
                new,
                block_size=self._block_size,
                prompt_tokens=len(request.tokens),
                priority=request.kv_priority,
                ranges=request.kv_priorities,
            )
            verdict = judge(
                priorities,
                new,
                min_priority=self._settings.min_priority,
                continue_after_filter=self._settings.continue_after_filter,
                stopped=sequence.offload_stopped,
            )
        except LengthMismatch as error:
            log.error("nothing of a request is offloaded", request_id=request.request_id, error=str(error))
            self.terminated["length_mismatch"] += 1
            sequence.offload_over = True
            return
        self.filtered += verdict.filtered
        self.unset += verdict.unset
        self.terminated["priority"] += verdict.stopped and not sequence.offload_stopped
        sequence.offload_stopped = verdict.stopped
        blocks = [self._block(sequence.digests, first + place, priorities[place]) for place in verdict.taken]
        self._send([block for block in blocks if not self._is_fresh(block)])

    def lacking(self, digests: Sequence[bytes], priority: int | None) -> list[Block]:
        """Those blocks of a chain that the tiers haven't got and aren't being offered."""
        return [
            self._block(digests, place, priority) for place, digest in enumerate(digests) if digest not in self._known
        ]

    def offered(self, result: Offered) -> None:
        blocks = self._offered.pop(result.key)
        whole = result.stored + result.known == len(blocks)
        for block in blocks:
            known = self._known.get(block.digest)
            if known is None or known.priority != block.priority:
                continue
            if whole:
                known.stored_at = self._clock()
            else:
                del self._known[block.digest]

    def loaded(self, digests: Iterable[bytes], priorities: Iterable[int | None]) -> None:
        """These came from the tiers into the pool, with these priorities."""
        for digest, priority in zip(digests, priorities, strict=False):
            self._known[digest] = _Known(priority, self._clock())

    def forget(self, digests: Iterable[bytes]) -> None:
        """The pool has no such blocks any more."""
        for digest in digests:
            self._known.pop(digest, None)

    def _send(self, blocks: Sequence[Block]) -> None:
        if not blocks:
            return
        key = next(self._keys)
        self._offered[key] = tuple(blocks)
        self._known.update((block.digest, _Known(block.priority)) for block in blocks)
        self._offer(Offer(key, (0,) * len(blocks), self._offered[key]))

    def _block(self, digests: Sequence[bytes], place: int, priority: int | None) -> Block:
        return Block(digests[place], digests[place - 1] if place else b"", priority)

    def _is_fresh(self, block: Block) -> bool:
        """Whether it is on its way, or was stored lately, for as much."""
        known = self._known.get(block.digest)
        if known is None or _worth(block.priority) > _worth(known.priority):
            return False
        return known.stored_at is None or self._clock() - known.stored_at < OFFER_AGAIN_S


def _worth(priority: int | None) -> int:
    return UNSET_PRIORITY_COUNTS_AS if priority is None else priority
