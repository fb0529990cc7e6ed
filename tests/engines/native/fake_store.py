"""A stand-in for `Tiers` that answers when it is told to, and insists on what an engine has promised.

What lies in a block is pretended: `contents[block]` is the tokens whose KV is there, of which a copy takes the whole.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dynamo_box.kv.client.jobs import Fetch, Fetched, Forgo, Keep, Kept, Offer, Offered, Result, Seek, Sought
from dynamo_box.kv.client.ledger import Totals

Content = tuple[int, ...]
Job = Offer | Keep | Seek | Fetch
GARBAGE: Content = (-1,)


class Contents:
    """What lies in the blocks of a pool. Implements `tiering.Pool` as far as the engine itself uses it."""

    def __init__(self, blocks: int) -> None:
        self.of: list[Content] = [()] * blocks
        self.read: Counter[int] = Counter()
        self.written: set[int] = set()

    def clear(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.write(block, ())

    def write(self, block: int, content: Content) -> None:
        assert not self.read[block], f"block {block} is written while it is copied out"
        assert block not in self.written, f"block {block} is written while it is copied in"
        self.of[block] = content

    def copy_out(self, blocks: Sequence[int], slots: Sequence[memoryview]) -> None:
        raise NotImplementedError

    def copy_in(self, slots: Sequence[memoryview], blocks: Sequence[int]) -> None:
        raise NotImplementedError

    def prepare(self) -> bool:
        raise NotImplementedError


@dataclass
class FakeStore:
    """Jobs lie in `jobs` until `answer`. `stored` is what it has, by digest: content, tier letter, priority."""

    contents: Contents
    status: str = ""
    speed: float | None = None
    jobs: list[Job] = field(default_factory=list)
    stored: dict[bytes, tuple[Content, str, int | None]] = field(default_factory=dict)
    leases: dict[int, list[bytes]] = field(default_factory=dict)
    holds: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    offers: list[Offer] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    found: int = 0
    loaded: int = 0
    next_lease: int = 1

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def rates(self) -> dict[str, float | None]:
        return {"2": self.speed, "3": self.speed}

    def totals(self) -> Totals:
        return Totals(stored=len(self.stored))

    def offer(self, job: Offer) -> None:
        assert len(job.pool_blocks) == len(job.blocks) == len(set(job.pool_blocks)) > 0
        for one, after in zip(job.blocks, job.blocks[1:], strict=False):
            assert after.parent == one.digest, "an offer of more than one chain"
        self.contents.read.update(job.pool_blocks)
        self.offers.append(job)
        self.jobs.append(job)

    def keep(self, job: Keep) -> None:
        assert job.digests
        self.jobs.append(job)

    def seek(self, job: Seek) -> None:
        assert job.digests or job.claim
        self.jobs.append(job)

    def fetch(self, job: Fetch) -> None:
        assert job.pool_blocks
        assert job.skip + len(job.pool_blocks) <= len(self.leases[job.lease])
        assert not self.contents.written & set(job.pool_blocks)
        assert not any(self.contents.read[block] for block in job.pool_blocks)
        self.contents.written.update(job.pool_blocks)
        self.jobs.append(job)

    def forgo(self, job: Forgo) -> None:
        del self.leases[job.lease]

    def due(self) -> list[Job]:
        """What may be answered now: a hold comes behind the offers before it."""
        offers = [place for place, job in enumerate(self.jobs) if isinstance(job, Offer)]
        first = offers[0] if offers else len(self.jobs)
        return [job for place, job in enumerate(self.jobs) if not isinstance(job, Keep) or place < first]

    def answer(self, job: Job, chance: Callable[[float], bool] = lambda _: False) -> Result:
        """Its result; `chance` says whether something that goes wrong with this probability does now."""
        self.jobs.remove(job)
        result: Result
        if isinstance(job, Offer):
            result = self._store(job, chance)
        elif isinstance(job, Keep):
            result = self._hold(job, chance)
        elif isinstance(job, Seek):
            result = self._find(job, chance)
        else:
            result = self._load(job, chance)
        self.results.append(result)
        return result

    def answer_all(self) -> list[Result]:
        return [self.answer(job) for job in self.due()]

    def _store(self, job: Offer, chance: Callable[[float], bool]) -> Offered:
        self.contents.read.subtract(job.pool_blocks)
        if chance(0.1):
            return Offered(job.key, dropped={"store_full": len(job.blocks)})
        for block, place in zip(job.blocks, job.pool_blocks, strict=True):
            content = self.contents.of[place]
            known = self.stored.get(block.digest)
            assert known is None or known[0] == content, "one digest, two contents"
            self.stored[block.digest] = (content, "23"[chance(0.3)], block.priority)
        return Offered(job.key, stored=len(job.blocks))

    def _hold(self, job: Keep, chance: Callable[[float], bool]) -> Kept:
        assert job.hold not in self.holds
        there = sum(digest in self.stored for digest in job.digests)
        if there < len(job.digests):
            return Kept(job.key, f"{there} of {len(job.digests)} blocks are there")
        if chance(0.1):
            return Kept(job.key, "no answer")
        self.holds[job.hold] = job.digests
        return Kept(job.key)

    def _find(self, job: Seek, chance: Callable[[float], bool]) -> Sought:
        if chance(0.1) and not job.claim:
            return Sought(job.key, error="no answer")
        self.holds.pop(job.claim, None)
        found = []
        for digest in job.digests:
            if digest not in self.stored:
                break
            found.append(digest)
        if not found:
            return Sought(job.key)
        lease, self.next_lease = self.next_lease, self.next_lease + 1
        self.leases[lease] = found
        self.found += len(found)
        tiers = "".join(self.stored[digest][1] for digest in found)
        return Sought(job.key, tiers, lease, tuple(self.stored[digest][2] for digest in found))

    def _load(self, job: Fetch, chance: Callable[[float], bool]) -> Fetched:
        digests = self.leases.pop(job.lease)[job.skip :]
        self.contents.written.difference_update(job.pool_blocks)
        good = random.Random(job.key).randrange(len(job.pool_blocks)) if chance(0.2) else len(job.pool_blocks)
        for number, (block, digest) in enumerate(zip(job.pool_blocks, digests, strict=False)):
            self.contents.write(block, self.stored[digest][0] if number < good else GARBAGE)
        self.loaded += good
        failed = self.stored[digests[good]][1] if good < len(job.pool_blocks) else ""
        return Fetched(job.key, good, failed)
