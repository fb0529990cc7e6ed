"""Requests in two legs: what workers serve as now, whether a box is split into roles, and the policy in words. Pure."""

from __future__ import annotations

from dynamo_box.protocol.figures import RouterFigures, WorkerFigures
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo

PREFILL, DECODE, BOTH = "prefill", "decode", "aggregated"
SPLIT = "split"
"""Trait of a box: some of its workers serve one leg alone, so that roles and the policy mean something."""
POLICY, ROLE = "disagg", "role"
"""The acts; the first is also the setting of the router."""


def role_of(process: ProcessInfo) -> str:
    """What a worker serves as now: as it says itself, else as planned."""
    said = process.figures.role if isinstance(process.figures, WorkerFigures) else ""
    return said or process.role or ""


def is_split(snapshot: BoxSnapshot) -> bool:
    return any(role_of(each) in (PREFILL, DECODE) for each in snapshot.processes if each.kind == "worker")


def split_models(snapshot: BoxSnapshot) -> set[str]:
    return {
        each.model
        for each in snapshot.processes
        if each.kind == "worker" and each.model and role_of(each) in (PREFILL, DECODE)
    }


def traits(snapshot: BoxSnapshot) -> set[str]:
    """SPLIT, if the box is."""
    return {SPLIT} if is_split(snapshot) else set()


def policy_of(router: RouterFigures) -> str:
    """In a few words, with its thresholds if it has some; "" where the router says nothing of it."""
    return in_words(router.disagg_settings) if router.disagg else ""


def in_words(disagg: Disagg) -> str:
    if disagg.policy != "conditional":
        return disagg.policy
    least = f"≥{disagg.min_uncached_tokens:,} tokens and ≥{disagg.min_uncached_share:.0%} uncached"
    return f"conditional: {least}, ≤{disagg.max_prefill_tokens:,} queued"
