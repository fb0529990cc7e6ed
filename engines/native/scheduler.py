"""Which tokens are computed in the next step. Decides on lengths and blocks alone; knows nothing of tensors.

A step computes one token of every sequence that decodes, and with what is left of the token budget the
prompts, in chunks. A sequence holds blocks for its whole prompt from admission on and takes one more whenever
it grows over a block's end. When none is left, the running sequence of the lowest rank gives its blocks back
and waits again at the place it came from; its full blocks usually survive as cache. The highest-ranked
sequence is never the victim of another, and every sequence alone fits the pool (the engine's context is cut
to it), so something always moves.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

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


class Scheduler:
    def __init__(self, pool: BlockPool, *, block_size: int, max_batch: int, max_batch_tokens: int) -> None:
        self._pool = pool
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
        """The next step, those that decode first. Empty only if there is no sequence at all."""
        preemptions = self.preemptions
        steps: list[Work] = []
        budget = self._max_batch_tokens
        for sequence in sorted(self.running, key=lambda one: (one.remaining > 1, one.rank)):
            if budget == 0 or not self._make_room(sequence):
                continue
            steps.append(Work(sequence, min(sequence.remaining, budget)))
            budget -= steps[-1].count
        while budget and self.preemptions == preemptions and self._admit_next():
            sequence = self.running[-1]
            steps.append(Work(sequence, min(sequence.remaining, budget)))
            budget -= steps[-1].count
        return steps

    def computed(self, work: Work) -> None:
        """The step was carried out: its full blocks become reusable. Called before the sampled token is
        appended.
        """
        sequence = work.sequence
        sequence.computed += work.count
        full = sequence.computed // self._block_size
        if full > sequence.published:
            digests = sequence.digest_blocks(self._block_size)
            for place in range(sequence.published, full):
                parent = digests[place - 1] if place else b""
                self._pool.publish(sequence.blocks[place], digests[place], parent)
            sequence.published = full

    def _make_room(self, sequence: Sequence) -> bool:
        """Hold blocks for all its tokens, at the expense of the lowest-ranked; False if it was itself
        preempted.

        Only sequences that decode grow, and they come in the order of their ranks, so a victim is never in
        the step yet.
        """
        if sequence not in self.running:
            return False
        needed = self._blocks_for(sequence) - len(sequence.blocks)
        while self._pool.available < needed:
            victim = max(self.running, key=_rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._pool.allocate(needed)
        return True

    def _admit_next(self) -> bool:
        """Start the first of the queue if it fits beside the others with a block to grow for each of them."""
        if not self.waiting or len(self.running) >= self._max_batch:
            return False
        sequence = self.waiting[0]
        reusable = (len(sequence.tokens) - 1) // self._block_size  # the last token is always computed: it samples
        hits = self._pool.match(sequence.digest_blocks(self._block_size)[:reusable])
        needed = self._blocks_for(sequence) - len(hits)
        if needed + len(self.running) > self._pool.available - self._pool.idle_among(hits):
            return False
        del self.waiting[0]
        self._pool.share(hits)
        sequence.blocks = hits + self._pool.allocate(needed)
        sequence.computed = len(hits) * self._block_size
        sequence.published = len(hits)
        if not sequence.generated:
            sequence.cached_tokens = sequence.computed
        self.running.append(sequence)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(victim)
        self._drop_blocks(victim)
        self.add(victim)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0

    def _blocks_for(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
