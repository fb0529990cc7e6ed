"""Requests in two legs: what counts where, what is told of it, and workers that change their roles."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace
from placement_rig import BLOCK, FRONTEND, A, Rig, instance, prompt

from dynamo_box.discovery.instances import Instance
from dynamo_box.protocol.route import Adopt, Placed, Unplaced
from dynamo_box.protocol.spec import Disagg, DisaggPolicy

P0, P1 = instance(0, role="prefill"), instance(1, role="prefill")
D0, D1 = instance(0, role="decode"), instance(1, role="decode")
STRICT = Disagg("strict")


def legs(reply: Placed | Unplaced) -> tuple[str, str]:
    assert isinstance(reply, Placed), reply
    return reply.prefill.worker if reply.prefill else "", reply.worker


def test_one_answer_names_both_workers_and_the_record_says_why() -> None:
    rig = Rig(P0, P1, D0, D1)
    hashes = prompt(1, 12)
    rig.pool.index.store(P1.name, hashes[:8])
    rig.keep(hashes[8:10], "g2")
    rig.placed(prompt(2, 20), pin=D0.name)
    reply = rig.placed(hashes, prompt_tokens=200)
    assert (reply.worker, reply.overlap_blocks, reply.host_blocks) == (D1.name, 0, 0)
    assert reply.reason == f"{D1.name}: 0 of 13 blocks cached, the rest arrives, cost 13.0 vs 33.0"
    assert reply.policy == "fallback"
    leg = reply.prefill
    assert leg is not None
    assert (leg.worker, leg.overlap_blocks, leg.host_blocks, leg.disk_blocks) == (P1.name, 8, 2, 0)
    assert leg.reason == f"{P1.name}: 8 of 13 blocks cached, 2 in host memory, cost 3.0 vs 12.5"
    decision = rig.decision
    assert (decision.winner, decision.reason) == (reply.worker, reply.reason)
    assert (decision.prefill, decision.prefill_reason) == (leg.worker, leg.reason)
    assert (decision.policy, decision.policy_reason) == ("fallback", "fallback: all prompts go in two legs")
    assert [each.worker for each in decision.candidates] == [D0.name, D1.name]
    assert [each.worker for each in decision.prefill_candidates] == [P0.name, P1.name]
    figures = rig.placement.figures()
    assert figures.hit_rate == pytest.approx(10 / (20 + 13)), "what the prefill worker has or loads"
    assert (figures.disagg, figures.disagg_settings) == ("fallback", Disagg())


def test_one_leg_is_recorded_with_the_reason_too() -> None:
    rig = Rig(P0, D0, disagg=Disagg("conditional"))
    reply = rig.placed(prompt(1, 12))
    assert legs(reply) == ("", D0.name)
    assert reply.policy == "conditional"
    decision = rig.decision
    assert decision.policy_reason == "conditional: 192 uncached tokens are fewer than 2048"
    assert (decision.prefill, decision.prefill_reason, decision.prefill_candidates) == ("", "", ())
    rig = Rig(A)
    reply = rig.placed(prompt(1, 12))
    assert (reply.prefill, reply.policy) == (None, "")
    assert (rig.decision.policy, rig.decision.policy_reason) == ("", ""), "no worker is there for one leg alone"


def test_the_prompt_counts_where_it_is_computed_and_its_blocks_where_they_arrive() -> None:
    rig = Rig(P0, P1, D0, D1)
    hashes = prompt(1, 10)
    first = rig.placed(hashes)
    where, answers = legs(first)
    rig.placed(prompt(2, 4))
    counted = {each.worker: each for each in rig.decision.prefill_candidates}
    assert (counted[where].prefill_blocks, counted[where].decode_blocks) == (10 + 4, 0)
    arriving = {each.worker: each for each in rig.decision.candidates}
    assert (arriving[answers].prefill_blocks, arriving[answers].decode_blocks) == (0, 10 + 4)
    assert legs(rig.placed(hashes, pin=answers)) == ("", answers)
    assert rig.decision.candidates[0].overlap_blocks == 0, "on its way, and not there yet"
    for lease_id in (2, 3):
        rig.placement.leases.release((FRONTEND, lease_id))

    rig.placement.leases.prefill_done((FRONTEND, first.id))
    rig.placement.leases.prefill_done((FRONTEND, first.id))
    rig.placed(prompt(3, 1))
    assert {each.prefill_blocks for each in rig.decision.prefill_candidates} == {1}
    assert {each.worker: each.decode_blocks for each in rig.decision.candidates}[answers] == 10 + 1
    rig.placement.leases.release((FRONTEND, first.id))
    rig.placement.leases.release((FRONTEND, 4))
    assert [worker.load.blocks for worker in rig.pool.workers.values()] == [0] * 4
    assert [worker.load.prefill_tokens for worker in rig.pool.workers.values()] == [0] * 4


@pytest.mark.parametrize("ending", ["release", "expiry", "disconnect"])
@pytest.mark.parametrize("prefilled", [False, True])
def test_every_ending_ends_both(ending: str, prefilled: bool) -> None:
    rig = Rig(P0, D0)
    reply = rig.placed(prompt(1, 10))
    prefill, decode = rig.pool.workers[P0.name].load, rig.pool.workers[D0.name].load
    assert (prefill.prefill_tokens, prefill.blocks, decode.prefill_tokens, decode.blocks) == (160, 0, 0, 10)
    if prefilled:
        rig.placement.leases.prefill_done((FRONTEND, reply.id))
    if ending == "release":
        rig.placement.leases.release((FRONTEND, reply.id))
    elif ending == "disconnect":
        rig.placement.leases.abandon(FRONTEND)
    else:
        rig.now = 300.0
        assert rig.placement.expire() == 1
    while rig.placement.leases.settle_one():
        pass
    assert (prefill.prefill_tokens, prefill.blocks, decode.prefill_tokens, decode.blocks) == (0, 0, 0, 0)
    assert rig.placement.figures().active_requests == 0


@pytest.mark.parametrize("gone", [P0, D0])
def test_a_lease_outlives_either_worker(gone: Instance) -> None:
    rig = Rig(P0, D0)
    reply = rig.placed(prompt(1, 10))
    rig.pool.leave(gone.name)
    rig.join(replace(gone, pid=2))
    assert rig.pool.workers[gone.name].load.blocks == rig.pool.workers[gone.name].load.prefill_tokens == 0
    rig.placement.leases.release((FRONTEND, reply.id))
    assert {worker.load.blocks + worker.load.prefill_tokens for worker in rig.pool.workers.values()} == {0}


@pytest.mark.parametrize(("at", "done"), [(P0, False), (D0, True)])
def test_an_adopted_one_counts_where_it_runs_now(at: Instance, done: bool) -> None:
    rig = Rig(P0, D0)
    assert rig.placement.adopt(FRONTEND, Adopt(1, "r", "smollm2", at.name, prompt(1, 10), 160, done)) == ""
    load = rig.pool.workers[at.name].load
    assert (load.prefill_tokens, load.blocks) == (0 if done else 160, 10)
    rig.placement.leases.release((FRONTEND, 1))
    assert (load.prefill_tokens, load.blocks) == (0, 0)


@pytest.mark.parametrize("prefill", [P0.name, "smollm2.prefill.9"])
def test_an_adopted_one_in_its_first_leg_counts_where_it_is_computed(prefill: str) -> None:
    rig = Rig(P0, D0)
    adopt = Adopt(1, "r", "smollm2", D0.name, prompt(1, 10), 160, prefill_done=False, prefill=prefill)
    assert rig.placement.adopt(FRONTEND, adopt) == ""
    computing, answering = rig.pool.workers[P0.name].load, rig.pool.workers[D0.name].load
    assert (computing.prefill_tokens, computing.blocks) == (160 if prefill == P0.name else 0, 0)
    assert (answering.prefill_tokens, answering.blocks) == (0, 10)
    rig.placement.leases.prefill_done((FRONTEND, 1))
    assert (computing.prefill_tokens, answering.prefill_tokens) == (0, 0)
    rig.placement.leases.release((FRONTEND, 1))
    assert answering.blocks == 0


def test_siblings_follow_the_prompt_that_is_being_computed_and_spread_for_their_answers() -> None:
    rig = Rig(P0, P1, D0, D1)
    trunk = prompt(0, 100)
    placed = [legs(rig.placed(trunk + prompt(seed, 2))) for seed in range(1, 7)]
    assert len({prefill for prefill, _ in placed}) == 1
    assert sorted(decode for _, decode in placed) == [D0.name] * 3 + [D1.name] * 3


def test_siblings_of_a_prompt_on_its_way_arent_short() -> None:
    """What will arrive at the decode worker isn't there: taken for cached, it would be computed there once more."""
    rig = Rig(P0, D0, disagg=Disagg("conditional", min_uncached_tokens=512))
    trunk = prompt(0, 100)
    assert [legs(rig.placed(trunk + prompt(seed, 2))) for seed in (1, 2)] == [(P0.name, D0.name)] * 2
    rig.pool.index.store(D0.name, trunk)
    assert legs(rig.placed(trunk + prompt(3, 2))) == ("", D0.name)
    assert rig.decision.policy_reason == "conditional: 32 uncached tokens are fewer than 512"


