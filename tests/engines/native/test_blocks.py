"""The block pool against a brute-force model of what it promises."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.contract import RemovedBlocks, StoredBlocks
from engines.native.blocks import BlockPool

TOTAL = 6


def digest_of(chain: tuple[int, ...]) -> bytes:
    return b"".join(number.to_bytes(1, "big") for number in chain).ljust(16, b"\xff") if chain else b""


class PoolMachine(RuleBasedStateMachine):
    """Sequences are chains of small numbers, so that they often share prefixes.

    The model: `content` says what each block would hold, `holders` who holds it and `pins` what is pinned, `idle` in
    which order blocks lost their last holder, and `told` what the events add up to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.content: dict[int, tuple[int, ...]] = {}
        self.names: dict[tuple[int, ...], int] = {}
        self.holders: list[list[int]] = []
        self.pins: list[list[int]] = []
        self.idle: list[int] = []
        self.told: set[bytes] = set()

    def held(self) -> set[int]:
        return {block for blocks in self.holders for block in blocks}

    def occupied(self) -> set[int]:
        return self.held() | {block for blocks in self.pins for block in blocks}

    @rule(chain=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def start(self, chain: list[int]) -> None:
        """Share what is cached of a chain, allocate and compute the rest, publish it block by block."""
        prefixes = [tuple(chain[: end + 1]) for end in range(len(chain))]
        expected: list[int] = []
        for prefix in prefixes:
            if prefix not in self.names:
                break
            expected.append(self.names[prefix])
        hits = self.pool.match([digest_of(prefix) for prefix in prefixes])
        assert hits == expected

        fresh = len(chain) - len(hits)
        room = TOTAL - len(self.occupied() | set(hits))
        assert self.pool.available - self.pool.idle_among(hits) == room
        if fresh > room:
            return
        self.pool.share(hits)
        self.idle = [block for block in self.idle if block not in hits]
        blank = TOTAL - len(self.occupied() | set(hits) | set(self.idle))
        evicted, self.idle = self.idle[: max(0, fresh - blank)], self.idle[max(0, fresh - blank) :]
        for block in evicted:
            del self.names[self.content.pop(block)]
        blocks = self.pool.allocate(fresh)
        assert len(set(blocks)) == fresh
        assert not set(blocks) & (self.occupied() | set(hits) | set(self.idle))
        for block, prefix in zip(blocks, prefixes[len(hits) :], strict=True):
            self.pool.publish(block, digest_of(prefix), digest_of(prefix[:-1]))
            if prefix not in self.names:
                self.names[prefix], self.content[block] = block, prefix
        self.holders.append(hits + blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)
        still = self.occupied()
        self.idle += [block for block in reversed(blocks) if block not in still and block in self.content]

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """Some of what has a name, held by sequences or idle."""
        free = sorted(set(self.names.values()) - {block for blocks in self.pins for block in blocks})
        if free:
            blocks = data.draw(st.lists(st.sampled_from(free), min_size=1, unique=True))
            assert [self.pool.find(digest_of(self.content[block])) for block in blocks] == blocks
            self.pool.pin(blocks)
            self.pins.append(blocks)
            self.idle = [block for block in self.idle if block not in blocks]

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        blocks = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.pool.unpin(blocks)
        self.idle += [block for block in reversed(blocks) if block not in self.occupied()]

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        for event in self.pool.take_events():
            if isinstance(event, StoredBlocks):
                assert not self.told.intersection(event.digests)
                self.told.update(event.digests)
            else:
                assert isinstance(event, RemovedBlocks)
                assert self.told.issuperset(event.digests)
                self.told.difference_update(event.digests)
        assert self.told == {digest_of(chain) for chain in self.names}
        assert self.pool.idle == len(self.idle)
        assert self.pool.held == len(self.held())
        assert self.pool.pinned == sum(len(blocks) for blocks in self.pins)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_chain_stored_at_once_is_one_event() -> None:
    pool = BlockPool(4)
    chain = [digest_of((1,)), digest_of((1, 2)), digest_of((1, 2, 3))]
    for block, digest, parent in zip(pool.allocate(3), chain, [b"", *chain], strict=False):
        pool.publish(block, digest, parent)
    assert pool.take_events() == [StoredBlocks(tuple(chain), b"")]
    assert pool.take_events() == []


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], digest_of((1,)), b"")
    pool.publish(blocks[1], digest_of((1, 2)), digest_of((1,)))
    pool.release(blocks)
    pool.take_events()
    pool.allocate(1)
    assert pool.take_events() == [RemovedBlocks((digest_of((1, 2)),))]
