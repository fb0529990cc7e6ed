"""One leg or two: whether a request has its prompt computed on one worker and goes on at another. Pure.

A model is split when some worker of it is there for one leg alone; then a policy decides (`spec.Disagg`). Workers
of the role "aggregated" take either leg, or both:

    prefill leg   prefill and aggregated workers, by what they would have to compute
    decode leg    decode and aggregated workers, by the blocks in use; what they need of the prompt arrives
    one leg       decode and aggregated workers, as if there were no roles; prefill workers if there is nobody else

Two legs are always on two workers. Where the only one for a leg could take the other too, it is kept for its own.

`conditional` compares a prompt with what those who could take the whole of it have, since they would do it
otherwise: that a prefill worker has it cached spares nothing unless it gets its leg.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dynamo_box.protocol.request import Leg
from dynamo_box.protocol.spec import Disagg
from dynamo_box.router.cost import DEFAULT_COSTS, Choice, Knobs, Mode, Option, TierCosts, decide

PREFILL, DECODE, AGGREGATED = "prefill", "decode", "aggregated"


@dataclass(frozen=True, slots=True)
class Contender:
    """A worker that may get a request. `whole` is how it stands if it gets all of it; `active_blocks` of KV are in use
    there, and `queued_tokens` of prompts yet to be computed, both without this request.
    """

    role: str
    whole: Option
    active_blocks: int
    queued_tokens: int

    def for_prefill(self) -> Option:
        """Its blocks are soon somewhere else. Among equals, whoever has nothing else to do."""
        return replace(self.whole, decode_blocks=self.active_blocks, edge=int(self.role == PREFILL))

    def for_decode(self) -> Option:
        """Nothing is computed. Among equals, whoever has more of it already."""
        return replace(
            self.whole,
            prefill_tokens=self.queued_tokens,
            host_blocks=0,
            disk_blocks=0,
            edge=self.whole.overlap_blocks,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What of a request bears on the decision. `pinned`: the client named the only contender. `one_leg`: not two."""

    prompt_tokens: int
    block_size: int
    knobs: Knobs
    pinned: bool = False
    one_leg: bool = False


@dataclass(frozen=True, slots=True)
class Legs:
    """`decode` is who answers, and without `prefill` who does it all; `why` is the policy's reason, "" without one."""

    decode: Choice
    prefill: Choice | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """The policy allows for nothing that is possible now: nobody is there for this leg."""

    leg: Leg


def decide_legs(
    mode: Mode,
    contenders: Sequence[Contender],
    request: Request,
    policy: Disagg | None,
    *,
    rng: random.Random,
    last: Mapping[Leg, str],
    tier_costs: TierCosts = DEFAULT_COSTS,
) -> Legs | Missing:
    """Choose among `contenders` (at least one). `policy` is None where the model isn't split. `last` are the workers
    that round-robin chose before.
    """

    def choose(leg: Leg, options: Sequence[Option]) -> Choice:
        return decide(
            mode,
            options,
            prompt_tokens=request.prompt_tokens,
            block_size=request.block_size,
            knobs=request.knobs,
            rng=rng,
            last=last.get(leg, ""),
            pinned=request.pinned,
            tier_costs=tier_costs,
            leg=leg,
        )

    able = [contender for contender in contenders if contender.role != PREFILL] or list(contenders)

    def in_one(why: str) -> Legs:
        workers = contenders if request.pinned else able
        return Legs(choose("whole", [contender.whole for contender in workers]), why=why)

    if policy is None or request.pinned:
        return in_one("" if policy is None else "the request names its worker")
    if request.one_leg:
        return in_one("one leg was asked for")
    prefill, decode = candidates(contenders)
    if not (prefill and decode):
        leg: Leg = "decode" if prefill else "prefill"
        return Missing(leg) if policy.policy == "strict" else in_one(f"{policy.policy}: no worker for {leg}")
    why = f"{policy.policy}: all prompts go in two legs"
    if policy.policy == "conditional":
        against = _too_short(able, request, policy) or _too_busy(prefill, policy)
        if against:
            return in_one(f"conditional: {against}")
        prefill = [contender for contender in prefill if contender.queued_tokens <= policy.max_prefill_tokens]
        why = f"conditional: {_uncached(able, request)} of {request.prompt_tokens} tokens are uncached"
    first = choose("prefill", [contender.for_prefill() for contender in prefill])
    rest = [contender.for_decode() for contender in decode if contender.whole.worker != first.option.worker]
    return Legs(choose("decode", rest), first, why)


def candidates(contenders: Sequence[Contender]) -> tuple[list[Contender], list[Contender]]:
    """Who may get the prefill leg, and who the decode leg; one of them is empty where two workers aren't to be had.

    Whoever gets the prefill leg leaves somebody else for the other.
    """
    prefill = [contender for contender in contenders if contender.role != DECODE]
    decode = [contender for contender in contenders if contender.role != PREFILL]
    if len(decode) == 1:
        prefill = [contender for contender in prefill if contender is not decode[0]]
    return prefill, decode


def _uncached(able: Sequence[Contender], request: Request) -> int:
    """Tokens that whoever has most of the prompt would still have to compute."""
    spared = max(contender.whole.spared_blocks for contender in able)
    return max(request.prompt_tokens - spared * request.block_size, 0)


def _too_short(able: Sequence[Contender], request: Request, policy: Disagg) -> str:
    uncached = _uncached(able, request)
    if uncached < policy.min_uncached_tokens:
        return f"{uncached} uncached tokens are fewer than {policy.min_uncached_tokens}"
    share = uncached / request.prompt_tokens
    if share < policy.min_uncached_share:
        return f"{share:.4g} of the prompt is uncached, less than {policy.min_uncached_share:g}"
    return ""


def _too_busy(prefill: Sequence[Contender], policy: Disagg) -> str:
    least = min(contender.queued_tokens for contender in prefill)
    if least <= policy.max_prefill_tokens:
        return ""
    return f"every worker for prefill has {least} tokens to compute or more, over {policy.max_prefill_tokens}"
