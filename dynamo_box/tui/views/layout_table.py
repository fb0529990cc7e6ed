"""Layouts of weights: where each lies, and who maps it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_box import wording
from dynamo_box.protocol.figures import LayoutFigures, LockHolder
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui import layouts
from dynamo_box.tui.layouts import Held
from dynamo_box.tui.model import Cell, Column, Frame, Lines, Row, Table, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import cells, charts
from dynamo_box.tui.views.cells import Line

LAYOUTS = "layouts"
_NAMES_SHOWN = 32
"""Of more who map a layout, the first are named and the others counted."""
_STATE_TONES = {"committed": Tone.GOOD, "writing": Tone.WARN, "empty": Tone.DIM}

_COLUMNS = (
    Column("layout", "LAYOUT", least=8, widest=40, help="named as the model whose weights it holds"),
    Column("device", "DEVICE", keep=6, least=6, widest=26),
    Column("place", "PLACE", least=12, widest=16, help="where its bytes are: device, host or disk; → on the way there"),
    Column("state", "STATE", keep=1, least=9, widest=12, help="writing: a new epoch is built"),
    cells.number_column("epoch", "EPOCH", keep=2, help="numbered: the next one is built beside it"),
    cells.number_column("bytes", "BYTES", keep=8),
    cells.number_column("mapped", "READERS", keep=3, help="how many processes map it"),
    Column("readers", "MAPPED BY", keep=7, least=24, widest=80, help="processes that map it, read-only", tail=True),
    Column("writer", "WRITER", keep=4, least=10, widest=36, tail=True),
    Column("waiters", "WAITERS", keep=9, least=22, widest=60, help="who waits for a lock, and since when"),
)


def table(frame: Frame) -> Table | None:
    """None in a box whose weights are in no layouts."""
    services = layouts.services(frame.snapshot)
    if not services:
        return None
    found = layouts.held(frame.snapshot)
    names = cells.device_names(frame.snapshot.devices)
    several = len(services) > 1
    rows = [_row(each, frame.now, cells.device_label(each.device, names) if several else cells.ABSENT)
            for each in found]  # fmt: skip
    return cells.table(LAYOUTS, "Layouts", _COLUMNS, rows, empty=_silence(frame.snapshot), note=_note(found))


def detail(frame: Frame, row: str) -> Lines | None:
    """All about the layout of this row: who holds which lock since when, and what happened to it."""
    each = next((each for each in layouts.held(frame.snapshot) if each.key == row), None)
    if each is None:
        return None
    layout = each.layout
    holders = [*layout.readers, *([layout.writer] if layout.writer else [])]
    lines = [
        *cells.facts(_identity(each)),
        *cells.section("Mapped by", _holders(holders, frame.now)),
        *cells.section("Waiting", _holders(layout.waiters, frame.now)),
        *cells.section(
            "History, newest first",
            cells.facts((cells.clock(event.at, frame.now).text, cells.text(event.text))
                        for event in reversed(layout.history)),
        ),
    ]  # fmt: skip
    return Lines("layout", one_line(layout.name), tuple(lines))


def who_maps_what(found: Iterable[tuple[Held, int]]) -> list[Line]:
    """Layouts with bytes at a place, and who maps them; where they only sleep, nobody does."""
    return cells.facts((one_line(each.layout.name), cells.text(_words(each.layout, size))) for each, size in found)


def _words(layout: LayoutFigures, size: int) -> str:
    who = _names(layout.readers).text if layout.readers else "nobody"
    building = f", written by {layout.writer.owner}" if layout.writer else ""
    return f"{wording.size(size)}  {place(layout).text}  mapped by {who}{building}"


def mapping(snapshot: BoxSnapshot, model: str) -> list[tuple[str, Cell]]:
    """A model's layouts, a line each: where, how large, and who maps it."""
    names = cells.device_names(snapshot.devices)
    return [
        (cells.device_label(each.device, names).text, summary(each.layout))
        for each in layouts.of_model(snapshot, model)
    ]


def place(layout: LayoutFigures) -> Cell:
    """`host`, or `device→host` on the way."""
    if layout.moving:
        return cells.text(f"{layout.place or '-'}→{layout.moving}", Tone.WARN)
    return cells.text(layout.place)


