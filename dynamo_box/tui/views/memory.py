"""Where memory went: every device, the host and the disks, each as a bar, in exact bytes, and by process; and who maps
the weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_box import wording
from dynamo_box.tui.accounting import DISK, Holding, Place, held_by_purpose, holdings, layouts_at, places
from dynamo_box.tui.host import HOST
from dynamo_box.tui.model import Act, Cell, Column, Frame, Lines, Panel, Row, Span, Tone
from dynamo_box.tui.regions import Region
from dynamo_box.tui.text import fill, one_line, width_of
from dynamo_box.tui.tiers import CLEAR, KVSTORE
from dynamo_box.tui.views import cells, charts, kv_layout_table, layout_table, tier_table
from dynamo_box.tui.views.cells import Line

MAX_BARS = 12
"""Of more places, the host, the disks and the fullest devices have bars; the table has them all."""

_WIDEST_LABEL = 20
_LEAST_BAR = 10

_FILLS = {
    Region.WEIGHTS: ("█", Tone.WEIGHTS),
    Region.USED: ("▓", Tone.KV),
    Region.CACHED: ("▒", Tone.CACHED),
    Region.TIER: ("#", Tone.HOST),
    Region.POOL: ("░", Tone.KV),
    Region.BOX: ("=", Tone.OTHER),
    Region.OTHERS: ("x", Tone.PLAIN),
    Region.UNATTRIBUTED: ("?", Tone.UNKNOWN),
    Region.UNREAD: ("~", Tone.UNKNOWN),
    Region.FREE: ("·", Tone.FREE),
}

_REGION_COLUMNS = (
    (Region.WEIGHTS, "WEIGHTS", 9, "model weights; what several processes map is there once"),
    (Region.USED, "KV USED", 10, "KV blocks that running sequences hold"),
    (Region.CACHED, "KV CACHED", 8, "KV blocks kept for reuse only"),
    (Region.TIER, "KV TIER", 8, "KV in the host tier, which is there once for all who map it, or in the disk tier"),
    (Region.POOL, "KV FREE", 2, "what the KV pool has left"),
    (Region.BOX, "OTHER", 7, "what the box holds beside weights and KV"),
    (Region.OTHERS, "OTHERS", 6, "what other processes hold; on a disk, other files"),
    (Region.UNATTRIBUTED, "UNATTRIBUTED", 5, "in use, nobody knows by whom"),
    (Region.UNREAD, "NOT READ", 3, "may be in use or free: the device doesn't say"),
    (Region.FREE, "FREE", 11, "not in use; of a planned place, not set aside"),
)
_COLUMNS = (
    Column("place", "PLACE", least=12, widest=24, help="a device, the memory of the machine, or a file system"),
    cells.number_column("total", "TOTAL", keep=4),
    *(
        cells.number_column(region.name.lower(), title, keep=keep, help=words)
        for region, title, keep, words in _REGION_COLUMNS
    ),
    Column("basis", "BASIS", keep=1, help="planned: nothing measures the place, these are the plan's bytes"),
)


class Memory:
    name = "memory"
    summary = "who holds the bytes of each device, the host and the disks"
    acts: tuple[Act, ...] = (
        Act(
            "c",
            CLEAR,
            "clear KV tier",
            "Which KV tier shall be emptied? What was in it is computed again.",
            needs_row=False,
            of=KVSTORE,
        ),
    )

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        found = places(frame.snapshot)
        labels = _labels(frame, found)
        rows = [_row(place, labels[place.key]) for place in found]
        table = cells.table("places", "Bytes", _COLUMNS, rows, empty="Nothing is known of devices, host and disks.")
        more = (tier_table.table(frame), kv_layout_table.table(frame), layout_table.table(frame))
        tables = (table, *(each for each in more if each is not None))
        if not found:
            return tables
        return Lines("bars", "Memory", charts.clipped(_bars(found, labels, width), width)), *tables

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        if panel == layout_table.LAYOUTS:
            return layout_table.detail(frame, row)
        if panel == tier_table.TIERS:
            return tier_table.detail(frame, row)
        if panel == kv_layout_table.KV_LAYOUTS:
            return kv_layout_table.detail(frame, row)
        found = places(frame.snapshot)
        place = next((place for place in found if place.key == row), None)
        if place is None:
            return None
        lines = [
            *cells.facts(_identity(place)),
            *cells.section("Regions", _regions(place)),
            *cells.section("Plan", _against_plan(place)),
            *cells.section("Who maps what", layout_table.who_maps_what(layouts_at(frame.snapshot, place.key))),
            *cells.section("By process, as each says", _by_process(holdings(frame.snapshot, place.key))),
        ]
        return Lines("place", _labels(frame, found)[place.key], tuple(lines))


VIEW = Memory()


def _labels(frame: Frame, found: Iterable[Place]) -> dict[str, str]:
    """What to call each place, by its key: a device by its short name, a disk by its path."""
    names = cells.device_names(frame.snapshot.devices)
    return {place.key: one_line(place.key) if place.kind in (HOST, DISK) else names[place.key] for place in found}


def _row(place: Place, label: str) -> Row:
    regions = place.regions
    return Row(
        place.key,
        (
            Cell(label),
            cells.count(place.total),
            *(cells.count(regions.get(region), _FILLS[region][1]) for region, *_ in _REGION_COLUMNS),
            Cell("planned", Tone.DIM) if place.regions and not place.measured else cells.ABSENT,
        ),
    )


# bars


def _bars(found: tuple[Place, ...], labels: dict[str, str], width: int) -> list[Line]:
    shown = _fullest(found)
    figures = {place.key: _in_use(place) for place in shown}
    label_width = min(max(width_of(labels[place.key]) for place in shown), _WIDEST_LABEL, max(width // 4, 1))
    figures_width = max(width_of(figure) for figure in figures.values())
    bar_width = width - label_width - figures_width - 2
    if bar_width < _LEAST_BAR:
        bar_width, figures_width = max(width - label_width - 1, 0), 0
    lines = []
    for place in shown:
        line = (Span(fill(labels[place.key], label_width) + " "), *_bar(place, bar_width))
        if figures_width:
            line = (*line, Span(" " + fill(figures[place.key], figures_width, right=True)))
        lines.append(line)
    if len(shown) < len(found):
        lines.append(cells.remark(f"… and {len(found) - len(shown)} that are less full"))
    return lines + _legend(shown, width)


def _fullest(found: tuple[Place, ...]) -> list[Place]:
    """At most MAX_BARS, in their order."""
    if len(found) <= MAX_BARS:
        return list(found)
    by_rank = sorted(found, key=lambda place: (place.kind not in (HOST, DISK), _free_share(place)))
    keys = {place.key for place in by_rank[:MAX_BARS]}
    return [place for place in found if place.key in keys]


def _free_share(place: Place) -> float:
    """1 where it is unknown."""
    free = place.regions.get(Region.FREE)
    return 1.0 if free is None or not place.total else free / place.total


def _bar(place: Place, width: int) -> Line:
    parts = [(size, *_FILLS[region]) for region, size in place.regions.items()]
    return charts.stacked(parts, width) or (Span(fill("not read", width), Tone.DIM),)


def _in_use(place: Place) -> str:
    """`57.0/80.0 GiB  71%`: what isn't free, of all of it; `57.0/80.0 GiB planned`."""
    free = place.regions.get(Region.FREE)
    known = [size for region, size in place.regions.items() if region not in (Region.FREE, Region.UNREAD)]
    used = sum(known) if known else None
    text = cells.size_of(used, place.total).text
    if not place.measured:
        return f"{text} planned" if place.regions else ""
    if used is None or free is None or not place.total:
        return text
    return f"{text} {cells.percentage(used / place.total):>4}"


