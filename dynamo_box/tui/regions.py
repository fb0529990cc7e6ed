"""Bytes of one place, shared out: each region takes what it claims of what those before it left over. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import DeviceFigures

WEIGHTS, KV, TIER = "weights", "KV", "KV tier"
"""The purposes of planned bytes that have regions of their own; all others are the box's other bytes."""


class Region(enum.StrEnum):
    """What bytes are for, in the order in which they lie side by side.

    CACHED are KV blocks kept for reuse only, TIER those in the box's host or disk tier, POOL what the engines' pools
    have left. BOX is what the box holds beside weights and KV. OTHERS is other processes' (on a disk: other files).
    UNATTRIBUTED is in use, nobody knows by whom; UNREAD may be in use or free: the device doesn't say.
    """

    WEIGHTS = "weights"
    USED = "KV used"
    CACHED = "KV cached"
    TIER = "KV tier"
    POOL = "KV free"
    BOX = "other"
    OTHERS = "others"
    UNATTRIBUTED = "unattributed"
    UNREAD = "not read"
    FREE = "free"


Claims = dict[Region, int]
"""Bytes that are said to be held, in the order in which they are believed."""


def measured(figures: DeviceFigures, total: int | None, claims: Claims) -> dict[Region, int]:
    """Shares out the extent: what is in use, or all of a place that doesn't say how much that is."""
    used, box, others = (whole(size) for size in (figures.used_bytes, figures.box_bytes, figures.other_bytes))
    bounds = [size for size in (used, total) if size is not None]
    extent = min(bounds) if bounds else (_sum(claims) if box is None else box) + (others or 0)
    inside = max(extent - (others or 0), 0) if box is None else min(box, extent)
    regions = granted(claims, inside)
    if box is not None:
        regions[Region.BOX] = inside - sum(regions.values())
    left = extent - sum(regions.values())
    if others is not None:
        regions[Region.OTHERS] = min(others, left)
        left -= regions[Region.OTHERS]
    if used is not None:
        regions[Region.UNATTRIBUTED] = left
        if total is not None:
            regions[Region.FREE] = total - extent
    elif total is not None:
        regions[Region.UNREAD] = left
    return regions


def as_planned(planned: dict[str, int], total: int | None, workers: Iterable[WorkerFigures]) -> dict[Region, int]:
    """What the plan set aside; its KV is divided as the workers' blocks are."""
    claims: Claims = {}
    if WEIGHTS in planned:
        claims[Region.WEIGHTS] = planned[WEIGHTS]
    if KV in planned:
        claims |= divided(planned[KV], workers)
    if TIER in planned:
        claims[Region.TIER] = planned[TIER]
    other = [size for purpose, size in planned.items() if purpose not in (WEIGHTS, KV, TIER)]
    if other:
        claims[Region.BOX] = sum(other)
    regions = granted(claims, _sum(claims) if total is None else total)
    if total is not None:
        regions[Region.FREE] = total - sum(regions.values())
    return regions


def divided(pool: int, workers: Iterable[WorkerFigures]) -> Claims:
    """The bytes of a pool as the blocks in it are used; while no worker says that it has any, all of them are left."""
    total = used = cached = 0
    for figures in workers:
        total += figures.kv_blocks_total
        used += figures.kv_blocks_used
        cached += figures.kv_blocks_cached
    if total <= 0:
        return {Region.POOL: pool}
    used = min(max(used, 0), total)
    cached = min(max(cached, 0), total - used)
    used_bytes, cached_bytes = pool * used // total, pool * cached // total
    return {Region.USED: used_bytes, Region.CACHED: cached_bytes, Region.POOL: pool - used_bytes - cached_bytes}


def granted(claims: Claims, room: int) -> dict[Region, int]:
    """Of each claim, in order, as much as those before it left of `room` bytes."""
    regions = {}
    for region, claim in claims.items():
        regions[region] = min(max(claim, 0), room)
        room -= regions[region]
    return regions


def whole(size: int | None) -> int | None:
    """Nothing is less than none, whatever a recording says."""
    return None if size is None else max(size, 0)


def _sum(claims: Claims) -> int:
    return sum(max(claim, 0) for claim in claims.values())
