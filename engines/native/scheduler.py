"""Which tokens are computed in the next step. Decides on lengths and blocks alone; knows nothing of tensors.

A step computes one token of every sequence that decodes, and with what is left of the token budget the
prompts, in chunks. A sequence holds blocks for its whole prompt from admission on and takes one more whenever
it grows over a block's end. When none is left, the running sequence of the lowest rank gives its blocks back
and waits again at the place it came from; its full blocks usually survive as cache. The highest-ranked
sequence is never the victim of another, and every sequence alone fits the pool (the engine's context is cut
to it), so something always moves.

With KV tiers a sequence may have to wait for them: for a lookup before it is admitted, or for what another loads of the
same prefix, then for its blocks to be loaded, or for blocks that are pinned while they are copied out. Each of those
ends by itself. A prefill leg that has its token keeps its blocks until they are copied, but has no place in the batch
any more.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import Protocol

from engines.native.blocks import BlockPool
from engines.native.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the KV of `count` tokens of a sequence from `sequence.computed` on; it samples if none remain
    then.
    """

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        return self.count == self.sequence.remaining


class Onboarding(Protocol):
    """What the tiers have to say. `hits` blocks of the sequence are in the pool."""

    def look_ahead(self, waiting: list[Sequence]) -> None:
        """Those that wait, the next first."""

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether more of its prefix than the pool has is being loaded for another: it is passed over meanwhile."""

    def may_admit(self, sequence: Sequence, hits: int) -> bool:
        """False: not before something more is known of it (`sequence.seeking`)."""

    def admitted(self, sequence: Sequence, hits: int) -> None:
        """It has blocks now: begin to load into those after the hits (`sequence.loading`), or don't, or end it
        (`sequence.outcome`).
        """


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_batch: int,
        max_batch_tokens: int,
        onboarding: Onboarding | None = None,
    ) -> None:
        self._pool = pool
        self._onboarding = onboarding
        self._block_size = block_size
        self._max_batch = max_batch
        self._max_batch_tokens = max_batch_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, wherever it was."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._drop_blocks(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Work]:
        """The next step, those that decode first. Empty only if there is no sequence at all, or if the tiers are waited
        for.
        """
        if self._onboarding is not None:
            self._onboarding.look_ahead(self.waiting)
        preemptions = self.preemptions
        steps: list[Work] = []
        budget = self._max_batch_tokens
        for sequence in sorted(self.running, key=lambda one: (one.remaining > 1, one.rank)):
            if not sequence.computes or budget == 0 or not self._make_room(sequence):
                continue
            steps.append(Work(sequence, min(sequence.remaining, budget)))
            budget -= steps[-1].count
        while budget and self.preemptions == preemptions and self._admit_next():
            sequence = self.running[-1]
            if sequence.computes:
                steps.append(Work(sequence, min(sequence.remaining, budget)))
                budget -= steps[-1].count
        return steps

    def computed(self, work: Work) -> None:
        """The step was carried out: its full blocks become reusable. Called before the sampled token is
        appended.
        """
        work.sequence.computed += work.count
        self._publish(work.sequence)

    def loaded(self, sequence: Sequence, tokens: int) -> None:
        """The KV of the first `tokens` of a sequence that was loading is in its blocks; from now on it computes."""
        sequence.loading = False
        sequence.computed = tokens
        self._count_cached(sequence)
        self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.computed // self._block_size
        if full > sequence.published:
            digests = sequence.digest_blocks(self._block_size)
            for place in range(sequence.published, full):
                parent = digests[place - 1] if place else b""
                self._pool.publish(sequence.blocks[place], digests[place], parent)
            sequence.published = full

    def _make_room(self, sequence: Sequence) -> bool:
        """Hold blocks for all its tokens, at the expense of the lowest-ranked; False if it was itself
        preempted, or has to wait for blocks that copies hold.

        Only sequences that decode grow, and they come in the order of their ranks, so a victim is never in
        the step yet.
        """
        if sequence not in self.running:
            return False
        needed = self._blocks_for(sequence) - len(sequence.blocks)
        while self._pool.available < needed:
            victim = max((one for one in self.running if not one.copying), key=_rank)
            if victim is sequence and (self._pool.pinned or any(one.copying for one in self.running)):
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._pool.allocate(needed)
        return True

    def _admit_next(self) -> bool:
        """Start the first of the queue if it fits beside the others with a block to grow for each of them."""
        sequence = next((one for one in self.waiting if not one.seeking and not self._is_coming(one)), None)
        if sequence is None or sum(not one.handing for one in self.running) >= self._max_batch:
            return False
        reusable = (len(sequence.tokens) - 1) // self._block_size  # the last token is always computed: it samples
        hits = self._pool.match(sequence.digest_blocks(self._block_size)[:reusable])
        needed = self._blocks_for(sequence) - len(hits)
        if needed + len(self.running) > self._pool.available - self._pool.idle_among(hits):
            return False
        if self._onboarding is not None and not self._onboarding.may_admit(sequence, len(hits)):
            return False
        self.waiting.remove(sequence)
        self._pool.share(hits)
        sequence.blocks = hits + self._pool.allocate(needed)
        sequence.computed = len(hits) * self._block_size
        sequence.published = len(hits)
        self._count_cached(sequence)
        self.running.append(sequence)
        if self._onboarding is not None:
            self._onboarding.admitted(sequence, len(hits))
        return True

    def _is_coming(self, sequence: Sequence) -> bool:
        return self._onboarding is not None and self._onboarding.is_coming(sequence)

    def _count_cached(self, sequence: Sequence) -> None:
        if not sequence.generated:
            sequence.cached_tokens = sequence.computed

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(victim)
        self._drop_blocks(victim)
        victim.sought = None
        self.add(victim)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0

    def _blocks_for(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
