"""Prefill legs: the KV of a prompt on its way to the worker that goes on.

    its first token ──► handing over: blocks that the tiers aren't known to have are offered, the partial last one
    included, and behind them a hold on all ──► over: with a Transfer, or with why there is none

Most blocks were offered behind the steps that computed them (`offloading.py`), with the prompt still under way. Those
that the priority filter kept out are offered now: a request in two legs needs them. Meanwhile the sequence keeps its
blocks, full or not, whatever the pool calls by their digests, so none needs to be pinned.

What is known of the tiers may be out of date: if the hold fails all are offered, and it is tried again. Another worker
may be storing the same blocks just now: that is waited for, in short intervals, since nobody tells when it has.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from dynamo_box.kv.client.jobs import Keep, Kept, Offer, Offered
from dynamo_box.kv.hashing import block_digest
from dynamo_box.protocol.kv import DIGEST_BYTES, Block
from dynamo_box.protocol.request import Transfer, pack_tokens
from engines.log import get_logger
from engines.native.sequence import Outcome
from engines.native.sequence import Sequence as Request

OFFER_BLOCKS = 64
MOST_OFFERED = 1024
"""Blocks of all hand-overs that are offered and not answered; `Tiers` drops what is too much for it."""
TRIES = 2
BUSY_INTERVAL_S = 0.01
BUSY_PATIENCE_S = 5.0

log = get_logger()


class Sink(Protocol):
    """What is needed of `dynamo_box.kv.client.tiers.Tiers`."""

    def offer(self, job: Offer) -> None: ...

    def keep(self, job: Keep) -> None: ...

    @property
    def status(self) -> str: ...


class Known(Protocol):
    """What is needed of `engines.native.offloading.Offloading`."""

    def take_over(self, digests: list[bytes], priority: int | None) -> tuple[list[Block], list[int]]: ...

    def handed(self, blocks: list[Block], *, stored: bool) -> None: ...


def prompt_digests(request: Request, block_size: int) -> list[bytes]:
    """Of all blocks that its prompt has something in: the full ones, and the partial last one, if there is one."""
    full, rest = divmod(request.prompt_length, block_size)
    digests = request.digest_blocks(block_size)[:full]
    if rest:
        tokens = request.tokens[full * block_size : request.prompt_length]
        parent = digests[-1] if digests else b""
        digests.append(block_digest(parent, pack_tokens(tokens), request.request.isolation))
    return digests


@dataclass(slots=True, eq=False)
class _Handover:
    """`places` of its blocks are yet to be offered, and then the hold is asked for: `waits` until it is. `offers` are
    unanswered. `patient_until`: others were storing some of its blocks, and won't be waited for longer.
    """

    request: Request
    blocks: list[Block]
    hold: bytes
    partial: bytes
    began: float
    places: deque[int]
    waits: bool = True
    tries_left: int = TRIES
    patient_until: float | None = None
    offers: int = 0
    keeping: bool = False
    held: bool = False
    error: str = ""
    lacking: Counter[str] = field(default_factory=Counter)


class Handovers:
    """Keys of its jobs are negative, so that their results can be told from others'. `discard` ends a hold."""

    def __init__(
        self,
        sink: Sink,
        known: Known,
        block_size: int,
        discard: Callable[[bytes], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink
        self._known = known
        self._block_size = block_size
        self._discard = discard
        self._clock = clock
        self._keys = count(-1, -1)
        self._open: dict[int, _Handover] = {}
        """By the key of the request."""
        self._line: deque[_Handover] = deque()
        self._later: deque[tuple[float, _Handover]] = deque()
        """When they get in line again."""
        self._offers: dict[int, tuple[_Handover, list[Block]]] = {}
        self._keeps: dict[int, _Handover] = {}
        self._offered = 0
        self.done = self.failed = 0
        self.seconds = 0.0

    @property
    def open(self) -> bool:
        """Whether blocks are being read, or a result will come."""
        return bool(self._open)

    @property
    def next_s(self) -> float | None:
        """Seconds until `send` has something to do, if nothing happens."""
        return max(0.0, self._later[0][0] - self._clock()) if self._later else None

    def begin(self, request: Request) -> None:
        """The prompt is computed, and its first token known: have it held for another worker, beginning with the next
        `send`, which comes behind that token.
        """
        digests = prompt_digests(request, self._block_size)
        partial = digests[-1] if request.prompt_length % self._block_size else b""
        hold = secrets.token_bytes(DIGEST_BYTES)
        blocks, places = self._known.take_over(digests, request.request.kv_priority)
        handover = _Handover(request, blocks, hold, partial, self._clock(), deque(places))
        request.handing = True
        self._open[request.request.key] = handover
        self._line.append(handover)

    def cancel(self, request: Request) -> None:
        """Nobody wants it any more; it is over when its copies are."""
        handover = self._open.get(request.request.key)
        if handover is not None:
            self._known.handed([handover.blocks[place] for place in handover.places], stored=False)
            handover.places.clear()
            handover.waits = False
            self._line = deque(one for one in self._line if one is not handover)
            self._later = deque(one for one in self._later if one[1] is not handover)
            self._settle(handover)

    def ended(self, request: Request) -> None:
        """If it ended otherwise than with its transfer, nobody will claim that."""
        outcome = request.outcome
        if request.cancelled and outcome is not None and outcome.transfer is not None:
            self._discard(outcome.transfer.key)

    def offered(self, result: Offered) -> None:
        handover, blocks = self._offers.pop(result.key)
        self._offered -= len(blocks)
        handover.offers -= 1
        handover.lacking.update(result.dropped)
        self._known.handed(blocks, stored=result.stored + result.known == len(blocks))
        self._settle(handover)
        self.send()

    def kept(self, result: Kept) -> None:
        handover = self._keeps.pop(result.key)
        handover.keeping = False
        handover.held = not result.error
        if result.error:
            self._not_held(handover, result.error)
        self._settle(handover)
        self.send()

    def _not_held(self, handover: _Handover, why: str) -> None:
        if handover.request.cancelled:
            return
        now = self._clock()
        busy = handover.lacking["store_busy"] > 0
        if busy and handover.patient_until is None:
            handover.patient_until = now + BUSY_PATIENCE_S
        if busy and handover.patient_until is not None and now < handover.patient_until:
            self._later.append((now + BUSY_INTERVAL_S, handover))
        elif handover.tries_left > 1 and not self._sink.status:
            handover.tries_left -= 1
            self._line.append(handover)
        else:
            dropped = ", ".join(f"{number} {reason}" for reason, number in sorted(handover.lacking.items()))
            handover.error = f"{why} ({dropped})" if dropped else why
            return
        handover.waits = True
        handover.lacking.clear()
        handover.places.extend(range(len(handover.blocks)))

    def send(self) -> None:
        """Offer what is to be offered, as far as may be now, and ask for holds behind it."""
        while self._later and self._later[0][0] <= self._clock():
            self._line.append(self._later.popleft()[1])
        while self._line and self._offered < MOST_OFFERED:
            handover = self._line[0]
            if handover.places:
                self._offer_some(handover)
            if not handover.places:
                self._line.popleft()
                key = next(self._keys)
                self._keeps[key] = handover
                handover.keeping, handover.waits = True, False
                digests = tuple(block.digest for block in handover.blocks)
                ttl_s = handover.request.request.transfer_ttl_s
                self._sink.keep(Keep(key, handover.hold, digests, ttl_s))

    def _offer_some(self, handover: _Handover) -> None:
        """The next that follow each other."""
        places = [handover.places.popleft()]
        while handover.places and handover.places[0] == places[-1] + 1 and len(places) < OFFER_BLOCKS:
            places.append(handover.places.popleft())
        blocks = [handover.blocks[place] for place in places]
        key = next(self._keys)
        self._offers[key] = (handover, blocks)
        self._offered += len(blocks)
        handover.offers += 1
        pool_blocks = tuple(handover.request.blocks[place] for place in places)
        self._sink.offer(Offer(key, pool_blocks, tuple(blocks)))

    def _settle(self, handover: _Handover) -> None:
        """If nothing more is to come for it, it is over."""
        if handover.offers or handover.keeping or handover.waits:
            return
        request = handover.request
        del self._open[request.request.key]
        request.handing = False
        if request.cancelled:
            if handover.held:
                self._discard(handover.hold)
        elif handover.held:
            self.done += 1
            self.seconds += self._clock() - handover.began
            transfer = Transfer(handover.hold, request.prompt_length, handover.partial)
            request.outcome = Outcome("prefilled", transfer=transfer)
        else:
            self.failed += 1
            error = f"the KV of the prompt could not be handed over: {handover.error}"
            log.warning("no hand-over", request_id=request.request.request_id, error=handover.error)
            request.outcome = Outcome("prefilled", error)
