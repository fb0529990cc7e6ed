"""Continuous batching over a block pool: no clock, no loop, so that every decision can be tested by itself.

A step is planned, takes its time, and is committed. Prompts are computed in chunks; a sequence with nothing
left of its context to compute yields a token, which is then the one token to compute. Blocks are taken as
they are needed; when there is none, the sequence that came last gives back its own, waits, and later computes
its context again.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from dynamo_box.kv.hashing import chain_digests
from dynamo_box.protocol.request import FinishReason, pack_tokens
from engines.contract import Output, RemovedBlocks, SequenceRequest, StoredBlocks
from engines.mock.cache import BlockPool
from engines.mock.tokens import TokenStream


class MockSequence:
    """One sequence. `context` is the prompt and the output so far, `computed` how much of it has KV; `chain`
    names its full blocks as far as known, `digests` those that it holds, and `opened` counts the blocks beyond
    them. It makes no token beyond `silent_after`.
    """

    __slots__ = (
        "cached_tokens",
        "cancelled",
        "chain",
        "computed",
        "context",
        "digests",
        "limit",
        "opened",
        "prompt_tokens",
        "request",
        "silent_after",
        "stops",
        "stream",
    )

    def __init__(self, request: SequenceRequest, limit: int, ordinary: range) -> None:
        self.request = request
        self.limit = limit
        self.context = array("I", request.tokens)
        self.prompt_tokens = len(request.tokens)
        self.stream = TokenStream(pack_tokens(request.tokens), request.sampling, ordinary)
        sampling = request.sampling
        self.stops = frozenset(() if sampling.ignore_eos else sampling.stop_token_ids)
        self.chain: list[bytes] = []
        self.digests: list[bytes] = []
        self.opened = 0
        self.computed = 0
        self.cached_tokens = 0
        self.cancelled = False
        self.silent_after: int | None = None

    @property
    def produced(self) -> int:
        return len(self.context) - self.prompt_tokens

    @property
    def silent(self) -> bool:
        return self.silent_after is not None and self.produced >= self.silent_after

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.context) - self.computed

    @property
    def decoding(self) -> bool:
        return self.produced > 0 and self.remaining == 1


@dataclass
class Work:
    """A planned step: how many tokens each sequence computes, and what the planning itself brought about."""

    shares: list[tuple[MockSequence, int]] = field(default_factory=list)
    evicted: list[bytes] = field(default_factory=list)
    ended: list[Output] = field(default_factory=list)
    preempted: bool = False

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for sequence, tokens in self.shares if not sequence.decoding)

    @property
    def decoding(self) -> int:
        return sum(sequence.decoding for sequence, _ in self.shares)

    @property
    def removed(self) -> list[RemovedBlocks]:
        return [RemovedBlocks(tuple(self.evicted))] if self.evicted else []


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
    ) -> None:
        self.pool = pool
        self.longest = min(context_length, pool.total * block_size)
        self._block_size = block_size
        self._max_batch = max_batch
        self._chunk_tokens = chunk_tokens
        self._ordinary = ordinary
        self._stop_after = stop_after
        self._by_key: dict[int, MockSequence] = {}
        self._running: list[MockSequence] = []
        self._waiting: deque[MockSequence] = deque()
        self._cancelled: list[MockSequence] = []

    @property
    def running(self) -> int:
        return len(self._running)

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
        if sequence is not None and not sequence.cancelled:
            sequence.cancelled = True
            self._cancelled.append(sequence)

    def plan(self) -> Work:
        """What the next step computes. Evictions and cancellations have happened when this returns."""
        work = Work(ended=[self._end(sequence, "cancelled") for sequence in self._cancelled])
        self._cancelled.clear()
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
            if sequence.cancelled:
                continue
            sequence.computed += tokens
            self._seal_full_blocks(sequence, stored)
            if sequence.remaining == 0 and not sequence.silent:
                outputs.append(self._produce(sequence))
        return outputs, stored

    # planning

    def _admit(self, budget: int, work: Work) -> None:
        while self._waiting and budget > 0 and len(self._running) < self._max_batch:
            sequence = self._waiting[0]
            self._reuse_prefix(sequence)
            tokens = min(budget, sequence.remaining)
            needed = self._blocks_missing(sequence, tokens)
            if needed > self.pool.available:
                self._give_back(sequence)
                return
            work.evicted += self.pool.open(needed)
            sequence.opened += needed
            self._running.append(self._waiting.popleft())
            work.shares.append((sequence, tokens))
            budget -= tokens

    def _reuse_prefix(self, sequence: MockSequence) -> None:
        """Hold the blocks that are cached, but compute at least the last token: its output is needed."""
        digests = self._chain(sequence, len(sequence.context) - 1)
        found = digests[: self.pool.match(digests)]
        self.pool.hold(found)
        sequence.digests = found
        sequence.computed = len(found) * self._block_size
        if not sequence.produced:
            sequence.cached_tokens = sequence.computed

    def _chain(self, sequence: MockSequence, tokens: int) -> list[bytes]:
        """The digests of the full blocks in the first `tokens` of a sequence, each computed once."""
        size, chain = self._block_size, sequence.chain
        if tokens // size > len(chain):
            packed = pack_tokens(sequence.context[len(chain) * size : tokens])
            chain += chain_digests(packed, size, sequence.request.isolation, chain[-1] if chain else b"")
        return chain[: tokens // size]

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
        sequence.digests = self._chain(sequence, sequence.computed)
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
            token in sequence.stops or produced == self._stop_after
        ):
            return "stop"
        return "length" if produced >= sequence.limit else None

    def _end(self, sequence: MockSequence, finish: FinishReason) -> Output:
        del self._by_key[sequence.request.key]
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._give_back(sequence)
        return Output(sequence.request.key, finish=finish)
