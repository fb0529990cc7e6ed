"""A router process that places requests in two legs, workers whose every word the test chooses, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from dynamo_box.protocol import status
from dynamo_box.protocol.request import KvStored
from dynamo_box.protocol.route import Adopt, Placed, PrefillDone, Release, Unplaced
from dynamo_box.protocol.spec import Disagg

HASHES = tuple(range(2**60, 2**60 + 12))
OTHERS = tuple(range(2**61, 2**61 + 12))
DEADLINE_S = 60.0


def legs(placed: Placed) -> tuple[str, str]:
    return placed.prefill.worker if placed.prefill else "", placed.worker


def test_both_legs_over_the_wire_from_placement_to_release(stage: Any) -> None:
    router = stage.router()
    p0 = stage.subscribed_worker(router, 0, HASHES, role="prefill")
    stage.subscribed_worker(router, 1, role="prefill")
    d0 = stage.subscribed_worker(router, 0, role="decode")
    d1 = stage.subscribed_worker(router, 1, role="decode")
    router.indexed(12)
    frontend = stage.frontend()
    first = frontend.placed(HASHES, prompt_tokens=200)
    assert first.prefill is not None
    assert (first.prefill.worker, first.prefill.overlap_blocks, first.policy) == (p0.name, 12, "fallback")
    assert first.prefill.reason == f"{p0.name}: 12 of 13 blocks cached, cost 0.5 vs 12.5"
    second = frontend.placed(OTHERS)
    assert {first.worker, second.worker} == {d0.name, d1.name}
    decision = router.figures_when(lambda figures: figures.routed == 2).decisions[0]
    assert (decision.prefill, decision.winner) == (p0.name, first.worker)
    assert decision.policy_reason == "fallback: all prompts go in two legs"

    # After the prompt the first one counts at its decode worker alone; after the release nowhere.
    frontend.send(PrefillDone(first.id))
    frontend.send(PrefillDone(second.id))
    third = frontend.placed((1, 2))
    decision = router.figures_when(lambda figures: figures.routed == 3).decisions[-1]
    assert [each.prefill_blocks for each in decision.prefill_candidates] == [2.0, 2.0]
    assert sorted(each.decode_blocks for each in decision.candidates) == [12 + 2, 13 + 2]
    for placed in (first, second, third):
        frontend.send(Release(placed.id))
    router.figures_when(lambda figures: figures.active_requests == 0)

    # A prefill worker that dies is lost for the one leg; the other one takes it.
    p0.die()
    router.figures_when(lambda figures: p0.name not in figures.workers)
    assert legs(frontend.placed(HASHES))[0] == "smollm2.prefill.1"
    lost_too = frontend.placed(HASHES, exclude=("smollm2.prefill.1",))
    assert lost_too.prefill is None
    assert frontend.placed(HASHES, one_leg=True).prefill is None


def test_the_policy_is_set_while_it_runs(stage: Any) -> None:
    router = stage.router(disagg=Disagg("conditional", min_uncached_tokens=100))
    stage.subscribed_worker(router, role="prefill")
    decode = stage.subscribed_worker(router, role="decode")
    frontend = stage.frontend()

    def set_policy(value: str) -> status.Answer:
        router.status.send(status.Set(1, "disagg", value))
        return router.expect(status.Answer)

    assert frontend.placed(HASHES).prefill is not None
    assert legs(frontend.placed(HASHES[:6])) == ("", decode.name)
    described = "conditional:min_uncached_tokens=90,min_uncached_share=0.5,max_prefill_tokens=65536"
    assert set_policy("conditional:min_uncached_tokens=90,min_uncached_share=0.5").text == f"disagg {described}"
    assert frontend.placed(OTHERS[:6]).prefill is not None
    figures = router.figures_when(lambda figures: figures.disagg == described)
    assert figures.disagg_settings == Disagg("conditional", 90, 0.5)

    refused = set_policy("conditional:min_uncached_tokens=few")
    assert refused.error == "disagg: min_uncached_tokens must be a whole number from 0 to 2,147,483,648, not 'few'"
    assert set_policy("never").error == "disagg: no policy 'never'; there are strict, fallback, conditional"
    assert set_policy("conditional").text == f"disagg {described}", "what was refused has changed nothing"

    assert set_policy("strict").text == "disagg strict"
    decode.die()
    router.figures_when(lambda figures: decode.name not in figures.workers)
    reply = frontend.place(HASHES)
    assert isinstance(reply, Unplaced)
    assert reply.code == "no_workers"
    assert reply.reason.startswith("strict: no decode worker serves smollm2 now; ")
    assert set_policy("fallback").text == "disagg fallback"
    assert legs(frontend.placed(HASHES)) == ("", "smollm2.prefill.0")
    assert frontend.policies == ["conditional", "strict", "fallback"], "at first, and whenever it is another"


def test_a_flip_of_roles_keeps_what_the_workers_hold(stage: Any) -> None:
    router = stage.router()
    workers = [stage.subscribed_worker(router, number, HASHES, role="aggregated") for number in range(2)]
    router.indexed(24)
    frontend = stage.frontend()
    running = frontend.placed(OTHERS, pin=workers[0].name)
    assert running.policy == "", "no worker is there for one leg alone"
    flipped = (("prefill", "decode"), ("decode", "prefill"))
    for number, roles in enumerate(flipped):
        for worker, role in zip(workers, roles, strict=True):
            worker.withdraw()
            router.figures_when(lambda figures, name=worker.name: name not in figures.workers)
            worker.send(KvStored(number, (number,), None))
            worker.instance = replace(worker.instance, role=role)
            worker.announce()
            router.figures_when(lambda figures, name=worker.name: name in figures.workers)
        router.indexed(24 + 2 * (number + 1))
        placed = frontend.placed(HASHES)
        by_role = {worker.instance.role: worker.name for worker in workers}
        assert legs(placed) == (by_role["prefill"], by_role["decode"])
        assert (placed.prefill.overlap_blocks, placed.overlap_blocks) == (12, 12)
        frontend.send(Release(placed.id))
    figures = router.figures_when(lambda figures: figures.routed == 3 and figures.active_requests == 1)
    assert figures.resyncs == 0
    for worker in workers:
        worker.listening.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            worker.listening.accept()  # the router has never connected a second time


def test_a_new_router_counts_an_adopted_one_where_it_runs(stage: Any) -> None:
    prefill, decode = stage.worker(0, "prefill"), stage.worker(0, "decode")
    for worker in (prefill, decode):
        worker.announce()
    router = stage.router()
    for worker in (prefill, decode):
        worker.accept()
        worker.dump(0)
    router.figures_when(lambda figures: len(figures.workers) == 2)
    frontend = stage.frontend()
    frontend.send(Adopt(1, "r1", "smollm2", prefill.name, HASHES, 192, prefill_done=False))
    frontend.send(Adopt(2, "r2", "smollm2", decode.name, OTHERS, 192, prefill_done=False, prefill=prefill.name))
    router.figures_when(lambda figures: figures.active_requests == 2)
    frontend.send(PrefillDone(1))
    frontend.next_id = 2
    frontend.placed((1, 2))
    decision = router.figures_when(lambda figures: figures.routed == 1).decisions[0]
    assert (decision.prefill_candidates[0].prefill_blocks, decision.prefill_candidates[0].decode_blocks) == (14.0, 12)
    assert decision.candidates[0].decode_blocks == 14
    frontend.close()
    router.figures_when(lambda figures: figures.active_requests == 0)
