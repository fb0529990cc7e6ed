"""An engine with tiers whose computing and copying are pretended. A block is used only with what it should hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fake_store import Contents, FakeStore
from hypothesis import strategies as st

from dynamo_box.kv.client.jobs import Seek
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.kv import KvLayout
from dynamo_box.protocol.request import Sampling
from dynamo_box.protocol.spec import ModelSpec, Offload, WorkerSpec
from engines.contract import SequenceRequest
from engines.native.blocks import BlockPool
from engines.native.scheduler import Scheduler
from engines.native.sequence import Sequence
from engines.native.tiering import Tiering

BLOCK = 4
LAYOUT = KvLayout("model", "pretended", BLOCK, 64, "none")


class Box:
    """A pool, a scheduler and tiers; a step computes by writing down which tokens a block has."""

    def __init__(self, blocks: int = 32, batch: int = 4, budget: int = 64, **offload: int | bool) -> None:
        self.pool = BlockPool(blocks)
        self.contents = Contents(blocks)
        self.store = FakeStore(self.contents)
        spec = WorkerSpec(
            name="worker",
            model=ModelSpec("m", "", "model", 1000, BLOCK),
            engine="native",
            role="aggregated",
            run_dir="",
            threads=1,
            device="cpu",
            kv_bytes=0,
            max_batch=batch,
            offload=Offload(**offload),  # type: ignore[arg-type]
        )
        self.tiering = Tiering(spec, LAYOUT, self.contents, self.pool, self.store)
        self._bounds = {"max_batch": batch, "max_batch_tokens": budget}
        self.scheduler = self._make_scheduler()
        self.living: list[Sequence] = []
        self.arrivals = self.computed_prompt_tokens = 0

    def add(self, tokens: list[int], output: int = 1, **request: object) -> Sequence:
        sampling = Sampling(max_tokens=output, ignore_eos=True)
        asked = SequenceRequest(self.arrivals, f"r{self.arrivals}", tokens, sampling, b"k", **request)  # type: ignore[arg-type]
        sequence = Sequence.of(asked, self.arrivals, frozenset())
        self.arrivals += 1
        self.living.append(sequence)
        self.scheduler.add(sequence)
        self.tiering.added(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        sequence.cancelled = True
        self.tiering.cancelled(sequence)

    def step(self) -> bool:
        """As the runner does it; whether something was computed."""
        ended = self._end_what_is_over()
        works = self.scheduler.schedule()
        ended |= self._end_what_is_over()
        assert works or not self.living or self.tiering.awaited or ended, "nothing moves and nothing is awaited"
        sampling = [work.sequence for work in works if work.samples]
        for work in works:
            self._compute(work.sequence, work.count)
            self.scheduler.computed(work)
        for work in works:
            self.tiering.computed(work.sequence)
        for sequence in sampling:
            sequence.tokens.append(2)
            if sequence.finish_after(2, context_length=BLOCK * self.pool.total) is not None:
                self.end(sequence)
            elif sequence.request.leg == "prefill":
                self.tiering.handovers.begin(sequence)
        if not self.living:
            self.pool.check_idle()
        self.tiering.changed(self.pool.take_events())
        self.pool.check_integrity()
        self.tiering.offload()
        return bool(works)

    def _end_what_is_over(self) -> bool:
        over = [one for one in self.living if one.is_over]
        for sequence in over:
            self.end(sequence)
        return bool(over)

    def _compute(self, sequence: Sequence, count: int) -> None:
        assert sequence.computes
        for place in range(sequence.computed // BLOCK):
            wanted = tuple(sequence.tokens[: (place + 1) * BLOCK])
            assert self.contents.of[sequence.blocks[place]] == wanted, f"block {place} of {sequence.request.request_id}"
        if sequence.computed % BLOCK:
            partial = self.contents.of[sequence.blocks[sequence.computed // BLOCK]]
            assert partial == tuple(sequence.tokens[: sequence.computed]), "the partial block"
        self.computed_prompt_tokens += max(0, min(count, sequence.prompt_length - sequence.computed))
        for position in range(sequence.computed, sequence.computed + count):
            self.contents.write(sequence.blocks[position // BLOCK], tuple(sequence.tokens[: position + 1]))

    def end(self, sequence: Sequence) -> None:
        self.living.remove(sequence)
        self.scheduler.remove(sequence)
        self.tiering.ended(sequence)

    def compute(self) -> None:
        """A step that computes, after as many lookups as it needs."""
        while not self.step():
            self.answer(Seek)

    def answer(self, kind: type = object, chance: Callable[[float], bool] = lambda _: False) -> None:
        for job in [one for one in self.store.due() if isinstance(one, kind)]:
            self.tiering.take(self.store.answer(job, chance), self.scheduler)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.living or self.store.jobs or self.tiering.offloading:
            self.step()
            self.answer()

    def figures(self) -> WorkerFigures:
        return self.tiering.add_to(WorkerFigures())

    def forget(self) -> None:
        """What a sleep does to the pool."""
        self.run()
        blocks = self.pool.total
        self.pool = BlockPool(blocks)
        self.contents.of = [(-2,)] * blocks
        self.tiering.use(self.pool)
        self.scheduler = self._make_scheduler()

    def _make_scheduler(self) -> Scheduler:
        return Scheduler(self.pool, block_size=BLOCK, onboarding=self.tiering.onboarding, **self._bounds)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a box, with `extra` tokens in a step beside one for each sequence."""

    blocks: int
    batch: int
    extra: int
    pinned: int
    min_priority: int

    def box(self) -> Box:
        budget = self.batch + self.extra
        return Box(self.blocks, self.batch, budget, pinned_blocks=self.pinned, min_priority=self.min_priority)


sizes = st.builds(
    Sizes,
    blocks=st.integers(8, 20),
    batch=st.integers(1, 5),
    extra=st.integers(0, 20),
    pinned=st.integers(1, 32),
    min_priority=st.integers(0, 60),
)
