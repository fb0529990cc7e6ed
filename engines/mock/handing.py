"""How KV goes from a prefill worker to a decode worker: over links of its own, or through the box's KV tiers.

No byte is copied either way. Over links (`Direct`) KV takes its time out of one pool and into the other, chunk by chunk
behind the steps that compute it, and nobody knows whether it is still held. Through the tiers (`ThroughTiers`) it goes
as it does for an engine that computes: blocks are offered, a hold keeps them, the decode worker claims and loads them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from dynamo_box.kv.client.jobs import Keep, Kept, Offer, Offered
from dynamo_box.protocol.kv import DIGEST_BYTES, MAX_BATCH, Block
from dynamo_box.protocol.request import Transfer
from engines.mock.offloading import Offloading
from engines.mock.onboarding import Loaded, Onboarding
from engines.mock.options import MockOptions
from engines.mock.sequence import MockSequence, Work
from engines.mock.timing import Link

TRIES = 2
AGAIN_S = 0.01
PATIENCE_S = 5.0
_PASSING = ("store_busy", "queue_full")
"""Reasons for which blocks are not stored now, and soon will be."""

HandedOver = Callable[[Transfer | None, str], None]
TakenOver = Callable[[Loaded], None]


class Way(Protocol):
    def computed(self, work: Work) -> None:
        """A step is done: what it computed for prefill legs can leave."""

    def hand_over(self, sequence: MockSequence, done: HandedOver) -> None:
        """Have the KV of a prompt kept for whoever gets the Transfer. `done` is called later."""

    def claim(self, sequence: MockSequence, transfer: Transfer) -> None:
        """A decode leg has come, and waits for its turn."""

    def take_over(self, sequence: MockSequence, done: TakenOver) -> None:
        """Get the KV of its first `arriving` tokens. `done` is called later."""

    def give_up(self, key: bytes) -> None:
        """Nobody will claim this transfer."""

    def close(self) -> None: ...


class Direct:
    """A `Way`."""

    def __init__(self, options: MockOptions, block_size: int) -> None:
        self._block_size = block_size
        self._loop = asyncio.get_running_loop()
        self._out, self._in = Link(options), Link(options)
        self._timers: set[asyncio.TimerHandle] = set()

    def computed(self, work: Work) -> None:
        now = self._loop.time()
        for sequence, tokens in work.shares:
            if sequence.request.leg == "prefill":
                self._out.copy(tokens, now)

    def hand_over(self, sequence: MockSequence, done: HandedOver) -> None:
        transfer = _transfer(sequence, secrets.token_bytes(DIGEST_BYTES), self._block_size)
        self._at(self._out.copy(0, self._loop.time()), lambda: done(transfer, ""))

    def claim(self, sequence: MockSequence, transfer: Transfer) -> None:
        """Nothing to be done: it comes when there is room for it."""

    def take_over(self, sequence: MockSequence, done: TakenOver) -> None:
        hits, blocks = len(sequence.digests), -(-sequence.arriving // self._block_size)
        tokens = max(0, sequence.arriving - sequence.computed)
        self._at(
            self._in.copy(tokens, self._loop.time()), lambda: done(Loaded(sequence, hits, blocks, (None,) * blocks))
        )

    def give_up(self, key: bytes) -> None:
        """Nothing is held."""

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _at(self, when: float, action: Callable[[], None]) -> None:
        def act() -> None:
            self._timers.discard(timer)
            action()

        timer = self._loop.call_at(when, act)
        self._timers.add(timer)


class Sink(Protocol):
    """What is needed of `dynamo_box.kv.client.tiers.Tiers`."""

    def offer(self, job: Offer) -> None: ...

    def keep(self, job: Keep) -> None: ...

    @property
    def status(self) -> str: ...


@dataclass(slots=True, eq=False)
class _Handover:
    sequence: MockSequence
    blocks: list[Block]
    transfer: Transfer
    done: HandedOver
    patient_until: float
    tries_left: int = TRIES - 1
    lacking: Counter[str] = field(default_factory=Counter)


class ThroughTiers:
    """A `Way`. Keys of its jobs are negative, so that their results can be told from others'."""

    def __init__(self, sink: Sink, offloading: Offloading, onboarding: Onboarding, block_size: int) -> None:
        self._sink = sink
        self._offloading = offloading
        self._onboarding = onboarding
        self._block_size = block_size
        self._loop = asyncio.get_running_loop()
        self._keys = count(-1, -1)
        self._offers: dict[int, _Handover] = {}
        self._keeps: dict[int, _Handover] = {}
        self._again: set[asyncio.TimerHandle] = set()

    def computed(self, work: Work) -> None:
        """It was offered with all other blocks."""

    def hand_over(self, sequence: MockSequence, done: HandedOver) -> None:
        digests = sequence.blocks_of(sequence.prompt_tokens, self._block_size)
        if len(digests) > MAX_BATCH:
            self._loop.call_soon(done, None, f"its {len(digests)} blocks are over the {MAX_BATCH} of a hold")
            return
        priority = sequence.request.kv_priority
        blocks = [Block(digest, before, priority) for before, digest in zip([b"", *digests], digests, strict=False)]
        transfer = _transfer(sequence, secrets.token_bytes(DIGEST_BYTES), self._block_size)
        handover = _Handover(sequence, blocks, transfer, done, self._loop.time() + PATIENCE_S)
        self._try(handover, self._offloading.lacking(digests, priority))

    def claim(self, sequence: MockSequence, transfer: Transfer) -> None:
        self._onboarding.claim(sequence, sequence.blocks_of(transfer.tokens, self._block_size), transfer.key)

    def take_over(self, sequence: MockSequence, done: TakenOver) -> None:
        def loaded(what: Loaded) -> None:
            if not sequence.ending:  # the partial last block has a name in the tiers alone
                full = sequence.digests_of(sequence.arriving, self._block_size)
                self._offloading.loaded(full[what.first : what.blocks], what.priorities)
            done(what)

        self._onboarding.take_over(sequence, loaded)

    def give_up(self, key: bytes) -> None:
        self._onboarding.discard(key)

    def close(self) -> None:
        for timer in self._again:
            timer.cancel()
        self._again.clear()

    def offered(self, result: Offered) -> None:
        self._offers.pop(result.key).lacking.update(result.dropped)

    def kept(self, result: Kept) -> None:
        handover = self._keeps.pop(result.key)
        if not result.error:
            handover.done(handover.transfer, "")
        elif handover.sequence.ending:
            handover.done(None, "it was cancelled")
        elif any(handover.lacking[reason] for reason in _PASSING) and self._loop.time() < handover.patient_until:
            self._try_again_soon(handover)
        elif handover.tries_left and not self._sink.status:
            handover.tries_left -= 1
            self._try(handover, handover.blocks)
        else:
            handover.done(None, f"the KV of the prompt could not be handed over: {result.error}")

    def _try(self, handover: _Handover, missing: list[Block]) -> None:
        """Offer what is missing, and ask for a hold on all behind it."""
        handover.lacking.clear()
        if missing:
            key = next(self._keys)
            self._offers[key] = handover
            self._sink.offer(Offer(key, (0,) * len(missing), tuple(missing)))
        key = next(self._keys)
        self._keeps[key] = handover
        digests = tuple(block.digest for block in handover.blocks)
        ttl_s = handover.sequence.request.transfer_ttl_s
        self._sink.keep(Keep(key, handover.transfer.key, digests, ttl_s))

    def _try_again_soon(self, handover: _Handover) -> None:
        def again() -> None:
            self._again.discard(timer)
            self._try(handover, handover.blocks)

        timer = self._loop.call_later(AGAIN_S, again)
        self._again.add(timer)


def _transfer(sequence: MockSequence, key: bytes, block_size: int) -> Transfer:
    digests = sequence.blocks_of(sequence.prompt_tokens, block_size)
    return Transfer(key, sequence.prompt_tokens, digests[-1] if sequence.prompt_tokens % block_size else b"")
