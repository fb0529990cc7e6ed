"""A router process and the box's KV tiers, whose every word the test chooses."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_box.protocol import status
from dynamo_box.protocol.request import KvCleared, KvRemoved, KvStored, Refused

STORE = "kvstore"
HASHES = tuple(range(2**60, 2**60 + 12))
OTHER = tuple(range(2**61, 2**61 + 4))


def _held(figures: Any) -> tuple[int, int]:
    return figures.host_blocks, figures.disk_blocks


def test_what_the_tiers_hold_is_every_workers_to_load(stage: Any) -> None:
    store, router = stage.store(), stage.router(kvstore=STORE, host_block_cost=0.25, disk_block_cost=0.5)
    stage.subscribed_worker(router, 0, HASHES[:2])
    stage.subscribed_worker(router, 1)
    store.accept()
    store.tiers(0, host=HASHES[:6], disk=HASHES[4:10] + OTHER)
    figures = router.figures_when(lambda figures: _held(figures) == (6, 10))
    assert (figures.tiers_connected, figures.indexed_blocks, figures.resyncs) == (True, 2, 0)
    assert figures.workers == ("smollm2.aggregated.0", "smollm2.aggregated.1")

    frontend = stage.frontend()
    placed = frontend.placed(HASHES, prompt_tokens=200)
    assert (placed.overlap_blocks, placed.host_blocks, placed.disk_blocks) == (2, 4, 4)
    assert placed.reason == (
        "smollm2.aggregated.0: 2 of 13 blocks cached, 4 in host memory and 4 on disk, cost 18.5 vs 19.0"
    )
    pinned = frontend.placed(OTHER, pin="smollm2.aggregated.1")
    assert (pinned.overlap_blocks, pinned.host_blocks, pinned.disk_blocks) == (0, 0, 4)
    decision = router.figures_when(lambda figures: figures.routed == 2).decisions[0]
    assert {(each.host_blocks, each.disk_blocks) for each in decision.candidates} == {(4, 4), (6, 4)}

    store.send(KvRemoved(0, HASHES[:6], "g2"), KvStored(1, HASHES[:1], None, "g3"), KvCleared(2, "g2"))
    router.figures_when(lambda figures: _held(figures) == (0, 11))
    store.send(KvCleared(3, "g3"))
    assert router.figures_when(lambda figures: _held(figures) == (0, 0)).resyncs == 0
    assert frontend.placed(OTHER, pin="smollm2.aggregated.0").reason.endswith(
        ": 0 of 4 blocks cached, named by the request"
    )


def test_a_store_that_dies_is_forgotten_at_once_and_found_again(stage: Any) -> None:
    router = stage.router(kvstore=STORE)  # it isn't there yet
    stage.subscribed_worker(router)
    frontend = stage.frontend()
    assert frontend.placed(HASHES).reason.endswith("0 of 12 blocks cached, the only worker")
    store = stage.store()
    for life in range(2):
        store.accept()
        first, second = (tuple(range(start, start + 4)) for start in (2**61 + 10 * life, 2**62 + 10 * life))
        store.tiers(life, host=first + second, disk=second)
        router.figures_when(lambda figures: _held(figures) == (8, 4) and figures.tiers_connected)
        assert frontend.placed(first).host_blocks == 4
        store.die()
        figures = router.figures_when(lambda figures: not figures.tiers_connected)
        assert _held(figures) == (0, 0)
        assert figures.workers == ("smollm2.aggregated.0",)
        placed = frontend.placed(second)
        assert (placed.host_blocks, placed.disk_blocks) == (0, 0)
        store.listen()


@pytest.mark.parametrize("wrong", [KvStored(5, (1,), None, "g2"), ["stored", 1]], ids=["gap", "unreadable"])
def test_doubt_leads_to_a_new_dump(stage: Any, wrong: Any) -> None:
    store, router = stage.store(), stage.router(kvstore=STORE)
    store.accept()
    store.tiers(0, host=HASHES)
    router.figures_when(lambda figures: _held(figures) == (12, 0))
    store.send(wrong)
    store.expect_subscribe()
    figures = router.figures_when(lambda figures: figures.resyncs == 1)
    assert (_held(figures), figures.tiers_connected) == ((0, 0), True)
    store.tiers(6, host=HASHES[:2], disk=HASHES)
    store.send(KvStored(6, HASHES[2:3], HASHES[1], "g2"), KvStored(7, OTHER[1:], OTHER[0], "g3"))
    figures = router.figures_when(lambda figures: _held(figures) == (3, 15))
    assert figures.resyncs == 1, "a parent that was evicted before its child is no contradiction"


def test_a_refusal_is_noted(stage: Any) -> None:
    store, router = stage.store(), stage.router(kvstore=STORE)
    store.accept()
    store.send(Refused("protocol 1, not 2"))
    assert router.expect(status.Note).text == "kvstore refused the router: protocol 1, not 2"


def test_a_cost_that_makes_no_sense_is_refused(stage: Any) -> None:
    router = stage.start_router(kvstore=STORE, disk_block_cost=-1.0)
    failed = router.expect(status.Failed)
    assert (failed.permanent, "disk_block_cost" in failed.cause) == (True, True)
    assert router.exit_status() == 1
