"""The KV tiers of a box: how full each is, what goes in and out right now, and what is wrong with one that is off."""

from __future__ import annotations

from dynamo_box import wording
from dynamo_box.protocol.figures import TierFigures, TierUse, WorkerTiers
from dynamo_box.tui import tiers
from dynamo_box.tui.history import BUCKET_S, Flow, History
from dynamo_box.tui.model import Cell, Column, Frame, Lines, Row, Span, Table, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.tiers import DISK_TIER, HOST_TIER, OFF, ON, SUSPENDED, Store
from dynamo_box.tui.views import cells, charts
from dynamo_box.tui.views.cells import Fact, Line

TIERS = "tiers"
TONES = {HOST_TIER: Tone.HOST, DISK_TIER: Tone.DISK}
_STATE_TONES = {ON: Tone.GOOD, OFF: Tone.DIM, SUSPENDED: Tone.WARN}
_IN = {HOST_TIER: Flow.OFFLOAD, DISK_TIER: Flow.WRITE}
_OUT = {HOST_TIER: Flow.ONBOARD, DISK_TIER: Flow.READ}
_BAR_COLUMNS = 8
_FLOW_BUCKETS = 48
_REASONS_SHOWN = 16

_COLUMNS = (
    Column("tier", "TIER", least=4, widest=8, help="host: shared memory of the box; disk: files below the home"),
    Column("state", "STATE", keep=14, least=9, widest=12, help="a suspended one comes back by itself"),
    Column("full", "FULL", keep=9, least=13, widest=13, help="of its capacity"),
    cells.number_column("used", "USED", keep=8),
    cells.number_column("blocks", "BLOCKS", keep=5),
    cells.number_column("in", "IN", keep=13, help="bytes a second that come in now, and from where"),
    cells.number_column("out", "OUT", keep=12, help="bytes a second that are read out now, and to where"),
    cells.number_column("hit", "HIT", keep=6, help="of the blocks asked for, found here; since the start"),
    cells.number_column("evicted", "EVICTED", keep=3, help="blocks that made room for others"),
    cells.number_column("dropped", "DROPPED", keep=4, help="blocks that never came in; enter says why"),
    cells.number_column("failed", "FAILED", keep=2, help="blocks that didn't pass their check: computed anew"),
    cells.number_column("queued", "QUEUED", keep=1, help="blocks that wait to be written"),
    Column("reason", "REASON", keep=11, least=20, widest=80, help="why it is suspended, or smaller"),
)


def table(frame: Frame) -> Table | None:
    """None in a box without tiers."""
    process = tiers.process_of(frame.snapshot)
    if process is None:
        return None
    store = tiers.store_of(frame.snapshot)
    rows = [] if store is None else [_row(name, tier, frame.history) for name, tier in store.tiers.items()]
    silence = f"{one_line(process.name)} is {one_line(process.state)} and has reported nothing yet."
    return cells.table(TIERS, "KV tiers", _COLUMNS, rows, empty=silence, note=_note(store))


def detail(frame: Frame, row: str) -> Lines | None:
    """All about the tier of this row: what came in, what was read, what never came, and who had what of it."""
    store = tiers.store_of(frame.snapshot)
    if store is None or row not in store.tiers:
        return None
    tier = store.tiers[row]
    lines = [
        *cells.facts(_facts(row, tier, store)),
        *cells.section(f"Now, and the last {wording.duration(_FLOW_BUCKETS * BUCKET_S)}", _flows(row, frame.history)),
        *cells.section("In and out, since the start", _traffic(row, tier)),
        *cells.section("Never came in, in blocks", cells.facts(reasons(tier.dropped))),
        *cells.section("Prompt tokens, by worker", _by_worker(row, frame)),
    ]
    return Lines("tier", f"{row} tier", tuple(lines))


def state(tier: TierFigures) -> Cell:
    return Cell(one_line(tier.state), _STATE_TONES.get(tier.state, Tone.PLAIN), tier.state)


def reasons(counts: dict[str, int]) -> list[Fact]:
    """The most frequent first."""
    ordered = sorted(counts.items(), key=lambda each: -each[1])[:_REASONS_SHOWN]
    return [(one_line(reason).replace("_", " "), cells.count(count, Tone.WARN)) for reason, count in ordered if count]


def use_of(worker: WorkerTiers, tier: str) -> TierUse:
    return worker.host if tier == HOST_TIER else worker.disk


