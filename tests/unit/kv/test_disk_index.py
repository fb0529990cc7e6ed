"""What the disk tier evicts next, against the plainest model of it."""

from __future__ import annotations

import random

import pytest

from dynamo_box.kv.store.disk_files import file_path
from dynamo_box.kv.store.disk_index import DiskIndex, Gone, counts_as

LAYOUTS = ("a" * 32, "b" * 32)


class Model:
    """Blocks, the least recently used first: (layout, digest) → (priority, priority in the name, bytes)."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, bytes], tuple[int | None, int | None, int]] = {}
        self.old: dict[tuple[str, bytes], int] = {}
        """Those not used in this life, by the time of their last use."""
        self.pins: dict[tuple[str, bytes], int] = {}

    def use(self, key: tuple[str, bytes]) -> None:
        if key in self.blocks and key not in self.pins:
            self.old.pop(key, None)
            self.blocks[key] = self.blocks.pop(key)

    def next(self) -> tuple[str, bytes] | None:
        order = list(self.blocks)
        free = [key for key in order if key not in self.pins]
        return min(
            free,
            default=None,
            key=lambda key: (
                counts_as(self.blocks[key][0]),
                key not in self.old,
                self.old.get(key, 0),
                order.index(key),
            ),
        )


def digest_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.mark.parametrize("seed", range(4))
def test_random_operations(seed: int) -> None:
    chance = random.Random(seed)
    index, model = DiskIndex(), Model()
    times = list(range(100_000))
    chance.shuffle(times)
    for _ in range(10_000):
        key = chance.choice(LAYOUTS), digest_of(chance.randrange(40))
        priority = chance.choice([None, 0, 34, 35, 36, 100])
        match chance.randrange(9):
            case 0 | 1:
                if key not in model.blocks:
                    index.add(*key, priority, 4096)
                    model.blocks[key] = priority, priority, 4096
            case 2 | 3:
                used_ns = times.pop()
                assert index.add_old(*key, priority, 8192, used_ns) is (key not in model.blocks)
                if key not in model.blocks:
                    model.blocks[key] = priority, priority, 8192
                    if key not in model.pins:
                        model.old[key] = used_ns
            case 4:
                assert index.touch(*key) is (key in model.blocks)
                model.use(key)
            case 5:
                raised = key in model.blocks and counts_as(priority) > counts_as(model.blocks[key][0])
                assert index.raise_priority(*key, priority) is raised
                if raised:
                    _, filed_as, occupied = model.blocks[key]
                    model.blocks[key] = priority, filed_as, occupied
                    model.use(key)
            case 6:
                index.pin(key[0], [key[1]])
                model.pins[key] = model.pins.get(key, 0) + 1
                model.old.pop(key, None)
            case 7 if model.pins:
                key = chance.choice(list(model.pins))
                index.unpin(key[0], [key[1]])
                model.pins[key] -= 1
                if not model.pins[key]:
                    del model.pins[key]
                    model.use(key)
            case _:
                victim = model.next() if chance.random() < 0.8 else key
                gone = index.evict() if victim == model.next() else index.remove(*key)
                if victim is None or victim not in model.blocks:
                    assert gone is None
                else:
                    _, filed_as, occupied = model.blocks.pop(victim)
                    model.old.pop(victim, None)
                    assert gone == Gone(*victim, file_path(*victim, filed_as), occupied)
        assert len(index) == len(model.blocks)
        assert index.used_bytes == sum(occupied for *_, occupied in model.blocks.values())
        if chance.random() < 0.01:
            kept = index.kept_by_clear()
            assert {(name, digest) for name, shelf in kept.shelves.items() for digest in shelf.slots} == {
                pinned for pinned in model.pins if pinned in model.blocks
            }
            for key, (priority, filed_as, _) in model.blocks.items():
                assert index.priority_of(*key) == priority
                assert index.filed_as(*key) == filed_as
                if kept.has(*key):
                    assert (kept.priority_of(*key), kept.path_of(*key)) == (priority, index.path_of(*key))


def test_an_emptied_index_keeps_the_pins_of_those_who_will_give_them_back() -> None:
    index = DiskIndex()
    index.add(LAYOUTS[0], digest_of(1), None, 4096)
    index.pin(LAYOUTS[0], [digest_of(1), digest_of(2)])
    empty = index.emptied()
    assert (len(empty), empty.used_bytes) == (0, 0)
    for number in (1, 2, 3):
        empty.add_old(LAYOUTS[0], digest_of(number), None, 4096, number)
    evicted = empty.evict()
    assert evicted is not None
    assert evicted.digest == digest_of(3)
    assert empty.evict() is None
    empty.unpin(LAYOUTS[0], [digest_of(2), digest_of(1), digest_of(1)])
    assert [gone.digest for gone in (empty.evict(), empty.evict()) if gone] == [digest_of(2), digest_of(1)]
