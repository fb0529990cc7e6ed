"""A router process and workers whose every word the test chooses."""

from __future__ import annotations

import time
from typing import Any

import pytest
from msgspec.structs import replace

from dynamo_box.protocol import status
from dynamo_box.protocol.request import KvDump, KvRemoved, KvStored, Load, Refused
from dynamo_box.protocol.route import Adopt, PrefillDone, Release, Renew, Unplaced
from dynamo_box.router.predictions import PREDICTION_TTL_S

HASHES = tuple(range(2**60, 2**60 + 12))


def test_the_worker_that_has_the_prompt_gets_it(stage: Any) -> None:
    router = stage.router()
    stage.subscribed_worker(router, 0)
    stage.subscribed_worker(router, 1, HASHES)
    router.indexed(12)
    placed = stage.frontend().placed(HASHES, prompt_tokens=200)
    assert placed.reason == "smollm2.aggregated.1: 12 of 13 blocks cached, cost 13.5 vs 25.5"
    figures = router.figures_when(lambda figures: figures.routed == 1)
    assert figures.decisions[0].reason == placed.reason
    assert figures.hit_rate == pytest.approx(12 / 13)


def test_events_keep_the_index_right(stage: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router)
    worker.send(KvStored(0, HASHES[:6], None), KvStored(1, HASHES[6:], HASHES[5]), Load(1, 0, 12, 100))
    router.indexed(12)
    worker.send(KvRemoved(2, HASHES[8:]))
    assert router.indexed(8).resyncs == 0
    assert stage.frontend().placed(HASHES).overlap_blocks == 8


@pytest.mark.parametrize(
    "wrong",
    [KvStored(5, (1,), None), KvRemoved(0, (1,)), {"type": "garbage"}, ["stored", 1], 17],
    ids=["gap", "repeated", "unknown", "array", "number"],
)
def test_doubt_leads_to_a_new_dump_on_the_same_connection(stage: Any, wrong: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router)
    worker.send(KvStored(0, HASHES, None))
    router.indexed(12)
    worker.send(wrong)
    worker.expect_subscribe()
    assert router.indexed(0).resyncs == 1
    worker.send(KvStored(9, (1,), None))
    worker.dump(10, HASHES[:3])
    worker.send(KvStored(10, HASHES[3:5], HASHES[2]))
    assert router.indexed(5).workers == (worker.name,)


def test_what_is_no_msgpack_leads_to_a_new_connection(stage: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router, 0, HASHES)
    worker.channel._socket.sendall(b"\0\0\0\1\xc1")
    worker.accept()
    worker.dump(3, HASHES[:4])
    assert router.indexed(4).resyncs == 1


def test_a_large_dump_comes_in_pages(stage: Any) -> None:
    router = stage.router()
    worker = stage.worker()
    worker.announce()
    worker.accept()
    blocks = tuple(number * 0x9E3779B97F4A7C15 % 2**64 for number in range(50_000))
    for start in range(0, len(blocks), 10_000):
        end = start + 10_000
        worker.send(KvDump(0, blocks[start:end], first=start == 0, more=end < len(blocks)))
    router.indexed(50_000)


def test_a_worker_whose_file_goes_is_placed_on_no_more_and_forgotten_with_its_connection(stage: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router, 0, HASHES)
    frontend = stage.frontend()
    frontend.placed(HASHES)
    worker.withdraw()
    figures = router.figures_when(lambda figures: figures.workers == ())
    assert figures.indexed_blocks == 12, "while it is connected it may come back"
    assert isinstance(frontend.place(HASHES), Unplaced)
    worker.hang_up()
    figures = router.indexed(0)
    assert figures.active_requests == 1, "the frontend will release it"
    worker.announce()
    worker.accept()
    worker.dump(0, HASHES[:3])
    router.indexed(3)


@pytest.mark.parametrize("role", ["aggregated", "prefill"])
def test_a_worker_that_withdraws_and_comes_back_has_what_it_had(stage: Any, role: str) -> None:
    """A flip of its role after a drain, or a sleep from which it woke."""
    router = stage.router()
    worker = stage.subscribed_worker(router, 0, HASHES)
    frontend = stage.frontend()
    placed_at = time.monotonic()
    frontend.placed(HASHES)
    worker.withdraw()
    router.figures_when(lambda figures: figures.workers == ())
    worker.send(KvRemoved(0, HASHES[8:]), KvStored(1, (7,), None))
    worker.instance = replace(worker.instance, role=role)
    worker.announce()
    router.figures_when(lambda figures: figures.workers == (worker.name,) and figures.indexed_blocks == 9)
    overlap = frontend.placed(HASHES, pin=worker.name).overlap_blocks
    if time.monotonic() - placed_at < PREDICTION_TTL_S:
        assert overlap == 12, "of which it computes four for the first one"
    assert overlap in (8, 12)
    candidate = router.figures_when(lambda figures: figures.routed == 2).decisions[-1].candidates[0]
    assert (candidate.decode_blocks, candidate.prefill_blocks) == (12, 0.0), "what runs there runs on"
    worker.send(KvStored(2, (8,), 7))
    assert router.indexed(10).resyncs == 0, "it is the same connection"


