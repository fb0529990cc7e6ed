"""Requests in two legs: KV that leaves for another worker, and KV that arrives from one (see `handing.py` for how).

What a transfer says is checked as far as it can be without the bytes: a transfer that the two legs don't agree on can't
be loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_box.protocol.kv import DIGEST_BYTES
from dynamo_box.protocol.request import Transfer
from engines.contract import SequenceRequest, Sink
from engines.mock.handing import Way
from engines.mock.harm import after_flush, die
from engines.mock.onboarding import Loaded
from engines.mock.scheduler import Scheduler
from engines.mock.sequence import MockSequence


class Legs:
    """`wake` lets the step loop plan again."""

    def __init__(self, way: Way, scheduler: Scheduler, sink: Sink, wake: Callable[[], None], block_size: int) -> None:
        self._way = way
        self._scheduler = scheduler
        self._sink = sink
        self._wake = wake
        self._block_size = block_size
        self._loop = asyncio.get_running_loop()
        self.computed = way.computed
        self.handed_over = self.taken_over = self.failed = 0
        self.handover_seconds = 0.0

    def add(self, request: SequenceRequest) -> MockSequence:
        """Queue a request. A decode leg whose transfer can't be loaded computes its prompt, or fails if it must not."""
        sequence = self._scheduler.add(request)
        if request.leg != "decode":
            return sequence
        if problem := self._problem(sequence):
            sequence.arriving = 0
            self._transfer_failed(sequence, problem)
        elif request.transfer is not None:
            self._way.claim(sequence, request.transfer)
        return sequence

    # out

    def hand_over(self, sequence: MockSequence) -> None:
        """A prefill leg has got its token."""
        harm = sequence.points.get("first_token")
        if harm == "stall":
            return
        if harm is not None:
            after_flush(lambda: die(harm))
        since = self._loop.time()
        self._way.hand_over(sequence, lambda transfer, error: self._left(sequence, transfer, error, since))

    def _left(self, sequence: MockSequence, transfer: Transfer | None, error: str, since: float) -> None:
        harm = sequence.points.get("handover")
        if harm == "stall":
            return
        if harm is not None:
            die(harm)
        made = transfer
        if harm == "fail":
            transfer, error = None, "told to fail the hand-over"
        ended = self._scheduler.handed_over(sequence, transfer, error)
        if made is not None and (transfer is None or not ended):
            self._way.give_up(made.key)
        if not ended:
            return
        if transfer is None:
            self.failed += 1
        else:
            self.handed_over += 1
            self.handover_seconds += self._loop.time() - since
        self._sink.step(ended)
        self._wake()

    # in

    def take_over(self, sequence: MockSequence) -> None:
        """A decode leg has got its blocks."""
        self._way.take_over(sequence, self._arrived)

    def _arrived(self, loaded: Loaded) -> None:
        sequence = loaded.sequence
        if sequence.ending:
            return
        harm = sequence.points.get("takeover")
        if harm == "stall":
            return
        if harm is not None:
            die(harm)
        if harm == "fail" or loaded.problem:
            self._transfer_failed(sequence, loaded.problem or "told to fail the take-over")
        else:
            self.taken_over += 1
            if stored := self._scheduler.arrived(sequence, sequence.arriving):
                self._sink.step((), stored)
        self._wake()

    def _transfer_failed(self, sequence: MockSequence, problem: str) -> None:
        self.failed += 1
        if sequence.request.must_transfer:
            self._scheduler.fail(sequence, f"the KV of the prompt can't be loaded: {problem}")
        else:
            self._scheduler.compute_instead(sequence)

    def _problem(self, sequence: MockSequence) -> str:
        """Why a decode leg's transfer can't be loaded, or ""."""
        transfer, last = sequence.request.transfer, sequence.prompt_tokens - 1
        if transfer is None:
            return "there is no transfer"
        if len(transfer.key) != DIGEST_BYTES:
            return f"its key has {len(transfer.key)} bytes, not {DIGEST_BYTES}"
        if transfer.tokens != last:
            return f"it covers {transfer.tokens} tokens, and there are {last} before the last one"
        partial = sequence.blocks_of(last, self._block_size)[-1] if last % self._block_size else b""
        if transfer.partial != partial:
            return "its partial block is that of other tokens"
        return ""
