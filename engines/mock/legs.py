"""Requests in two legs: KV that leaves for another worker, and KV that arrives from one.

No byte is copied. A prefill leg's KV takes its time over the link out of the pool, chunk by chunk behind the steps that
compute it, so that only what is left after the last step keeps the leg from ending; blocks that were cached here have
been copied when they were computed. A decode leg's takes its time over the link into the pool, all of it at once and
without what is cached here. Both links carry one copy after another.

What a transfer says is checked as far as it can be without the bytes: a transfer that the two legs don't agree on can't
be loaded. Whether it is still held is not known here.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import msgspec

from dynamo_box.kv.hashing import TOKEN_BYTES, block_digest, chain_digests
from dynamo_box.protocol.request import Transfer, pack_tokens
from engines.contract import SequenceRequest, Sink
from engines.mock.harm import after_flush, die
from engines.mock.options import MockOptions
from engines.mock.scheduler import Scheduler
from engines.mock.sequence import MockSequence, Work
from engines.mock.timing import Link

KEY_BYTES = 16


class Legs:
    """`wake` lets the step loop plan again."""

    def __init__(
        self, options: MockOptions, scheduler: Scheduler, sink: Sink, wake: Callable[[], None], block_size: int
    ) -> None:
        self._scheduler = scheduler
        self._sink = sink
        self._wake = wake
        self._block_size = block_size
        self._loop = asyncio.get_running_loop()
        self._out, self._in = Link(options), Link(options)
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self.handed_over = self.taken_over = self.failed = 0
        self.handover_seconds = 0.0

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def add(self, request: SequenceRequest) -> MockSequence:
        """Queue a request. A decode leg whose transfer can't be loaded computes its prompt, or fails if it must not."""
        problem = self._problem(request)
        if request.transfer is not None and (problem or request.leg != "decode"):
            request = msgspec.structs.replace(request, transfer=None)
        sequence = self._scheduler.add(request)
        if problem:
            self._transfer_failed(sequence, problem)
        return sequence

    # out

    def computed(self, work: Work) -> None:
        """A step is done: what it computed for prefill legs can leave."""
        now = self._loop.time()
        for sequence, tokens in work.shares:
            if sequence.request.leg == "prefill":
                self._out.copy(tokens, now)

    def hand_over(self, sequence: MockSequence) -> None:
        """A prefill leg has got its token."""
        harm = sequence.points.get("first_token")
        if harm == "stall":
            return
        if harm is not None:
            after_flush(lambda: die(harm))
        now = self._loop.time()
        self._at(self._out.copy(0, now), sequence, lambda: self._left(sequence, now))

    def _left(self, sequence: MockSequence, since: float) -> None:
        harm = sequence.points.get("handover")
        if harm == "stall":
            return
        if harm is not None:
            die(harm)
        transfer = None if harm == "fail" else self._transfer(sequence)
        ended = self._scheduler.handed_over(sequence, transfer, "" if transfer else "told to fail the hand-over")
        if not ended:
            return
        if transfer is None:
            self.failed += 1
        else:
            self.handed_over += 1
            self.handover_seconds += self._loop.time() - since
        self._sink.step(ended)
        self._wake()

    def _transfer(self, sequence: MockSequence) -> Transfer:
        request = sequence.request
        partial = self._partial_digest(request, len(request.tokens))
        return Transfer(secrets.token_bytes(KEY_BYTES), len(request.tokens), partial)

    # in

    def take_over(self, sequence: MockSequence) -> None:
        """A decode leg has got its blocks."""
        tokens = max(0, sequence.arriving - sequence.computed)
        self._at(self._in.copy(tokens, self._loop.time()), sequence, lambda: self._arrived(sequence))

    def _arrived(self, sequence: MockSequence) -> None:
        if sequence.ending:
            return
        harm = sequence.points.get("takeover")
        if harm == "stall":
            return
        if harm is not None:
            die(harm)
        if harm == "fail":
            self._transfer_failed(sequence, "told to fail the take-over")
        else:
            self.taken_over += 1
            if stored := self._scheduler.arrived(sequence):
                self._sink.step((), stored)
        self._wake()

    def _transfer_failed(self, sequence: MockSequence, problem: str) -> None:
        self.failed += 1
        if sequence.request.must_transfer:
            self._scheduler.fail(sequence, f"the KV of the prompt can't be loaded: {problem}")
        else:
            self._scheduler.compute_instead(sequence)

    def _problem(self, request: SequenceRequest) -> str:
        """Why a decode leg's transfer can't be loaded, or ""."""
        if request.leg != "decode":
            return ""
        transfer, last = request.transfer, len(request.tokens) - 1
        if transfer is None:
            return "there is no transfer"
        if len(transfer.key) != KEY_BYTES:
            return f"its key has {len(transfer.key)} bytes, not {KEY_BYTES}"
        if transfer.tokens != last:
            return f"it covers {transfer.tokens} tokens, and there are {last} before the last one"
        if transfer.partial != self._partial_digest(request, last):
            return "its partial block is that of other tokens"
        return ""

    # both

    def _at(self, when: float, sequence: MockSequence, action: Callable[[], None]) -> None:
        key = sequence.request.key

        def act() -> None:
            del self._timers[key]
            action()

        self._timers[key] = self._loop.call_at(when, act)

    def _partial_digest(self, request: SequenceRequest, tokens: int) -> bytes:
        """Of what the full blocks of the first `tokens` leave over; b"" if nothing."""
        if tokens % self._block_size == 0:
            return b""
        packed = pack_tokens(request.tokens[:tokens])
        chain = chain_digests(packed, self._block_size, request.isolation)
        rest = packed[len(chain) * self._block_size * TOKEN_BYTES :]
        return block_digest(chain[-1] if chain else b"", rest, request.isolation)