def test_a_role_that_is_none_keeps_a_worker_out(stage: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router, 0, HASHES)
    worker.instance = replace(worker.instance, role="both")
    worker.announce()
    assert "the role 'both'; there are prefill, decode, aggregated" in router.expect(status.Note).text
    assert isinstance(stage.frontend().place(HASHES), Unplaced)
    worker.instance = replace(worker.instance, role="decode")
    worker.announce()
    worker.accept()
    worker.dump(0, HASHES[:2])
    assert router.indexed(2).workers == (worker.name,)


def test_a_lost_connection_is_made_again_while_the_file_is_there(stage: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router, 0, HASHES)
    router.indexed(12)
    for _ in range(3):
        worker.hang_up()
        router.figures_when(lambda figures: figures.workers == () or figures.indexed_blocks == 0)
        worker.accept()
        worker.dump(0, HASHES)
        figures = router.indexed(12)
        assert (figures.workers, figures.resyncs) == ((worker.name,), 0)


def test_a_worker_that_is_announced_before_it_listens_is_tried_again(stage: Any) -> None:
    router = stage.router()
    worker = stage.worker()
    worker.listening.close()
    worker.announce()
    assert isinstance(stage.frontend().place(), Unplaced)
    worker.listen()
    worker.accept()
    worker.dump(0, HASHES)
    router.indexed(12)


def test_a_replaced_worker_starts_with_nothing(stage: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router, 0, HASHES)
    router.indexed(12)
    worker.instance = replace(worker.instance, kv_blocks_total=2000)
    worker.announce()
    worker.accept()
    worker.dump(0, HASHES[:1])
    router.indexed(1)


def test_a_worker_that_doesnt_fit_is_noted_and_left_out(stage: Any) -> None:
    router = stage.router()
    worker = stage.worker()
    worker.instance = replace(worker.instance, block_size=32)
    worker.announce()
    note = router.expect(status.Note)
    assert (note.level, "blocks of 32 tokens" in note.text) == ("error", True)
    assert isinstance(stage.frontend().place(), Unplaced)


def test_a_refusal_is_noted(stage: Any) -> None:
    router = stage.router()
    worker = stage.worker()
    worker.announce()
    worker.accept()
    worker.send(Refused("protocol 1, not 2"))
    assert router.expect(status.Note).text == f"{worker.name} refused the router: protocol 1, not 2"


def test_load_goes_with_release_and_with_the_connection(stage: Any) -> None:
    router = stage.router()
    stage.subscribed_worker(router)
    frontend, other = stage.frontend(), stage.frontend()
    first = frontend.placed(HASHES)
    frontend.placed(HASHES)
    other.placed(HASHES)
    router.figures_when(lambda figures: figures.active_requests == 3)
    frontend.send(PrefillDone(first.id))
    frontend.send(Release(first.id))
    frontend.send(Release(first.id))
    frontend.send(Release(999))
    router.figures_when(lambda figures: figures.active_requests == 2)
    frontend.close()
    router.figures_when(lambda figures: figures.active_requests == 1)
    assert other.placed((1,)).worker
    candidate = router.figures_when(lambda figures: figures.active_requests == 2).decisions[-1].candidates[0]
    assert candidate.decode_blocks == 13, "twelve of the other request, one of this"


def test_leases_that_nobody_renews_expire(stage: Any) -> None:
    router = stage.router(lease_ttl_s=1.0)
    stage.subscribed_worker(router)
    before = 0
    for _ in range(20):
        frontend = stage.frontend()
        kept, _lost = frontend.placed(HASHES), frontend.placed(HASHES)
        while (figures := router.figures_within(0.2)) is None or figures.expired_leases == before:
            frontend.send(Renew((kept.id,)))
        if (found := (figures.expired_leases, figures.active_requests)) == (before + 1, 1):
            break
        frontend.close()  # the test itself was held up for longer than a lease lasts
        before = router.figures_when(lambda figures: not figures.active_requests).expired_leases
    assert found == (before + 1, 1)


def test_a_frontend_announces_what_runs_to_a_new_router(stage: Any) -> None:
    worker = stage.worker()
    worker.announce()
    router = stage.router()
    frontend = stage.frontend()
    frontend.send(Adopt(1, "r1", "smollm2", worker.name, HASHES, 192, prefill_done=True))
    figures = router.figures_when(lambda figures: figures.active_requests == 1)
    assert figures.routed == 0
