"""Continuous batching over a block pool: no clock, no loop, so that every decision can be tested by itself.

A step is planned, takes its time, and is committed. Prompts are computed in chunks; a sequence with nothing
left of its context to compute yields a token, which is then the one token to compute. Blocks are taken as
they are needed; when there is none, the sequence that came last gives back its own, waits, and later computes
its context again.

With KV tiers a sequence may have to wait for them: for a lookup before it is admitted, then for blocks that are loaded.
A decode leg gets all its blocks at once and then waits for its KV, which somebody else has copied in and tells of
(`arrived`); a prefill leg that has got its token keeps its blocks until they have been copied away (`handed_over`).
Neither gives way to others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from dynamo_box.protocol.request import FinishReason, Transfer
from engines.contract import Output, SequenceRequest, StoredBlocks
from engines.mock.cache import BlockPool
from engines.mock.sequence import MockSequence, Work


class Tiers(Protocol):
    """What the KV tiers have to say, and are told. A sequence's `digests` are those that it has."""

    def look_ahead(self, waiting: Iterable[MockSequence]) -> None:
        """Those that wait, the next first."""

    def may_admit(self, sequence: MockSequence) -> bool:
        """False: not before something more is known of it."""

    def to_load(self, sequence: MockSequence) -> int:
        """Blocks after those that it has."""

    def admitted(self, sequence: MockSequence, blocks: int) -> None:
        """It has room for so many blocks: load them, and say when they are there (`Scheduler.arrived`)."""

    def computed(self, sequence: MockSequence) -> None:
        """It may have more full blocks."""

    def ended(self, sequence: MockSequence) -> None: ...


