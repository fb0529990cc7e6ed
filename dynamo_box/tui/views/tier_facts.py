"""What a store says of its tiers, and a worker of its dealings with them, as details show it."""

from __future__ import annotations

from dynamo_box.protocol.figures import KvStoreFigures, TierFigures, WorkerTiers
from dynamo_box.tui.history import Flow
from dynamo_box.tui.model import Cell, Frame, Tone
from dynamo_box.tui.tiers import DISK_TIER, HOST_TIER, OFF
from dynamo_box.tui.views import cells, charts, tier_table
from dynamo_box.tui.views.cells import Fact, Line


def of_store(store: KvStoreFigures) -> list[Fact]:
    return [
        ("directory", cells.text(store.directory)),
        ("admission to disk", cells.text(store.admission.replace("_", " "))),
        ("layouts being indexed", cells.count(store.indexing, Tone.WARN) if store.indexing else cells.ABSENT),
        ("indexed in", cells.took(store.indexed_in_s)),
        ("leases", cells.count(store.leases)),
        ("reclaimed from the dead", cells.count(store.reclaimed, Tone.WARN if store.reclaimed else Tone.PLAIN)),
        ("connections", cells.count(store.connections)),
        ("requests", cells.count(store.requests)),
        ("refused", cells.count(store.refused, Tone.WARN if store.refused else Tone.PLAIN)),
    ]


def sections_of_store(store: KvStoreFigures, frame: Frame) -> list[Line]:
    tiers = {HOST_TIER: store.host, DISK_TIER: store.disk}
    rates = [(flow.value, cells.byte_rate(frame.history.flow_rate(flow))) for flow in Flow]
    lines: list[Line] = []
    for name, tier in tiers.items():
        lines += cells.section(f"{name.capitalize()} tier", cells.facts(_tier(name, tier)))
    return [*lines, *cells.section("Flows now", cells.facts(rates))]


def _tier(name: str, tier: TierFigures) -> list[Fact]:
    if tier.state == OFF:
        return [("state", tier_table.state(tier))]
    return [
        ("state", tier_table.state(tier)),
        ("reason", cells.text(tier.reason, Tone.WARN)),
        ("used", cells.size_of(tier.used_bytes, tier.capacity_bytes, tier_table.TONES[name])),
        ("blocks", cells.count(tier.blocks)),
        ("found of those asked for", _hits(tier)),
        ("came in", cells.count(tier.in_blocks)),
        ("read out", cells.count(tier.out_blocks)),
        ("evicted", cells.count(tier.evicted)),
        ("failed their check", cells.count(tier.failed, Tone.BAD if tier.failed else Tone.PLAIN)),
        ("dropped", _by_reason(tier.dropped)),
    ]


def _hits(tier: TierFigures) -> Cell:
    share = cells.ratio(tier.hits, tier.lookups)
    return cells.ABSENT if share is None else Cell(f"{tier.hits:,} of {tier.lookups:,}  {cells.percentage(share)}")


def _by_reason(counts: dict[str, int]) -> Cell:
    """`12 queue full, 3 store full`."""
    words = [f"{count.text} {reason}" for reason, count in tier_table.reasons(counts)]
    return cells.text(", ".join(words), Tone.WARN)


def sections_of_worker(tiers: WorkerTiers) -> list[Line]:
    uses = [(Cell(name, tier_table.TONES[name]), *tier_table.use_cells(tier_table.use_of(tiers, name)))
            for name in (HOST_TIER, DISK_TIER)]  # fmt: skip
    offload = [
        ("KV tiers", _connected(tiers)),
        ("offloaded blocks", cells.count(tiers.offloaded)),
        ("offloaded bytes", cells.size(tiers.offloaded_bytes, Tone.HOST)),
        ("while copying", tier_table.bandwidth(tiers.offloaded_bytes, tiers.offload_seconds)),
        ("were there already", cells.count(tiers.known)),
        ("queued", cells.count(tiers.queued)),
        ("held for copies", cells.count(tiers.pinned)),
        ("dropped", _by_reason(tiers.dropped)),
        ("lowest priority offloaded", cells.count(tiers.min_priority) if tiers.min_priority else cells.ABSENT),
        ("kept out by priority", cells.count(tiers.filtered)),
        ("without a priority", cells.count(tiers.unset)),
        ("offload stopped, requests", _by_reason(tiers.terminated)),
        ("decided to load", cells.count(tiers.loads)),
        ("decided to compute", cells.count(tiers.recomputes)),
    ]
    return [
        *cells.section("KV offload, in blocks", cells.facts(offload)),
        *cells.section("Prompt tokens from the tiers", charts.grid(("tier", *tier_table.USE_HEADS), uses)),
    ]


def _connected(tiers: WorkerTiers) -> Cell:
    return cells.text(f"off here: {tiers.connected}", Tone.WARN) if tiers.connected else Cell("connected", Tone.GOOD)