def _legend(shown: Iterable[Place], width: int) -> list[Line]:
    """The fills that can be seen."""
    there = {region for place in shown for region, size in place.regions.items() if size}
    return charts.flowing(
        [(Span(fill_character, tone), Span(f" {region.value}", Tone.DIM))
         for region, (fill_character, tone) in _FILLS.items() if region in there],
        width,
    )  # fmt: skip


# details


def _identity(place: Place) -> list[tuple[str, Cell]]:
    return [
        ("name", cells.text(place.name)),
        ("kind", cells.text(place.kind)),
        ("total", Cell(_exact(place.total)) if place.total is not None else cells.ABSENT),
        ("regions", Cell("measured" if place.measured else "as planned: nothing measures this place")),
    ]


def _exact(size: int | None) -> str:
    return "-" if size is None else f"{wording.size(size)} ({size:,} B)"


def _regions(place: Place) -> list[Line]:
    rows = [
        (
            Cell(region.value, tone),
            cells.size(size, tone),
            Cell(f"{size:,}"),
            cells.percent(cells.ratio(size, place.total or 0)),
        )
        for region, (_, tone) in _FILLS.items()
        if (size := place.regions.get(region)) is not None
    ]
    return charts.grid(("", "", "bytes", "share"), rows)


def _against_plan(place: Place) -> list[Line]:
    held = held_by_purpose(place)
    rows = [
        (Cell(one_line(purpose)), cells.size(planned), cells.size(held.get(purpose)),
         _difference(held.get(purpose), planned))
        for purpose, planned in place.planned.items()
    ]  # fmt: skip
    return charts.grid(("purpose", "planned", "held", ""), rows)


def _difference(held: int | None, planned: int) -> Cell:
    if held is None:
        return cells.ABSENT
    if held == planned:
        return Cell("as planned", Tone.DIM)
    return Cell(f"{wording.size(abs(held - planned))} {'more' if held > planned else 'less'}")


def _by_process(held: list[Holding]) -> list[Line]:
    """Resident memory is of the host, whatever device the process works on."""
    rows = [
        (
            Cell(one_line(each.process.name)),
            cells.size(each.weights, Tone.WEIGHTS),
            cells.size(each.kv_used, Tone.KV),
            cells.size(each.kv_cached, Tone.CACHED),
            cells.size(each.kv, Tone.KV),
            cells.size(each.kv_tier, Tone.HOST),
            cells.size(each.process.rss_bytes),
        )
        for each in held
    ]
    return charts.grid(("process", "weights", "KV used", "KV cached", "KV pool", "KV tier", "resident"), rows)
