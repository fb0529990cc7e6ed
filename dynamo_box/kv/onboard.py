"""Load what the tiers have, or compute it: the faster one. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

PROBE_AFTER = 32
"""Decisions against loading after which one goes for it all the same: only a load shows that loading got faster."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured: bytes a second out of each tier ("2", "3"), and prompt tokens a second of the engine. None while
    nothing has been measured.
    """

    bytes_per_s: Mapping[str, float | None]
    prefill_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """Load the first `blocks` of what was found; `reason` is one line for a person."""

    blocks: int
    reason: str


def choose(tiers: str, *, block_bytes: int, block_size: int, rates: Rates) -> Choice:
    """`tiers` has a letter for each block found, in order. What is loaded must be a prefix, so this is the cut with the
    least time for loading what is before it and computing what is after:

        seconds(cut) = Σ block_bytes / bytes_per_s[tier of block]  +  blocks after the cut × block_size / prefill rate

    Unmeasured, everything is loaded: the first loads are the measurement. Among equals the longest wins.
    """
    rate = rates.prefill_tokens_per_s
    if not tiers or not rate:
        return Choice(len(tiers), "the prefill rate has not been measured yet" if tiers else "nothing was found")
    compute = block_size / rate
    best = seconds = len(tiers) * compute
    cut = 0
    for place, tier in enumerate(tiers, 1):
        seconds += _seconds(block_bytes, rates.bytes_per_s.get(tier)) - compute
        if seconds <= best:
            best, cut = seconds, place
    loading = best - (len(tiers) - cut) * compute
    if cut == len(tiers):
        reason = f"loading takes {loading * 1e3:.1f} ms, computing {len(tiers) * compute * 1e3:.1f} ms"
    else:
        reason = f"computing {len(tiers) - cut} of {len(tiers)} blocks is faster than loading them"
    return Choice(cut, reason)


def _seconds(block_bytes: int, speed: float | None) -> float:
    if speed is None:
        return 0.0
    return block_bytes / speed if speed else math.inf
