"""The table of the host tier, against a model so plain that it can be believed, and by example."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynamo_box.kv.store.slots import MAX_ANCESTORS, HostTier, Lease
from dynamo_box.protocol.kv import BUSY, FULL, KNOWN, UNSET_PRIORITY_COUNTS_AS, Block


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def never(_digest: bytes) -> bool:
    return False


class Headers:
    """What each slot says of itself."""

    def __init__(self) -> None:
        self.said: dict[int, tuple[int, Block]] = {}

    def write(self, slot: int, generation: int, block: Block) -> None:
        assert slot not in self.said, "the header of the block before was not wiped"
        self.said[slot] = (generation, block)

    def wipe(self, slot: int) -> None:
        self.said.pop(slot, None)


def tier_of(slots: int) -> HostTier:
    tier = HostTier(Headers())
    tier.grow(slots)
    return tier


def chain(*numbers: int, priority: int | None = None, parent: bytes = b"") -> list[Block]:
    blocks = []
    for number in numbers:
        blocks.append(Block(digest(number), parent, priority))
        parent = digest(number)
    return blocks


def store(tier: HostTier, blocks: list[Block], owner: int = 1) -> list[int]:
    slots = [slot for slot in tier.reserve(owner, blocks, 0.0, never) if slot >= 0]
    tier.commit(owner, slots)
    return slots


def held(tier: HostTier, *numbers: int) -> list[int]:
    return [number for number in numbers if tier.slot_of(digest(number)) >= 0]


# By example


def test_the_lowest_priority_goes_first_and_among_equals_what_was_used_least_recently() -> None:
    tier = tier_of(4)
    for number, priority in ((1, 50), (2, None), (3, 10), (4, UNSET_PRIORITY_COUNTS_AS)):
        store(tier, chain(number, priority=priority))
    lease = tier.find(1, [digest(2)], 0.0, never)
    assert lease is not None
    tier.release(lease)
    went = []
    for new in (11, 12, 13, 14):
        before = set(held(tier, 1, 2, 3, 4))
        store(tier, chain(new, priority=100))
        went += list(before - set(held(tier, 1, 2, 3, 4)))
    assert went == [3, 4, 2, 1]
    assert tier.evicted == 4
    tier.check_integrity()


def test_a_chain_is_taken_from_its_end_however_it_came_and_was_used() -> None:
    tier = tier_of(6)
    for start in (1, 3, 5):
        store(tier, chain(start, start + 1, parent=digest(start - 1) if start > 1 else b""))
    for kept in (5, 4, 3, 2, 1):
        store(tier, chain(100 + kept))
        assert held(tier, 1, 2, 3, 4, 5, 6) == list(range(1, kept + 1))


def test_more_of_a_chain_never_displaces_what_is_there_of_it() -> None:
    tier = tier_of(3)
    store(tier, chain(1, 2, 3))
    assert tier.reserve(1, chain(4, 5, parent=digest(3)), 0.0, never) == [FULL, FULL]
    assert tier.reserve(1, chain(1, 2, 3, 4), 0.0, never) == [KNOWN, KNOWN, KNOWN, FULL]
    assert store(tier, chain(9))
    assert held(tier, 1, 2, 3, 9) == [1, 2, 9]


def test_parents_in_a_circle_end_somewhere() -> None:
    tier = tier_of(4)
    store(tier, [Block(digest(1), digest(2)), Block(digest(2), digest(1))])
    assert tier.reserve(1, [Block(digest(3), digest(1))], 0.0, never)[0] >= 0
    tier.check_integrity()
    assert MAX_ANCESTORS > 2


def test_leased_and_half_written_blocks_are_not_evicted_and_then_there_is_no_room() -> None:
    tier = tier_of(3)
    store(tier, chain(1, 2))
    lease = tier.find(7, [digest(1), digest(2)], 0.0, never)
    assert lease is not None and len(lease.slots) == 2
    assert tier.reserve(1, chain(3), 0.0, never)[0] >= 0
    assert tier.reserve(2, chain(4), 0.0, never) == [FULL]
    tier.release(lease)
    assert tier.reserve(2, chain(4), 0.0, never)[0] >= 0
    assert held(tier, 1, 2, 3, 4) == [1]


def test_a_block_is_reserved_once_and_known_once_committed() -> None:
    tier = tier_of(4)
    (slot, again) = tier.reserve(1, [*chain(1), *chain(1)], 0.0, never)
    assert slot >= 0 and again == BUSY
    assert tier.reserve(2, chain(1), 0.0, never) == [BUSY]
    assert tier.commit(2, [slot]) == [0]
    assert tier.commit(1, [slot, slot]) == [1, 0]
    assert tier.reserve(2, chain(1), 0.0, never) == [KNOWN]
    assert tier.reserve(2, chain(5), 0.0, lambda each: each == digest(5)) == [KNOWN]


@pytest.mark.parametrize(
    ("held_with", "offered_with", "then"),
    [(10, 60, 60), (60, 10, 60), (None, 36, 36), (None, 35, None), (20, None, 20), (None, None, None)],
)
def test_a_known_block_takes_the_higher_priority(
    held_with: int | None, offered_with: int | None, then: int | None
) -> None:
    tier = tier_of(2)
    (slot,) = store(tier, chain(1, priority=held_with))
    assert tier.reserve(2, chain(1, priority=offered_with), 0.0, never) == [KNOWN]
    assert tier.priority_of(slot) == then
    tier.check_integrity()


def test_what_is_found_has_no_gap_and_lies_on_disk_where_it_is_nowhere_else() -> None:
    tier = tier_of(4)
    store(tier, chain(1, 3))
    lease = tier.find(1, [digest(1), digest(2), digest(3), digest(4)], 0.0, lambda each: each == digest(2))
    assert lease is not None
    assert lease.digests == (digest(1), digest(2), digest(3))
    assert list(lease.slots) == [tier.slot_of(digest(1)), -1, tier.slot_of(digest(3))]
    assert lease.on_disk == (digest(2),)
    assert tier.find(1, [digest(4), digest(1)], 0.0, never) is None
    (slot,) = tier.reserve(0, chain(2), 0.0, never)
    tier.commit(0, [slot])
    tier.add_to_lease(lease, 1, slot)
    assert tier.leased_slots == 3
    tier.release(lease)
    assert tier.leased_slots == 0
    tier.check_integrity()


def test_what_is_forgotten_while_somebody_copies_is_given_to_nobody_before_the_end_of_the_lease() -> None:
    tier = tier_of(1)
    (slot,) = store(tier, chain(1))
    lease = tier.find(1, [digest(1)], 0.0, never)
    assert lease is not None
    assert tier.forget([slot, slot, 99]) == 1
    assert tier.find(2, [digest(1)], 0.0, never) is None
    assert tier.reserve(2, chain(1), 0.0, never) == [FULL]
    tier.check_integrity()
    tier.release(lease)
    assert tier.reserve(2, chain(1), 0.0, never) == [slot]


def test_what_is_being_written_to_disk_is_passed_over_and_is_next_once_it_is_written() -> None:
    tier = tier_of(3)
    first, *_ = (store(tier, chain(number))[0] for number in (1, 2, 3))
    tier.pin(first)
    store(tier, chain(4))
    assert held(tier, 1, 2, 3, 4) == [1, 3, 4]
    tier.unpin(first)
    store(tier, chain(5))
    assert held(tier, 1, 3, 4, 5) == [3, 4, 5]
    tier.check_integrity()


def test_the_end_of_an_owner_gives_back_what_it_leased_and_wrote() -> None:
    tier = tier_of(3)
    store(tier, chain(1))
    assert tier.find(7, [digest(1)], 0.0, never) is not None
    assert tier.find(8, [digest(1)], 0.0, never) is not None
    mine = tier.reserve(7, chain(2, 3), 0.0, never)
    assert tier.slots_written_by(7) == mine
    assert len(tier.end_leases(7)) == 1 and tier.leases == 1
    assert tier.abandon(8, mine) == 0
    assert tier.abandon(7, mine) == 2
    assert (tier.free, tier.leased_slots) == (2, 1)
    tier.check_integrity()


def test_clearing_leaves_what_is_leased() -> None:
    tier = tier_of(4)
    store(tier, chain(1, 2, 3))
    assert tier.find(7, [digest(2)], 0.0, never) is not None
    assert tier.clear([digest(number) for number in (1, 2, 3, 4)]) == (2, 1)
    assert held(tier, 1, 2, 3) == [2]
    tier.check_integrity()


def test_without_slots_there_is_no_room() -> None:
    tier = tier_of(0)
    assert tier.reserve(1, chain(1), 0.0, never) == [FULL]
    assert tier.find(1, [digest(1)], 0.0, never) is None
    tier.check_integrity()


# Against a model

NUMBERS = st.integers(1, 12)
OWNERS = st.integers(1, 3)
PRIORITIES = st.sampled_from([None, 0, 35, 36, 100])


@dataclass
class Model:
    """Blocks by digest; `order` is who is evicted next, within a level; `parked` were met there while pinned."""

    slots: int
    free: int
    held: dict[bytes, tuple[int | None, bytes, int]] = field(default_factory=dict)  # priority, parent, slot
    writing: dict[bytes, tuple[int, Block, int]] = field(default_factory=dict)
    order: list[bytes] = field(default_factory=list)
    leased: dict[bytes, int] = field(default_factory=dict)
    pinned: set[bytes] = field(default_factory=set)

    def level(self, each: bytes) -> int:
        priority = self.held[each][0]
        return UNSET_PRIORITY_COUNTS_AS if priority is None else priority

    def use(self, each: bytes) -> None:
        if each in self.order:
            self.order.remove(each)
        if not self.leased.get(each):
            self.order.append(each)

    def ancestors(self, each: bytes) -> list[bytes]:
        found: list[bytes] = []
        while each in self.held and len(found) < MAX_ANCESTORS:
            found.append(each)
            each = self.held[each][1]
        return found

    def evict(self, keep: list[bytes]) -> bytes | None:
        while True:
            candidates = [each for each in self.order if each not in keep]
            if not candidates:
                return None
            victim = min(candidates, key=self.level)  # the first of them
            self.order.remove(victim)
            if victim not in self.pinned:
                del self.held[victim]
                return victim


class AgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.headers = Headers()
        self.tier = HostTier(self.headers)
        self.tier.grow(5)
        self.model = Model(5, 5)
        self.leases: list[tuple[Lease, list[bytes]]] = []
        self.told: set[bytes] = set()
        self.doomed_slots: set[int] = set()

    @rule(
        owner=OWNERS, numbers=st.lists(NUMBERS, min_size=1, max_size=4), parent=st.none() | NUMBERS, priority=PRIORITIES
    )
    def reserve(self, owner: int, numbers: list[int], parent: int | None, priority: int | None) -> None:
        blocks = chain(*numbers, priority=priority, parent=digest(parent) if parent else b"")
        model = self.model
        kept = list(reversed(model.ancestors(blocks[0].parent)))
        for block in blocks:
            if block.digest in model.held:
                before, up, slot = model.held[block.digest]
                if priority is not None and priority > model.level(block.digest):
                    before = priority
                model.held[block.digest] = (before, up, slot)
                kept.append(block.digest)
        answers = self.tier.reserve(owner, blocks, 0.0, never)
        for block, answer in zip(blocks, answers, strict=True):
            if block.digest in model.held:
                assert answer == KNOWN
            elif block.digest in model.writing:
                assert answer == BUSY
            elif model.free or model.evict(kept) is not None:
                assert answer >= 0
                model.free = max(model.free - 1, 0)
                model.writing[block.digest] = (owner, block, answer)
            else:
                assert answer == FULL
        for each in reversed(kept):
            model.use(each)

    @rule(owner=OWNERS, picks=st.lists(st.integers(0, 4), max_size=4))
    def commit(self, owner: int, picks: list[int]) -> None:
        model = self.model
        mine = {slot: block for who, block, slot in model.writing.values() if who == owner}
        generations = self.tier.commit(owner, picks)
        committed = []
        for slot, generation in zip(picks, generations, strict=True):
            block = mine.pop(slot, None)
            assert (generation > 0) == (block is not None)
            if block is not None:
                del model.writing[block.digest]
                model.held[block.digest] = (block.priority, block.parent, slot)
                committed.append(block)
                assert self.headers.said[slot] == (generation, block)
        for block in reversed(committed):
            model.use(block.digest)
        for each in model.ancestors(committed[0].parent) if committed else []:
            model.use(each)

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3), parent=st.none() | NUMBERS, priority=PRIORITIES)
    def store(self, numbers: list[int], parent: int | None, priority: int | None) -> None:
        self.reserve(1, numbers, parent, priority)
        self.commit(1, [0, 1, 2, 3, 4])

    @rule(owner=OWNERS, picks=st.lists(st.integers(0, 4), max_size=3))
    def abandon(self, owner: int, picks: list[int]) -> None:
        mine = {slot: block for who, block, slot in self.model.writing.values() if who == owner}
        gone = {slot for slot in picks if slot in mine}
        assert self.tier.abandon(owner, picks) == len(gone)
        for slot in gone:
            del self.model.writing[mine[slot].digest]
            self.model.free += 1

    @rule(owner=OWNERS, numbers=st.lists(NUMBERS, min_size=1, max_size=4, unique=True))
    def find(self, owner: int, numbers: list[int]) -> None:
        wanted = [digest(number) for number in numbers]
        there = 0
        while there < len(wanted) and wanted[there] in self.model.held:
            there += 1
        lease = self.tier.find(owner, wanted, 0.0, never)
        assert (lease is None) == (there == 0)
        if lease is not None:
            assert lease.digests == tuple(wanted[:there])
            assert [self.model.held[each][2] for each in wanted[:there]] == list(lease.slots)
            self.leases.append((lease, wanted[:there]))
            for each in wanted[:there]:
                self.model.leased[each] = self.model.leased.get(each, 0) + 1
                if each in self.model.order:
                    self.model.order.remove(each)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease, _ = self.leases[data.draw(st.integers(0, len(self.leases) - 1))]
        assert self.tier.lease_of(lease.owner, lease.id) is lease
        assert self.tier.lease_of(lease.owner + 1, lease.id) is None
        self.tier.release(lease)
        self._released(lease)

    @rule(owner=OWNERS)
    def end(self, owner: int) -> None:
        ended = self.tier.end_leases(owner)
        assert {lease.id for lease in ended} == {lease.id for lease, _ in self.leases if lease.owner == owner}
        for lease in ended:
            self._released(lease)
        mine = [each for each, (who, _, _) in self.model.writing.items() if who == owner]
        assert self.tier.abandon(owner, self.tier.slots_written_by(owner)) == len(mine)
        for each in mine:
            del self.model.writing[each]
            self.model.free += 1

    def _released(self, lease: Lease) -> None:
        model = self.model
        (entry,) = [each for each in self.leases if each[0] is lease]
        self.leases.remove(entry)
        for each, slot in reversed(list(zip(entry[1], lease.slots, strict=True))):
            if each in model.held and model.held[each][2] == slot:
                model.leased[each] -= 1
                model.use(each)
            else:
                self._free_doomed(slot)

    @rule(slots=st.lists(st.integers(0, 6), max_size=2))
    def forget(self, slots: list[int]) -> None:
        by_slot = {slot: each for each, (_, _, slot) in self.model.held.items()}
        gone = {slot for slot in slots if slot in by_slot}
        assert self.tier.forget(slots) == len(gone)
        for slot in gone:
            self._forgotten(by_slot[slot], slot)

    @rule(numbers=st.lists(NUMBERS, max_size=12, unique=True))
    def clear(self, numbers: list[int]) -> None:
        there = [digest(number) for number in numbers if digest(number) in self.model.held]
        stay = [each for each in there if self.model.leased.get(each)]
        assert self.tier.clear([digest(number) for number in numbers]) == (len(there) - len(stay), len(stay))
        for each in there:
            if each not in stay:
                self._forgotten(each, self.model.held[each][2])

    def _forgotten(self, each: bytes, slot: int) -> None:
        model = self.model
        del model.held[each]
        if each in model.order:
            model.order.remove(each)
        model.leased.pop(each, None)
        model.pinned.discard(each)
        self.doomed_slots.add(slot)
        self._free_doomed(slot)

    def _free_doomed(self, slot: int) -> None:
        """If nobody reads it any more."""
        leased = any(slot in lease.slots for lease, _ in self.leases)
        if slot in self.doomed_slots and not leased and not self.tier.is_pinned(slot):
            self.doomed_slots.discard(slot)
            self.model.free += 1

    @rule(slots=st.sets(st.integers(0, 4), min_size=1))
    def pin(self, slots: set[int]) -> None:
        for each, (_, _, slot) in self.model.held.items():
            if slot in slots and not self.tier.is_pinned(slot):
                self.tier.pin(slot)
                self.model.pinned.add(each)

    @rule(slot=st.integers(0, 4))
    def unpin(self, slot: int) -> None:
        model = self.model
        if not self.tier.is_pinned(slot):
            return
        self.tier.unpin(slot)
        holders = [each for each, (_, _, where) in model.held.items() if where == slot]
        for each in holders:
            model.pinned.discard(each)
            if each not in model.order and not model.leased.get(each):
                model.order.insert(0, each)
        if not holders:
            self._free_doomed(slot)

    @invariant()
    def all_agree(self) -> None:
        model = self.model
        self.tier.check_integrity()
        for stored, each in self.tier.take_changes():
            assert (each in self.told) != stored
            if stored:
                self.told.add(each)
            else:
                self.told.discard(each)
        assert self.told == set(model.held) == set(self.tier.digests()) == set(self.tier.digests_in(range(5)))
        assert self.tier.free == model.free
        assert self.tier.eviction_order() == sorted(model.order, key=model.level)
        assert set(self.headers.said) == {slot for _, _, slot in model.held.values()}
        for each, (priority, parent, slot) in model.held.items():
            assert self.tier.slot_of(each) == slot
            assert self.tier.block_in(slot) == Block(each, parent, priority)
        slots = [slot for _, _, slot in model.held.values()] + [slot for _, _, slot in model.writing.values()]
        assert len(set(slots)) == len(slots) <= 5


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