def test_turns_are_taken_by_leg() -> None:
    rig = Rig(P0, P1, D0, D1, mode="round-robin")
    hashes = prompt(1, 10)
    assert [legs(rig.placed(hashes)) for _ in range(2)] == [(P0.name, D0.name), (P1.name, D1.name)]
    assert [legs(rig.placed(hashes, one_leg=True))[1] for _ in range(3)] == [D0.name, D1.name, D0.name]
    assert legs(rig.placed(hashes, exclude=(P0.name,))) == (P1.name, D0.name)
    assert legs(rig.placed(hashes)) == (P0.name, D1.name)


def test_strict_says_which_role_is_missing() -> None:
    rig = Rig(P0, D0, disagg=STRICT)
    hashes = prompt(1, 4)
    remedy = "start one (`dynbox scale`), or set the policy to fallback"
    assert legs(rig.placed(hashes)) == (P0.name, D0.name)
    lost = rig.unplaced(hashes, exclude=(P0.name,))
    assert (lost.code, lost.policy) == ("no_workers", "strict")
    assert lost.reason == (
        f"strict: 1 prefill worker serves smollm2 now, all of them excluded by the request; {remedy}"
    )
    rig.pool.disconnect(P0.name)
    assert rig.unplaced(hashes).reason == f"strict: no prefill worker serves smollm2 now; {remedy}"
    rig.pool.connect(P0.name)
    rig.pool.withdraw(D0.name)
    assert rig.unplaced(hashes).reason == f"strict: no decode worker serves smollm2 now; {remedy}"
    rig.pool.announce_again(replace(D0, role="prefill"))
    assert rig.unplaced(hashes).reason == f"strict: no decode worker serves smollm2 now; {remedy}"
    rig.pool.announce_again(replace(D0, role="aggregated"))
    assert legs(rig.placed(hashes)) == (P0.name, D0.name)
    alone = rig.unplaced(hashes, exclude=(P0.name,))
    assert alone.reason == f"strict: {D0.name} alone would have to take both legs; {remedy}"
    assert legs(rig.placed(hashes, exclude=(P0.name,), one_leg=True)) == ("", D0.name)
    assert legs(rig.placed(hashes, pin=P0.name)) == ("", P0.name)
    assert rig.placement.figures().active_requests == 4, "nothing counts that wasn't placed"


