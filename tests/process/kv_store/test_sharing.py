"""Workers share blocks through the store: byte for byte, only what is complete, and only what is the same."""

from __future__ import annotations

from store_peers import BLOCK_BYTES, LAYOUT, Store, chain, content, digest

from dynamo_box.protocol import kv


def test_a_block_of_one_worker_is_read_by_another_byte_for_byte_once_it_is_committed(store: Store) -> None:
    one, other = store.worker("w1"), store.worker("w2")
    assert one.attached == other.attached and one.attached.slots > 10
    slots = one.reserve(*chain(1, 2, 3))
    assert sorted(set(slots)) == sorted(slots) and min(slots) >= 0
    for slot, number in zip(slots, (1, 2, 3), strict=True):
        one.fill(slot, content(number))
    assert other.found(1, 2, 3) == ""
    assert other.reserve(*chain(1, 2)) == (kv.BUSY, kv.BUSY)
    committed = one.commit(*slots[:2])
    assert not committed.lost and len(set(committed.generations)) == 2

    found = other.find(1, 2, 3)
    assert (found.tiers, found.slots, found.generations) == ("22", slots[:2], committed.generations)
    for number, slot, generation in zip((1, 2), found.slots, found.generations, strict=True):
        assert other.read(slot) == content(number)[:BLOCK_BYTES]
        assert kv.header_names(other.header(slot), generation, digest(number))
    other.send(kv.Release(found.lease, loaded={"g2": 2}))
    assert other.reserve(*chain(1, 2, 3, 4))[:3] == (kv.KNOWN, kv.KNOWN, kv.BUSY)

    figures = store.figures_when(lambda now: now.host.out_blocks == 2)
    assert (figures.host.in_blocks, figures.host.in_bytes) == (2, 2 * BLOCK_BYTES)
    assert (figures.host.lookups, figures.host.hits) == (6, 2)
    (layout,) = figures.layouts
    assert (layout.name, layout.owners, layout.host_blocks) == (LAYOUT.name, ("w1", "w2"), 2)