def summary(layout: LayoutFigures) -> Cell:
    """Where it is, in which epoch, and who maps it, in a line."""
    return cells.text(f"epoch {layout.epoch}  {layout.state}  {_words(layout, layout.bytes)}")


def _row(each: Held, now: float, device: Cell) -> Row:
    layout = each.layout
    return Row(
        each.key,
        (
            cells.name(layout.name),
            device,
            place(layout),
            Cell(one_line(layout.state), _STATE_TONES.get(layout.state, Tone.PLAIN), layout.state),
            cells.count(layout.epoch),
            cells.size(layout.bytes, Tone.WEIGHTS),
            cells.count(len(layout.readers)),
            _names(layout.readers),
            cells.text(layout.writer.owner, Tone.WARN) if layout.writer else cells.ABSENT,
            _waiters(layout.waiters, now),
        ),
    )


def _names(holders: Sequence[LockHolder]) -> Cell:
    """Who they are, each once, and names that differ at their end together: `llama.aggregated.{0,1}`."""
    owners = list(dict.fromkeys(holder.owner for holder in holders))
    families: dict[str, list[str]] = {}
    for owner in owners[:_NAMES_SHOWN]:
        stem, _, end = owner.rpartition(".")
        families.setdefault(stem, []).append(end)
    words = [_family(stem, ends) for stem, ends in families.items()]
    if len(owners) > _NAMES_SHOWN:
        words.append(f"{len(owners) - _NAMES_SHOWN} more")
    return cells.text(", ".join(words))._replace(sort=len(owners)) if owners else cells.ABSENT


def _family(stem: str, ends: Sequence[str]) -> str:
    if not stem:
        return ", ".join(ends)
    return f"{stem}.{ends[0]}" if len(ends) == 1 else f"{stem}.{{{','.join(ends)}}}"


def _waiters(waiters: Sequence[LockHolder], now: float) -> Cell:
    """The one that has waited longest first: `w.1 rw 12s, w.2 ro 3s`."""
    if not waiters:
        return cells.ABSENT
    first = sorted(waiters, key=lambda each: each.since)[:_NAMES_SHOWN]
    words = ", ".join(f"{each.owner} {each.lock} {cells.seconds(now - each.since).text}" for each in first)
    return cells.text(words, Tone.WARN)._replace(sort=len(waiters))


def _holders(holders: Iterable[LockHolder], now: float) -> list[Line]:
    rows = [
        (
            cells.text(each.owner),
            cells.pid(each.pid),
            cells.text(each.lock),
            cells.clock(each.since, now),
            cells.seconds(now - each.since),
        )
        for each in holders
    ]
    return charts.grid(("process", "pid", "lock", "since", "for"), rows)


def _identity(each: Held) -> list[tuple[str, Cell]]:
    layout = each.layout
    places = [(f"bytes on {name}" if name != "host" else "bytes in host memory", size)
              for name, size in layouts.bytes_by_place(layout).items()]  # fmt: skip
    return [
        ("held by", cells.text(each.service.name)),
        ("device", cells.text(each.device)),
        ("place", place(layout)),
        ("state", Cell(one_line(layout.state), _STATE_TONES.get(layout.state, Tone.PLAIN))),
        ("epoch", cells.count(layout.epoch)),
        ("hash", cells.text(layout.layout_hash)),
        ("bytes", Cell(f"{wording.size(layout.bytes)} ({layout.bytes:,} B)", Tone.WEIGHTS)),
        *((label, cells.size(size or None)) for label, size in places),
        ("allocations", cells.count(layout.allocations)),
        ("entries", cells.count(layout.entries)),
    ]


def _note(found: Sequence[Held]) -> str:
    moving = sum(bool(each.layout.moving) for each in found)
    return f"{moving} moving" if moving else ""


def _silence(snapshot: BoxSnapshot) -> str:
    """Why there are no layouts."""
    services = layouts.services(snapshot)
    quiet = next((each for each in services if each.figures is None), None)
    if quiet is not None:
        return f"{one_line(quiet.name)} is {one_line(quiet.state)} and has reported nothing yet."
    return "No weights are in a layout."