@pytest.mark.parametrize("policy", ["fallback", "conditional"])
def test_no_request_goes_unplaced_while_a_worker_lives(policy: DisaggPolicy) -> None:
    rig = Rig(P0, D0, disagg=Disagg(policy, 0, 0.0))
    hashes = prompt(1, 4)
    assert legs(rig.placed(hashes)) == (P0.name, D0.name)
    assert legs(rig.placed(hashes, exclude=(P0.name,))) == ("", D0.name)
    assert rig.decision.policy_reason == f"{policy}: no worker for prefill"
    assert legs(rig.placed(hashes, exclude=(D0.name,))) == ("", P0.name)
    assert rig.decision.policy_reason == f"{policy}: no worker for decode"
    assert legs(rig.placed(hashes, exclude=(D0.name,), one_leg=True)) == ("", P0.name)
    assert "all of them excluded" in rig.unplaced(hashes, exclude=(P0.name, D0.name)).reason


def test_a_policy_counts_from_the_next_request_on() -> None:
    rig = Rig(P0, D0)
    hashes = prompt(1, 4)
    running = rig.placed(hashes)
    rig.placement.disagg = Disagg("conditional")
    assert legs(rig.placed(hashes)) == ("", D0.name)
    assert rig.placement.figures().disagg.startswith("conditional:min_uncached_tokens=2048,")
    rig.placement.leases.release((FRONTEND, running.id))
    assert rig.pool.workers[P0.name].load.prefill_tokens == 0


