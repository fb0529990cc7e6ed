"""From the KV tiers to the mock's pool, before a prompt is computed.

    waits ──Seek──► seeking ──Sought──► waits, what was found is leased ──admitted──► loading ──Fetched──► computes

As in the native engine, with the same jobs; only the rate at which prompts are computed is known rather than measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, islice

from dynamo_box.kv.client.jobs import Fetch, Fetched, Forgo, Seek, Sought, Source
from dynamo_box.kv.onboard import PROBE_AFTER, Rates, choose
from dynamo_box.protocol.kv import MAX_BATCH
from engines.mock.cache import BlockPool
from engines.mock.options import MockOptions
from engines.mock.sequence import Lookup, MockSequence
from engines.mock.timing import Step, step_seconds


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a load: the sequence's first `blocks` have arrived. Those from `first` on were loaded, with these
    `priorities`; `problem` says why there are no more.
    """

    sequence: MockSequence
    first: int
    blocks: int
    priorities: tuple[int | None, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Loading:
    sequence: MockSequence
    first: int
    priorities: tuple[int | None, ...]
    done: Callable[[Loaded], None]


class Onboarding:
    """`arrived` is told of sequences whose prompts were looked for, decode legs aside. At most `ahead` of those that
    wait are looked up.
    """

    def __init__(
        self,
        pool: BlockPool,
        source: Source,
        options: MockOptions,
        *,
        block_size: int,
        ahead: int,
        arrived: Callable[[Loaded], None],
    ) -> None:
        self._pool = pool
        self._source = source
        self._options = options
        self._block_size = block_size
        self._ahead = ahead
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._keys = count(1)
        self._seeks: dict[int, tuple[MockSequence, int] | None] = {}
        """None: what is found is of no use."""
        self._loading: dict[int, _Loading] = {}
        self._against = 0
        self.loads = self.recomputes = 0

    # for the scheduler

    def look_ahead(self, waiting: Iterable[MockSequence]) -> None:
        for sequence in islice(waiting, self._ahead):
            if sequence.lookup is None and not sequence.seeking:
                self._look_up(sequence, self._pool.match(self._reusable(sequence)))

    def may_admit(self, sequence: MockSequence) -> bool:
        """False: not before something more is known of it."""
        hits = len(sequence.digests)
        if not sequence.seeking and (sequence.lookup is None or hits < sequence.lookup.first):
            self._give_back(sequence)
            self._look_up(sequence, hits)
        return not sequence.seeking

    def to_load(self, sequence: MockSequence) -> int:
        """How many blocks after those that it has are worth loading."""
        hits, found = len(sequence.digests), sequence.lookup
        tiers = found.tiers[hits - found.first :] if found is not None else ""
        if not tiers:
            return 0
        size = self._block_size
        rates = Rates(self._source.rates(), self._prefill_rate(hits * size, len(tiers) * size))
        block_bytes = self._options.kv_bytes_per_token * size
        blocks = choose(tiers, block_bytes=block_bytes, block_size=size, rates=rates).blocks
        return len(tiers) if blocks < len(tiers) and self._against >= PROBE_AFTER else blocks

    def admitted(self, sequence: MockSequence, blocks: int) -> None:
        """It has room for so many blocks that are to be loaded."""
        found, hits = sequence.lookup, len(sequence.digests)
        there = len(found.tiers) - (hits - found.first) if found is not None else 0
        if there > 0:
            self._against = self._against + 1 if blocks < there else 0
            self.recomputes += not blocks
        if blocks:
            self.loads += 1
            self._fetch(sequence, hits, blocks, self._arrived)
        else:
            self._give_back(sequence)

    def ended(self, sequence: MockSequence) -> None:
        sequence.seeking = False
        self._give_back(sequence)

    # for decode legs

    def claim(self, sequence: MockSequence, digests: Iterable[bytes], hold: bytes) -> None:
        """Look up what was handed over; what is found is leased, and the hold on it ends."""
        sequence.seeking = True
        self._seek(Seek(next(self._keys), tuple(digests), hold), (sequence, 0))

    def discard(self, hold: bytes) -> None:
        """End a hold that nobody will claim."""
        self._seek(Seek(next(self._keys), (), hold), None)

    def take_over(self, sequence: MockSequence, done: Callable[[Loaded], None]) -> None:
        """Load what is missing of what was claimed: all of it, or nothing."""
        hits, wanted = len(sequence.digests), -(-sequence.arriving // self._block_size)
        found = len(sequence.lookup.tiers) if sequence.lookup is not None else 0
        if hits < wanted <= found:
            self.loads += 1
            self._fetch(sequence, hits, wanted - hits, done)
            return
        self._give_back(sequence)
        problem = "" if hits >= wanted else f"{max(found, hits)} of its {wanted} blocks are there"
        self._loop.call_soon(done, Loaded(sequence, hits, hits, (), problem))

    # results

    def sought(self, result: Sought) -> None:
        seek = self._seeks.pop(result.key)
        if seek is None or not seek[0].seeking:
            if result.lease:
                self._source.forgo(Forgo(result.lease))
            return
        sequence, first = seek
        sequence.seeking = False
        sequence.lookup = Lookup(first, result.tiers, result.lease, result.priorities)

    def fetched(self, result: Fetched) -> None:
        loading = self._loading.pop(result.key)
        loaded = min(result.count, len(loading.priorities))
        problem = ""
        if loaded < len(loading.priorities):
            problem = result.error or "a block failed its check"
        priorities = loading.priorities[:loaded]
        loading.done(Loaded(loading.sequence, loading.first, loading.first + loaded, priorities, problem))

    # details

    def _fetch(self, sequence: MockSequence, hits: int, blocks: int, done: Callable[[Loaded], None]) -> None:
        found, sequence.lookup = sequence.lookup, None
        assert found is not None
        skip, key = hits - found.first, next(self._keys)
        self._loading[key] = _Loading(sequence, hits, found.priorities[skip : skip + blocks], done)
        self._source.fetch(Fetch(key, found.lease, (0,) * blocks, skip))

    def _look_up(self, sequence: MockSequence, hits: int) -> None:
        wanted = self._reusable(sequence)[hits : hits + MAX_BATCH]
        if not wanted or self._source.status:
            sequence.lookup = Lookup(0 if wanted else hits)
            return
        sequence.seeking = True
        self._seek(Seek(next(self._keys), tuple(wanted)), (sequence, hits))

    def _seek(self, job: Seek, seek: tuple[MockSequence, int] | None) -> None:
        self._seeks[job.key] = seek
        self._source.seek(job)

    def _give_back(self, sequence: MockSequence) -> None:
        found, sequence.lookup = sequence.lookup, None
        if found is not None and found.lease:
            self._source.forgo(Forgo(found.lease))

    def _reusable(self, sequence: MockSequence) -> list[bytes]:
        return sequence.digests_of(len(sequence.context) - 1, self._block_size)

    def _prefill_rate(self, before: int, tokens: int) -> float | None:
        """Tokens a second, for a prompt that goes on after `before`; None: no time at all."""
        pairs = tokens * before + tokens * (tokens + 1) // 2
        seconds = step_seconds(self._options, Step(tokens, 0, pairs, before + tokens))
        return tokens / seconds if seconds else None