class Scheduler:
    """`context_length` and the pool bound a sequence; `stop_after` tokens end each one with "stop"."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        context_length: int,
        max_batch: int,
        chunk_tokens: int,
        ordinary: range,
        stop_after: int | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self.pool = pool
        self._tiers = tiers
        self.longest = min(context_length, pool.total * block_size)
        self._block_size = block_size
        self._max_batch = max_batch
        self._chunk_tokens = chunk_tokens
        self._ordinary = ordinary
        self._stop_after = stop_after
        self._by_key: dict[int, MockSequence] = {}
        self._running: list[MockSequence] = []
        self._waiting: deque[MockSequence] = deque()
        self._arriving: list[MockSequence] = []
        self._leaving: list[MockSequence] = []
        self._ending: list[tuple[MockSequence, FinishReason, str]] = []

    @property
    def running(self) -> int:
        """Sequences that have blocks."""
        return len(self._running) + len(self._arriving) + len(self._leaving)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: SequenceRequest) -> MockSequence:
        """Queue a request whose prompt is shorter than `longest`."""
        limit = min(request.sampling.max_tokens, self.longest - len(request.tokens))
        sequence = MockSequence(request, limit, self._ordinary)
        self._by_key[request.key] = sequence
        self._waiting.append(sequence)
        return sequence

    def cancel(self, key: int) -> None:
        """The next `plan` ends it."""
        sequence = self._by_key.get(key)
        if sequence is not None:
            self._end_soon(sequence, "cancelled")

    def awaits_first_token(self, key: int) -> bool:
        """Whether it is a decode leg that has said nothing yet."""
        sequence = self._by_key.get(key)
        return sequence is not None and sequence.request.leg == "decode" and not sequence.produced

    def fail(self, sequence: MockSequence, error: str) -> None:
        """The next `plan` ends it."""
        self._end_soon(sequence, "error", error)

    def plan(self) -> Work:
        """What the next step computes. Evictions and cancellations have happened when this returns."""
        work = Work(ended=[self._end(*ending) for ending in self._ending])
        self._ending.clear()
        if self._tiers is not None:
            self._tiers.look_ahead(self._waiting)
        budget = self._chunk_tokens
        index = 0
        while index < len(self._running):  # which gets shorter at its end when one has to give way
            sequence = self._running[index]
            index += 1
            tokens = 1 if sequence.decoding else min(budget, sequence.remaining)
            if tokens and not sequence.silent and self._make_room(sequence, tokens, work):
                work.shares.append((sequence, tokens))
                budget -= 0 if sequence.decoding else tokens
        if not work.preempted:
            self._admit(budget, work)
        return work

    def commit(self, work: Work) -> tuple[list[Output], list[StoredBlocks]]:
        """The step is done: its tokens, and the blocks that became reusable."""
        outputs: list[Output] = []
        stored: list[StoredBlocks] = []
        for sequence, tokens in work.shares:
            if sequence.ending:
                continue
            sequence.computed += tokens
            self._seal_full_blocks(sequence, stored)
            if self._tiers is not None:
                self._tiers.computed(sequence)
            if sequence.remaining == 0 and not sequence.silent:
                outputs.append(self._produce(sequence))
                if sequence.request.leg == "prefill" and outputs[-1].finish is None:
                    self._running.remove(sequence)
                    self._leaving.append(sequence)
                    work.prefilled.append(sequence)
        return outputs, stored

    # legs

    def arrived(self, sequence: MockSequence, tokens: int) -> list[StoredBlocks]:
        """The KV of the first `tokens` of one that waits for it is in its blocks, which became reusable. Nothing if it
        is about to end.
        """
        stored: list[StoredBlocks] = []
        if sequence in self._arriving and not sequence.ending:
            sequence.computed = max(sequence.computed, tokens)
            if not sequence.produced:
                sequence.cached_tokens = sequence.computed
            self._seal_full_blocks(sequence, stored)
            if self._tiers is not None:
                self._tiers.computed(sequence)
            self.compute_instead(sequence)
        return stored

    def compute_instead(self, sequence: MockSequence) -> None:
        """What has not arrived by now is computed."""
        sequence.arriving = 0
        if sequence in self._arriving:
            self._arriving.remove(sequence)
            self._running.append(sequence)

    def handed_over(self, sequence: MockSequence, transfer: Transfer | None, error: str = "") -> list[Output]:
        """The KV of a prefill leg has been copied away, or not for the reason `error`: it ends. Nothing if it has ended
        or is about to.
        """
        if sequence not in self._leaving or sequence.ending:
            return []
        output = self._end(sequence, "prefilled", error)
        output.transfer = transfer
        return [output]

    # planning

    def _admit(self, budget: int, work: Work) -> None:
        while self._waiting and len(self._running) + len(self._arriving) < self._max_batch:
            sequence = self._waiting[0]
            if budget <= 0 and not sequence.arriving:
                return
            self._reuse_prefix(sequence)
            if self._tiers is not None and not self._tiers.may_admit(sequence):
                self._give_back(sequence)
                return
            loads = self._tiers.to_load(sequence) if self._tiers is not None and not sequence.arriving else 0
            tokens = loads * self._block_size
            if not loads:
                tokens = sequence.remaining if sequence.arriving else min(budget, sequence.remaining)
            needed = self._blocks_missing(sequence, tokens)
            if needed > self.pool.available:
                self._give_back(sequence)
                return
            work.evicted += self.pool.open(needed)
            sequence.opened += needed
            self._waiting.popleft()
            if sequence.arriving or loads:
                self._arriving.append(sequence)
            if sequence.arriving:
                work.arriving.append(sequence)
                continue
            if self._tiers is not None:
                self._tiers.admitted(sequence, loads)
            if loads:
                continue
            self._running.append(sequence)
            work.shares.append((sequence, tokens))
            budget -= 0 if sequence.decoding else tokens

    def _reuse_prefix(self, sequence: MockSequence) -> None:
        """Hold the blocks that are cached, but compute at least the last token: its output is needed."""
        digests = sequence.digests_of(len(sequence.context) - 1, self._block_size)
        found = digests[: self.pool.match(digests)]
        self.pool.hold(found)
        sequence.digests = found
        sequence.computed = len(found) * self._block_size
        if not sequence.produced:
            sequence.cached_tokens = sequence.computed

    def _blocks_missing(self, sequence: MockSequence, tokens: int) -> int:
        needed = -(-(sequence.computed + tokens) // self._block_size)
        return needed - len(sequence.digests) - sequence.opened

    def _make_room(self, sequence: MockSequence, tokens: int, work: Work) -> bool:
        """Open the blocks that a running sequence needs; False if it had to give way itself."""
        needed = self._blocks_missing(sequence, tokens)
        while needed > self.pool.available:
            last = self._running.pop()
            self._give_back(last)
            self._waiting.appendleft(last)
            work.preempted = True
            if last is sequence:
                return False
        work.evicted += self.pool.open(needed)
        sequence.opened += needed
        return True

    def _give_back(self, sequence: MockSequence) -> None:
        self.pool.release(sequence.digests, sequence.opened)
        sequence.digests = []
        sequence.opened = 0
        sequence.computed = 0

    # committing

    def _seal_full_blocks(self, sequence: MockSequence, stored: list[StoredBlocks]) -> None:
        sealed = len(sequence.digests)
        if sequence.computed // self._block_size == sealed:
            return
        sequence.digests = sequence.digests_of(sequence.computed, self._block_size)
        full = sequence.digests[sealed:]
        sequence.opened -= len(full)
        # A block is here only if its parent is: those that are new are the last ones.
        new = [digest for digest in full if self.pool.seal(digest)]
        if new:
            first = len(sequence.digests) - len(new)
            stored.append(StoredBlocks(tuple(new), sequence.digests[first - 1] if first else b""))

    def _produce(self, sequence: MockSequence) -> Output:
        token = sequence.stream.next()
        sequence.context.append(token)
        first = sequence.produced == 1
        output = Output(sequence.request.key, (token,), cached_tokens=sequence.cached_tokens if first else 0)
        output.finish = self._finish(sequence, token)
        if output.finish is not None:
            self._end(sequence, output.finish)
        return output

    def _finish(self, sequence: MockSequence, token: int) -> FinishReason | None:
        produced = sequence.produced
        if produced >= sequence.request.sampling.min_tokens and (
            token in sequence.stops or produced + sequence.said_before == self._stop_after
        ):
            return "stop"
        return "length" if produced >= sequence.limit else None

    def _end_soon(self, sequence: MockSequence, finish: FinishReason, error: str = "") -> None:
        if not sequence.ending:
            sequence.ending = True
            self._ending.append((sequence, finish, error))

    def _end(self, sequence: MockSequence, finish: FinishReason, error: str = "") -> Output:
        if self._tiers is not None:
            self._tiers.ended(sequence)
        del self._by_key[sequence.request.key]
        for place in (self._running, self._arriving, self._leaving, self._waiting):
            if sequence in place:
                place.remove(sequence)
        self._give_back(sequence)
        return Output(sequence.request.key, finish=finish, error=error)