def test_a_worker_in_another_role_is_the_same_worker() -> None:
    rig = Rig(P0, D0, D1)
    hashes = prompt(1, 10)
    rig.pool.index.store(D1.name, hashes)
    rig.placed(prompt(2, 6), pin=D1.name)
    rig.pool.withdraw(D1.name)
    assert rig.placement.figures().workers == (D0.name, P0.name)
    assert rig.unplaced(hashes, pin=D1.name).code == "pinned_worker_gone"
    rig.pool.announce_again(replace(D1, role="prefill"))
    rig.placement.leases.release((FRONTEND, 1))
    reply = rig.placed(hashes)
    assert legs(reply) == (D1.name, D0.name)
    assert reply.prefill is not None
    assert reply.prefill.overlap_blocks == 10
    assert rig.placement.figures().indexed_blocks == 10


class AnyBox(RuleBasedStateMachine):
    """Workers come, go, withdraw and change their roles while requests are placed and end."""

    names = st.integers(0, 4)
    roles = st.sampled_from(["prefill", "decode", "aggregated"])

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(instance(0, role="prefill"))
        self.rig.pool.leave(instance(0, role="prefill").name)
        self.running: list[int] = []

    @rule(number=names, role=roles)
    def join_or_change(self, number: int, role: str) -> None:
        each = replace(A, name=f"w{number}", role=role)
        if each.name in self.rig.pool.workers:
            self.rig.pool.announce_again(each)
        else:
            self.rig.join(each)

    @rule(number=names, how=st.sampled_from(["leave", "withdraw", "disconnect", "connect"]))
    def go(self, number: int, how: str) -> None:
        if f"w{number}" in self.rig.pool.workers:
            getattr(self.rig.pool, how)(f"w{number}")

    @rule(policy=st.sampled_from([Disagg("strict"), Disagg("fallback"), Disagg("conditional", 64, 0.5, 500)]))
    def set_policy(self, policy: Disagg) -> None:
        self.rig.placement.disagg = policy

    @rule(
        seed=st.integers(0, 5),
        exclude=st.sets(names, max_size=3),
        pin=st.none() | names,
        one_leg=st.booleans(),
    )
    def place(self, seed: int, exclude: set[int], pin: int | None, one_leg: bool) -> None:
        pinned = None if pin is None else f"w{pin}"
        lost = tuple(f"w{number}" for number in exclude)
        reply = self.rig.place(prompt(seed, 1 + 3 * seed), exclude=lost, pin=pinned, one_leg=one_leg)
        serving = {worker.instance.name for worker in self.rig.pool.serving()} - set(lost)
        policy = self.rig.placement.disagg.policy
        if isinstance(reply, Unplaced):
            nobody = not serving if pinned is None else pinned not in serving
            assert nobody or (policy == "strict" and not one_leg and pinned is None)
            assert reply.reason
            return
        self.running.append(reply.id)
        used = {reply.worker} | ({reply.prefill.worker} if reply.prefill else set())
        assert used <= serving
        assert pinned is None or used == {pinned}
        assert not (one_leg and reply.prefill)
        assert reply.reason
        assert reply.policy in ("", policy)
        assert bool(self.rig.decision.policy_reason) == bool(reply.policy)
        assert not reply.prefill or reply.prefill.reason
        if reply.policy == "strict" and not one_leg and pinned is None:
            assert reply.prefill is not None

    @rule(data=st.data(), done=st.booleans())
    def end(self, data: st.DataObject, done: bool) -> None:
        if not self.running:
            return
        number = data.draw(st.sampled_from(self.running))
        self.rig.placement.leases.prefill_done((FRONTEND, number))
        if not done:
            self.running.remove(number)
            self.rig.placement.leases.release((FRONTEND, number))

    @invariant()
    def loads_are_whole(self) -> None:
        loads = [worker.load for worker in self.rig.pool.workers.values()]
        assert all(load.prefill_tokens >= 0 and load.private_blocks >= 0 for load in loads)
        if not self.running:
            assert all(load.prefill_tokens == load.blocks == 0 for load in loads)
        assert sum(load.prefill_tokens for load in loads) <= len(self.running) * 16 * BLOCK


AnyBox.TestCase.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyBox = AnyBox.TestCase
