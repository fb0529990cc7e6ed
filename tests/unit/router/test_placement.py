"""Index, load, predictions and cost together, as the service uses them."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace
from placement_rig import BLOCK, FRONTEND, OTHER, STORE, A, B, Rig, instance, prompt

from dynamo_box.protocol.route import Adopt
from dynamo_box.router.decisions import KEPT, SHOWN
from dynamo_box.router.predictions import PREDICTION_TTL_S


def test_the_worker_that_has_the_prompt_gets_it() -> None:
    rig = Rig()
    hashes = prompt(1, 12)
    rig.pool.index.store(B.name, hashes)
    reply = rig.placed(hashes, prompt_tokens=200)
    assert (reply.worker, reply.overlap_blocks) == (B.name, 12)
    assert reply.reason == "smollm2.aggregated.1: 12 of 13 blocks cached, cost 13.5 vs 25.5"
    assert 0 < reply.match_us < reply.took_us
    figures = rig.placement.figures()
    assert figures.hit_rate == pytest.approx(12 / 13)
    assert figures.decisions[0].reason == reply.reason
    assert figures.workers == (A.name, B.name)


def test_load_is_what_was_placed_less_what_ended() -> None:
    rig = Rig(A)
    hashes = prompt(1, 10)
    first = rig.placed(hashes)
    rig.placed(hashes)
    second = rig.candidate(A)
    assert second.overlap_blocks == 10, "the first one's blocks are predicted"
    assert second.prefill_blocks == 0.0, "the first one computes them, for both"
    assert second.decode_blocks == 10, "shared blocks count once"
    rig.placement.leases.prefill_done((FRONTEND, first.id))
    rig.placed(prompt(2, 5))
    assert (rig.candidate(A).prefill_blocks, rig.candidate(A).decode_blocks) == (5.0, 15)
    for lease_id in range(1, 4):
        rig.placement.leases.release((FRONTEND, lease_id))
    rig.placed(prompt(3, 1))
    assert (rig.candidate(A).prefill_blocks, rig.candidate(A).decode_blocks) == (1.0, 1)


def test_unlike_requests_spread() -> None:
    rig = Rig()
    workers = [rig.placed(prompt(seed, 10)).worker for seed in range(4)]
    assert sorted(workers) == [A.name, A.name, B.name, B.name]


def test_a_burst_of_siblings_stays_together_while_it_pays() -> None:
    rig = Rig()
    trunk = prompt(0, 100)
    workers = {rig.placed(trunk + prompt(seed, 2)).worker for seed in range(1, 8)}
    assert len(workers) == 1
    rig.now += PREDICTION_TTL_S
    assert rig.placed(trunk + prompt(9, 2)).overlap_blocks == 0, "no event confirmed it"


def test_models_are_kept_apart() -> None:
    other = instance(0, OTHER)
    rig = Rig(A, other)
    hashes = prompt(1, 4)
    rig.placement.pools["other"].index.store(other.name, hashes)
    assert rig.placed(hashes).worker == A.name
    reply = rig.placed(hashes, model="other", prompt_tokens=4 * 32)
    assert (reply.worker, reply.overlap_blocks) == (other.name, 4)


def test_pin_and_exclude() -> None:
    rig = Rig()
    hashes = prompt(1, 4)
    rig.pool.index.store(A.name, hashes)
    assert rig.placed(hashes, pin=B.name).worker == B.name
    assert rig.placed(hashes, exclude=(A.name,)).worker == B.name
    nobody = rig.unplaced(hashes, exclude=(A.name, B.name))
    assert nobody.code == "no_workers"
    assert "all of them excluded" in nobody.reason
    assert rig.unplaced(hashes, pin="smollm2.aggregated.9").code == "pinned_worker_gone"
    assert rig.unplaced(hashes, pin=A.name, exclude=(A.name,)).code == "pinned_worker_gone"


def test_refusals() -> None:
    rig = Rig()
    hashes = prompt(1, 4)
    unknown = rig.unplaced(model="gpt")
    assert unknown.code == "unknown_model"
    assert unknown.reason == "no model 'gpt' in this box; there is other, smollm2"
    bad = [
        rig.unplaced(hashes, overlap_weight=-1.0),
        rig.unplaced(hashes, overlap_weight=math.nan),
        rig.unplaced(hashes, temperature=math.inf),
        rig.unplaced(hashes, prompt_tokens=4 * BLOCK - 1),
        rig.unplaced(prompt_tokens=0),
        rig.unplaced(prompt_tokens=-5),
        rig.unplaced(prompt_tokens=8193),
        rig.unplaced(prompt(1, 600), prompt_tokens=9600),
    ]
    assert {reply.code for reply in bad} == {"bad_request"}
    assert rig.placement.figures().active_requests == 0
    assert rig.placement.figures().decisions == ()


def test_an_id_in_use_is_refused_and_its_lease_kept() -> None:
    rig = Rig(A)
    rig.placed(prompt(1, 4), id=7)
    again = rig.unplaced(prompt(1, 4), id=7)
    assert (again.code, again.reason) == ("bad_request", "id 7 is in use on this connection")
    rig.placement.leases.release((FRONTEND, 7))
    assert rig.placement.figures().active_requests == 0
    rig.placed(prompt(1, 4), id=7)


def test_a_worker_that_lost_its_connection_keeps_its_load_but_no_cache() -> None:
    rig = Rig(A)
    hashes = prompt(1, 10)
    rig.pool.index.store(A.name, hashes)
    rig.placed(hashes)
    rig.pool.disconnect(A.name)
    assert rig.unplaced(hashes).reason == "no worker serves smollm2 now"
    rig.pool.connect(A.name)
    assert rig.placed(prompt(2, 1)).overlap_blocks == 0
    assert rig.candidate(A).decode_blocks == 11


def test_a_worker_that_left_leaves_nothing() -> None:
    rig = Rig(A)
    hashes = prompt(1, 10)
    rig.pool.index.store(A.name, hashes)
    reply = rig.placed(hashes)
    rig.pool.leave(A.name)
    assert rig.placement.figures().indexed_blocks == 0
    rig.join(instance(0, pid=2))
    assert rig.placed(prompt(2, 1)).overlap_blocks == 0
    assert rig.candidate(A).decode_blocks == 1
    rig.placement.leases.release((FRONTEND, reply.id))
    rig.placed(prompt(3, 1))
    assert rig.candidate(A).decode_blocks == 2, "the old life's lease didn't touch the new one's load"


def test_a_running_request_is_adopted() -> None:
    rig = Rig(A)
    hashes = prompt(1, 10)
    done = Adopt(1, "r1", "smollm2", A.name, hashes, 160, prefill_done=True)
    assert rig.placement.adopt(FRONTEND, done) == ""
    assert rig.placement.adopt(FRONTEND, done) == "id 1 is in use on this connection"
    running = Adopt(2, "r2", "smollm2", A.name, hashes, 160, prefill_done=False)
    assert rig.placement.adopt(FRONTEND, running) == ""
    assert "no worker" in rig.placement.adopt(FRONTEND, Adopt(3, "r3", "smollm2", "gone", (), 1, True))
    assert "no worker" in rig.placement.adopt(FRONTEND, Adopt(4, "r4", "gpt", A.name, (), 1, True))
    rig.next_id = 10
    rig.placed(prompt(2, 1))
    assert (rig.candidate(A).prefill_blocks, rig.candidate(A).decode_blocks) == (11.0, 11)


def test_leases_expire_unless_renewed() -> None:
    rig = Rig(A)
    rig.placed(prompt(1, 4), id=1)
    rig.placed(prompt(1, 4), id=2)
    rig.now = 200.0
    rig.placement.renew(FRONTEND, (2, 99))
    rig.now = 300.0
    assert rig.placement.expire() == 1
    assert rig.placement.figures().expired_leases == 1
    assert (FRONTEND, 2) in rig.placement.leases


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"model": "gpt"}, "no model of this box"),
        ({"block_size": 32}, "blocks of 32 tokens"),
        ({"fingerprint": "bad"}, "other weights"),
        ({"role": "both"}, "the role 'both'; there are prefill, decode, aggregated"),
    ],
)
def test_a_worker_that_doesnt_fit_its_model_is_kept_out(changed: dict[str, object], problem: str) -> None:
    rig = Rig(A)
    assert problem in rig.placement.join(replace(B, **changed))
    assert rig.placement.figures().workers == (A.name,)


def test_round_robin_takes_turns_and_mode_can_change() -> None:
    rig = Rig(mode="round-robin")
    hashes = prompt(1, 10)
    assert [rig.placed(hashes).worker for _ in range(4)] == [A.name, B.name] * 2
    rig.placement.mode = "random"
    assert "drawn at random" in rig.placed(hashes).reason


def test_only_the_recent_decisions_are_kept() -> None:
    rig = Rig(A)
    hashes = prompt(1, 4)
    for _ in range(KEPT):
        rig.placement.leases.release((FRONTEND, rig.placed(prompt(2, 4), prompt_tokens=64).id))
        rig.now += 10.0
    assert rig.placement.figures().hit_rate == 0.0
    rig.pool.index.store(A.name, hashes)
    for _ in range(KEPT):
        rig.placed(hashes)
    figures = rig.placement.figures()
    assert figures.hit_rate == 1.0
    assert (figures.routed, len(figures.decisions)) == (2 * KEPT, SHOWN)
    assert figures.decisions[-1].request_id == f"req-{2 * KEPT}"


def test_what_the_tiers_hold_is_loaded_by_whoever_is_idle() -> None:
    rig = Rig()
    hashes, busy = prompt(1, 12), prompt(2, 40)
    rig.pool.index.store(A.name, hashes)
    rig.placed(busy, pin=A.name)
    rig.keep(hashes[:8], "g2")
    rig.keep(hashes[8:], "g3")
    reply = rig.placed(hashes, prompt_tokens=200)
    assert (reply.worker, reply.overlap_blocks, reply.host_blocks, reply.disk_blocks) == (B.name, 0, 8, 4)
    assert reply.reason.startswith(f"{B.name}: 0 of 13 blocks cached, 8 in host memory and 4 on disk, cost ")
    mine, other = rig.candidate(B), rig.candidate(A)
    assert (mine.host_blocks, mine.disk_blocks, mine.prefill_blocks) == (8, 4, 0.5 + 8 * 0.25 + 4 * 0.5)
    assert (other.overlap_blocks, other.host_blocks, other.disk_blocks) == (12, 0, 0)
    figures = rig.placement.figures()
    assert (figures.host_blocks, figures.disk_blocks, figures.indexed_blocks) == (8, 4, 12)
    assert figures.workers == (A.name, B.name), "the store is no worker"
    assert figures.hit_rate == pytest.approx(12 / (40 + 13)), "what is loaded isn't computed"


def test_load_is_what_is_computed_not_what_is_loaded() -> None:
    rig = Rig(A)
    hashes = prompt(1, 12)
    rig.keep(hashes[:8], "g2")
    rig.placed(hashes)
    rig.placed(prompt(2, 1))
    assert rig.candidate(A).prefill_blocks == 4.0 + 1.0
    rig.placed(hashes)
    again = rig.candidate(A)
    assert (again.overlap_blocks, again.host_blocks) == (12, 0), "the first one's blocks are on their way"
    assert again.prefill_blocks == 1.0, "the first one computes four of them, for both; the second prompt waits"


def test_one_index_of_the_tiers_serves_all_models() -> None:
    other = instance(0, OTHER)
    rig = Rig(A, other)
    mine, its = prompt(1, 4), prompt(2, 6)
    rig.keep(mine, "g2")
    rig.keep(its, "g3")
    assert rig.placed(mine).host_blocks == 4
    assert rig.placed(its).disk_blocks == 6, "a hash is found by whoever asks for it: models have different ones"
    reply = rig.placed(prompt(3, 2) + its, model="other", prompt_tokens=8 * 32)
    assert (reply.host_blocks, reply.disk_blocks) == (0, 0), "nothing without what comes before it"


def test_the_credit_goes_with_the_store() -> None:
    rig = Rig(A)
    hashes = prompt(1, 4)
    rig.keep(hashes, "g2")
    rig.placement.tiers.index.forget(STORE)
    reply = rig.placed(hashes)
    assert (reply.host_blocks, reply.reason) == (0, f"{A.name}: 0 of 4 blocks cached, the only worker")
    assert rig.placement.figures().host_blocks == 0
