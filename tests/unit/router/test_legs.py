"""One leg or two, by tables, and what holds for any pool of workers."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.protocol.request import Leg
from dynamo_box.protocol.spec import Disagg
from dynamo_box.router.cost import MODES, Knobs, Mode, Option
from dynamo_box.router.disagg import POLICIES
from dynamo_box.router.legs import Contender, Legs, Missing, Request, decide_legs

BLOCK = 16
PROMPT = 4000  # 250 blocks
ROLES = ("prefill", "decode", "aggregated")
ROLE_OF = {"p": "prefill", "d": "decode", "a": "aggregated"}
STRICT, FALLBACK, CONDITIONAL = (Disagg(policy) for policy in POLICIES)


def worker(
    name: str,
    overlap: int = 0,
    *,
    host: int = 0,
    queued: int = 0,
    active: int = 0,
    indexed: int = 0,
    awaited: int = 0,
) -> Contender:
    """Its role is told by the first letter of its name."""
    option = Option(name, overlap, queued - awaited, active + PROMPT // BLOCK, indexed, host_blocks=host)
    return Contender(ROLE_OF[name[0]], option, active, queued)


def go(
    *contenders: Contender,
    policy: Disagg | None = FALLBACK,
    mode: Mode = "kv",
    tokens: int = PROMPT,
    pinned: bool = False,
    one_leg: bool = False,
    weight: float = 1.0,
    last: dict[Leg, str] | None = None,
) -> Legs | Missing:
    request = Request(tokens, BLOCK, Knobs(weight), pinned, one_leg)
    return decide_legs(mode, contenders, request, policy, rng=random.Random(0), last=last or {})


def where(legs: Legs | Missing) -> str:
    """ "p0>d0" for two legs, "d0" for one, "no prefill" where nobody is there for that."""
    if isinstance(legs, Missing):
        return f"no {legs.leg}"
    return f"{legs.prefill.option.worker}>{legs.decode.option.worker}" if legs.prefill else legs.decode.option.worker


@pytest.mark.parametrize(
    ("workers", "strict", "fallback", "one_leg"),
    [
        ("p0 d0", "p0>d0", "p0>d0", "d0"),
        ("p0 a0", "p0>a0", "p0>a0", "a0"),
        ("a0 d0", "a0>d0", "a0>d0", "a0 d0"),
        ("a0 a1", "a0>a1 a1>a0", "a0>a1 a1>a0", "a0 a1"),
        ("p0", "no decode", "p0", "p0"),
        ("p0 p1", "no decode", "p0 p1", "p0 p1"),
        ("d0", "no prefill", "d0", "d0"),
        ("d0 d1", "no prefill", "d0 d1", "d0 d1"),
        ("a0", "no prefill", "a0", "a0"),
        ("p0 d0 a0", "p0>d0 p0>a0", "p0>d0 p0>a0", "d0 a0"),
        ("p0 a0 a1", "p0>a0 p0>a1", "p0>a0 p0>a1", "a0 a1"),
    ],
)
def test_who_is_there_decides_what_is_possible(workers: str, strict: str, fallback: str, one_leg: str) -> None:
    contenders = [worker(name) for name in workers.split()]
    for policy, possible in ((STRICT, strict), (FALLBACK, fallback), (Disagg("conditional", 0, 0.0), fallback)):
        assert where(go(*contenders, policy=policy)) in (possible, *possible.split())
        assert where(go(*contenders, policy=policy, one_leg=True)) in one_leg.split(), "whatever the policy"
        for contender in contenders:
            alone = go(contender, policy=policy, pinned=True)
            assert where(alone) == contender.whole.worker, "whatever its role"
            assert isinstance(alone, Legs)
            assert alone.why == "the request names its worker"
    unsplit = go(*contenders, policy=None)
    assert where(unsplit) in one_leg.split()
    assert isinstance(unsplit, Legs)
    assert unsplit.why == ""


def test_the_prompt_goes_where_least_is_to_be_computed_and_the_answer_where_least_runs() -> None:
    legs = go(
        worker("p0", queued=8000),
        worker("p1", 200, queued=1600, active=20),
        worker("d0", 250, active=400, queued=640),
        worker("d1", active=90, host=100),
    )
    assert where(legs) == "p1>d1"
    assert isinstance(legs, Legs)
    assert legs.prefill is not None
    assert legs.prefill.reason == "p1: 200 of 250 blocks cached, cost 170.0 vs 750.0"
    assert legs.decode.reason == "d1: 0 of 250 blocks cached, the rest arrives, cost 340.0 vs 650.0"
    assert legs.why == "fallback: all prompts go in two legs"
    first, second = legs.prefill.candidates
    assert (first.worker, first.prefill_blocks, first.decode_blocks, first.cost) == ("p0", 750.0, 0, 750.0)
    assert (second.worker, second.prefill_blocks, second.decode_blocks) == ("p1", 150.0, 20), "not this one's blocks"
    busy, idle = legs.decode.candidates
    assert (busy.worker, busy.overlap_blocks, busy.prefill_blocks, busy.cost) == ("d0", 250, 40.0, 650.0)
    assert (idle.worker, idle.host_blocks, idle.prefill_blocks, idle.cost) == ("d1", 0, 0.0, 340.0)


@pytest.mark.parametrize(
    ("contenders", "goes", "reasons"),
    [
        # Among equals: who has more of it already for the answer, who is there for prefill alone for the prompt.
        ([worker("p0"), worker("d0", indexed=1), worker("d1", 3, indexed=9)], "p0>d1", ("", "(level; more cached)")),
        ([worker("a0"), worker("p0", indexed=9), worker("d0"), worker("d1")], "p0>", ("(level; for prefill alone)",)),
        ([worker("p0", indexed=5), worker("p1", indexed=3), worker("d0")], "p1>d0", ("(level; the smallest index)",)),
        # Load counts first. An aggregated worker that answers others computes this prompt only if that's still less.
        ([worker("p0"), worker("d0", active=1, indexed=1), worker("d1", indexed=9)], "p0>d1", ()),
        ([worker("p0", queued=3200), worker("a0", active=100), worker("d0")], "a0>d0", ()),
        ([worker("p0", queued=3200), worker("a0", active=300), worker("d0")], "p0>d0", ()),
        ([worker("p0", queued=3200, awaited=3200), worker("a0", active=100), worker("d0")], "p0>d0", ()),
        # The only one for the answer isn't given the prompt, be it cached there.
        (
            [worker("p0", queued=9000), worker("a0", 250)],
            "p0>a0",
            ("the only one for prefill", "the only one for decode"),
        ),
    ],
)
def test_which_of_several(contenders: list[Contender], goes: str, reasons: tuple[str, ...]) -> None:
    legs = go(*contenders)
    assert isinstance(legs, Legs)
    assert where(legs).startswith(goes)
    assert legs.prefill is not None
    for reason, choice in zip(reasons, (legs.prefill, legs.decode), strict=False):
        assert reason in choice.reason


@pytest.mark.parametrize(
    ("contenders", "tokens", "why", "goes"),
    [
        ([worker("p0"), worker("d0")], 2048, "conditional: 2048 of 2048 tokens are uncached", "p0>d0"),
        ([worker("p0"), worker("d0")], 2047, "conditional: 2047 uncached tokens are fewer than 2048", "d0"),
        # What those have who could take it whole, tiers included: 4000 - 16 * (20 + 50).
        ([worker("p0"), worker("d0", 20, host=50)], PROMPT, "conditional: 2880 of 4000 tokens are uncached", "p0>d0"),
        (
            [worker("p0"), worker("d0", 20, host=60)],
            PROMPT,
            "conditional: 0.68 of the prompt is uncached, less than 0.7",
            "d0",
        ),
        ([worker("p0"), worker("d0"), worker("a0", 240)], PROMPT, "conditional: 160 uncached tokens are fewer", "a0"),
        # What a prefill worker has spares nothing unless it gets the prompt.
        ([worker("p0", 250), worker("d0")], PROMPT, "conditional: 4000 of 4000 tokens are uncached", "p0>d0"),
        (
            [worker("p0", queued=65_537), worker("p1", queued=70_000), worker("d0")],
            PROMPT,
            "conditional: every worker for prefill has 65537 tokens to compute or more, over 65536",
            "d0",
        ),
        (
            [worker("p0", 250, queued=65_537), worker("p1", queued=65_536), worker("d0")],
            PROMPT,
            "conditional: 4000 of 4000 tokens are uncached",
            "p1>d0",
        ),
        # Queued for siblings is queued all the same.
        ([worker("p0", queued=65_537, awaited=4000), worker("d0")], PROMPT, "conditional: every worker", "d0"),
        ([worker("p0")], PROMPT, "conditional: no worker for decode", "p0"),
        ([worker("d0")], PROMPT, "conditional: no worker for prefill", "d0"),
    ],
)
def test_conditional(contenders: list[Contender], tokens: int, why: str, goes: str) -> None:
    legs = go(*contenders, policy=CONDITIONAL, tokens=tokens)
    assert isinstance(legs, Legs)
    assert (where(legs), legs.why[: len(why)]) == (goes, why)


@pytest.mark.parametrize("policy", [STRICT, FALLBACK], ids=["strict", "fallback"])
def test_the_others_have_no_thresholds(policy: Disagg) -> None:
    assert where(go(worker("p0", queued=10**6), worker("d0", 1), policy=policy, tokens=17)) == "p0>d0"


def test_each_leg_has_its_own_turn() -> None:
    contenders = [worker(name) for name in ("p0", "p1", "d0", "d1")]
    assert where(go(*contenders, mode="round-robin", last={"prefill": "p0", "decode": "d1"})) == "p1>d0"
    assert where(go(*contenders, mode="round-robin", last={"whole": "d0", "decode": "d1"}, one_leg=True)) == "d1"
    legs = go(*contenders, mode="random")
    assert isinstance(legs, Legs)
    assert legs.prefill is not None
    assert (legs.prefill.reason[3:], legs.decode.reason[3:]) == (
        " 0 of 250 blocks cached, drawn at random",
        " 0 of 250 blocks cached, the rest arrives, drawn at random",
    )


def test_the_overlap_weight_is_for_the_prompt_alone() -> None:
    contenders = [worker("p0", queued=1600), worker("p1", active=150), worker("d0", 250, active=10), worker("d1")]
    assert where(go(*contenders, weight=1.0)) == "p0>d1"
    assert where(go(*contenders, weight=9.0)) == "p1>d1"


@dataclass(frozen=True)
class Case:
    contenders: list[Contender]
    policy: Disagg
    mode: Mode
    tokens: int
    one_leg: bool
    temperature: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.integers(1, 8000))
    blocks = -(-tokens // BLOCK)
    contenders = []
    for number, role in enumerate(draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7))):
        active, queued = draw(st.integers(0, 500)), draw(st.integers(0, 100_000))
        own = draw(st.integers(0, blocks))
        option = Option(
            f"w{number}",
            own,
            draw(st.integers(0, queued)),
            active + blocks,
            draw(st.integers(0, 3)),
            draw(st.integers(0, blocks - own)),
        )
        contenders.append(Contender(role, option, active, queued))
    policy = Disagg(
        draw(st.sampled_from(POLICIES)), draw(st.integers(0, 4000)), draw(st.floats(0, 1)), draw(st.integers(0, 90_000))
    )
    return Case(
        contenders, policy, draw(st.sampled_from(MODES)), tokens, draw(st.booleans()), draw(st.sampled_from([0.0, 0.5]))
    )


@given(cases(), st.integers(0, 9))
def test_what_holds_for_every_pool(case: Case, seed: int) -> None:
    request = Request(case.tokens, BLOCK, Knobs(1.0, case.temperature), one_leg=case.one_leg)
    legs = decide_legs(case.mode, case.contenders, request, case.policy, rng=random.Random(seed), last={})
    roles = {contender.whole.worker: contender.role for contender in case.contenders}
    has = set(roles.values())
    if isinstance(legs, Missing):
        assert case.policy.policy == "strict"
        assert not case.one_leg
        able = [name for name, role in roles.items() if role in (legs.leg, "aggregated")]
        assert len(able) <= 1, "one that is needed for the other leg"
        return
    assert legs.why
    assert legs.decode.reason.startswith(f"{legs.decode.option.worker}: ")
    assert legs.decode.option.worker in roles
    if legs.prefill is None:
        assert case.policy.policy != "strict" or case.one_leg
        assert roles[legs.decode.option.worker] != "prefill" or has == {"prefill"}, "while there is anybody else"
        return
    assert not case.one_leg
    assert legs.prefill.reason.startswith(f"{legs.prefill.option.worker}: ")
    assert legs.prefill.option.worker != legs.decode.option.worker
    assert roles[legs.prefill.option.worker] in ("prefill", "aggregated")
    assert roles[legs.decode.option.worker] in ("decode", "aggregated")
    queued = {contender.whole.worker: contender.queued_tokens for contender in case.contenders}
    if case.policy.policy == "conditional":
        assert queued[legs.prefill.option.worker] <= case.policy.max_prefill_tokens
    for choice in (legs.prefill, legs.decode):
        won = next(each for each in choice.candidates if each.worker == choice.option.worker)
        if case.mode == "kv" and not case.temperature:
            assert won.cost == min(each.cost for each in choice.candidates)