def _row(name: str, tier: TierFigures, history: History) -> Row:
    tone = TONES[name]
    off = tier.state == OFF
    dropped = sum(tier.dropped.values())
    share = cells.ratio(tier.used_bytes, tier.capacity_bytes)
    return Row(
        name,
        (
            Cell(name, tone),
            state(tier),
            cells.bar(share, _BAR_COLUMNS, tone),
            cells.ABSENT if off else cells.size_of(tier.used_bytes, tier.capacity_bytes, tone),
            cells.ABSENT if off else cells.count(tier.blocks),
            cells.ABSENT if off else _flow(_IN[name], history, tone),
            cells.ABSENT if off else _flow(_OUT[name], history, tone),
            cells.percent(cells.ratio(tier.hits, tier.lookups)),
            cells.ABSENT if off else cells.count(tier.evicted),
            cells.ABSENT if off else cells.count(dropped, Tone.WARN if dropped else Tone.PLAIN),
            cells.count(tier.failed, Tone.BAD) if tier.failed else cells.ABSENT,
            cells.count(tier.queued) if tier.queued else cells.ABSENT,
            cells.text(tier.reason, _STATE_TONES.get(tier.state, Tone.PLAIN)),
        ),
    )


def _flow(flow: Flow, history: History, tone: Tone) -> Cell:
    """`device→host 120 MiB/s`."""
    rate = cells.byte_rate(history.flow_rate(flow), tone)
    return cells.ABSENT if rate is cells.ABSENT else rate._replace(text=f"{flow} {rate.text}")


def _note(store: Store | None) -> str:
    if store is None:
        return ""
    figures = store.figures
    words = [
        "simulated: no bytes, and no files" if figures.simulated else "",
        f"{figures.leases:,} leases" if figures.leases else "",
        f"{figures.indexing} layouts being indexed" if figures.indexing else "",
    ]
    return ", ".join(word for word in words if word)


def _facts(name: str, tier: TierFigures, store: Store) -> list[Fact]:
    figures = store.figures
    facts = [
        ("held by", cells.text(store.process.name)),
        ("state", state(tier)),
        ("reason", cells.text(tier.reason, Tone.WARN)),
        ("full", cells.bar(cells.ratio(tier.used_bytes, tier.capacity_bytes), 2 * _BAR_COLUMNS, TONES[name])),
        ("used", _exact(tier.used_bytes)),
        ("capacity", _exact(tier.capacity_bytes)),
        ("blocks", cells.count(tier.blocks)),
        ("blocks asked for", cells.count(tier.lookups)),
        ("found here", cells.count(tier.hits)),
        ("hit rate", cells.percent(cells.ratio(tier.hits, tier.lookups))),
        ("evicted", cells.count(tier.evicted)),
        ("failed their check", cells.count(tier.failed, Tone.BAD if tier.failed else Tone.PLAIN)),
        ("waiting to be written", cells.count(tier.queued)),
    ]
    if name == DISK_TIER:
        facts += [
            ("directory", cells.text(figures.directory)),
            ("admission", cells.text(figures.admission.replace("_", " "))),
            ("indexed in", cells.took(figures.indexed_in_s)),
        ]
    return facts


def _exact(size: int) -> Cell:
    return Cell(f"{wording.size(size)} ({size:,} B)")


def _flows(name: str, history: History) -> list[Line]:
    """The rate of each way now, and a strip of the last minutes, shaded by its own most."""
    lines: list[Line] = []
    for flow in (_IN[name], _OUT[name]):
        rate = cells.byte_rate(history.flow_rate(flow), TONES[name])
        if rate is cells.ABSENT:
            continue
        recent = history.recent_flow(flow, _FLOW_BUCKETS)
        most = max(recent)
        strip = charts.heat([each / most if each else None for each in recent]) if most else ()
        lines.append((Span(f"{flow}  ", Tone.DIM), Span(f"{rate.text:>11}  ", rate.tone), *strip))
    return lines


def _traffic(name: str, tier: TierFigures) -> list[Line]:
    ways = ((_IN[name], tier.in_blocks, tier.in_bytes, tier.in_seconds),
            (_OUT[name], tier.out_blocks, tier.out_bytes, tier.out_seconds))  # fmt: skip
    rows = [
        (Cell(flow.value), cells.count(blocks), cells.size(size), bandwidth(size, seconds))
        for flow, blocks, size, seconds in ways
    ]
    return charts.grid(("", "blocks", "bytes", "while copying"), rows)


def bandwidth(size: int, seconds: float) -> Cell:
    """Of the copies alone."""
    return cells.byte_rate(size / seconds) if seconds > 0 else cells.ABSENT


def _by_worker(name: str, frame: Frame) -> list[Line]:
    rows = []
    for process, figures in tiers.workers_with(frame.snapshot):
        if figures.tiers is not None:
            use = use_of(figures.tiers, name)
            rows.append((Cell(one_line(process.name)), *use_cells(use)))
    return charts.grid(("worker", *USE_HEADS), rows)


USE_HEADS = ("matched", "loaded", "failed", "wasted", "bytes", "while copying")


def use_cells(use: TierUse) -> tuple[Cell, ...]:
    return (
        cells.count(use.matched),
        cells.count(use.loaded),
        cells.count(use.failed, Tone.WARN if use.failed else Tone.PLAIN),
        cells.count(use.wasted),
        cells.size(use.bytes),
        bandwidth(use.bytes, use.seconds),
    )
