"""The small pieces that all screens are made of: one figure, one cell. Pure, and cheap: a frame has thousands.

A figure that can't be read (or is no number) gives ABSENT, and `table` leaves out the columns where every cell is
absent, so that what this box doesn't have isn't there. Text of others (names, causes, ids) gets in through `text` or
`one_line` only.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeGuard

from rich.cells import chop_cells

from dynamo_box import wording
from dynamo_box.protocol.figures import Quantiles, WorkerFigures
from dynamo_box.snapshot import DeviceInfo, ProcessInfo
from dynamo_box.tui.model import Cell, Column, Row, Span, Table, Tone
from dynamo_box.tui.text import clip, fill, is_time, one_line, span_of_time, width_of

ABSENT = Cell("-", Tone.DIM)
DETAIL_WIDTH = 76
"""Columns of a detail's text: what an 80-column terminal shows beside a frame."""

Line = tuple[Span, ...]
Fact = tuple[str, Cell]

STATE_TONES = {
    "ready": Tone.GOOD,
    "awake": Tone.GOOD,
    "asleep": Tone.ACCENT,
    "falling_asleep": Tone.WARN,
    "waking": Tone.WARN,
    "planned": Tone.DIM,
    "stopped": Tone.DIM,
    "starting": Tone.WARN,
    "draining": Tone.WARN,
    "stopping": Tone.WARN,
    "degraded": Tone.WARN,
    "backoff": Tone.BAD,
    "fatal": Tone.BAD,
    "failed": Tone.BAD,
    "unavailable": Tone.BAD,
}
LEVEL_TONES = {"warning": Tone.WARN, "error": Tone.BAD, "critical": Tone.BAD}

_BAR = "█"
_BAR_REST = "░"
_LONGEST_ID = 12
_LONGEST_LABEL = 36
_DIGITS = re.compile(r"\d+")
_SORTED_DIGITS = 12
_NEVER_CUT = 1000
_DAY_S = 86400.0


# text


def text(value: str | None, tone: Tone = Tone.PLAIN) -> Cell:
    """Foreign text; empty is absent."""
    if not value:
        return ABSENT
    line = one_line(value)
    return Cell(line, tone, line)


def name(value: str | None, tone: Tone = Tone.PLAIN) -> Cell:
    """The name of a process, a model or a device, sorted with its numbers as numbers: `w.2` before `w.10`."""
    return _name(value, tone) if value else ABSENT


@lru_cache(4096)
def _name(value: str, tone: Tone) -> Cell:
    return Cell(one_line(value), tone, _DIGITS.sub(lambda digits: digits[0].zfill(_SORTED_DIGITS), value))


def wrapped(value: str, width: int = DETAIL_WIDTH) -> list[str]:
    """Foreign text as lines of at most `width` columns, broken between words where there are any."""
    lines = []
    for paragraph in wording.printable(value).expandtabs(4).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if width_of(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *whole, line = chop_cells(word, width) or [""]
            lines.extend(whole)
        lines.append(line)
    return lines


# figures


def count(value: int | None, tone: Tone = Tone.PLAIN) -> Cell:
    """`1,234`."""
    return ABSENT if value is None else Cell(f"{value:,}", tone, value)


def rate(per_second: float | None, tone: Tone = Tone.PLAIN) -> Cell:
    """`1,234`, and a decimal below 10: the unit is in the column's title."""
    if not _is_known(per_second):
        return ABSENT
    return Cell(f"{per_second:,.{1 if 0 < per_second < 9.95 else 0}f}", tone, per_second)


def size(value: int | None, tone: Tone = Tone.PLAIN) -> Cell:
    """Bytes: `1.2 GiB`."""
    return ABSENT if value is None else Cell(wording.size(value), tone, value)


def size_of(used: int | None, total: int | None, tone: Tone = Tone.PLAIN) -> Cell:
    """Bytes in use of a whole: `12.3/40.0 GiB`; one of them alone if that is all there is. Sorted by those in use."""
    if used is None:
        return ABSENT if total is None else Cell(f"-/{wording.size(total)}", tone)
    if total is None:
        return size(used, tone)
    whole = wording.size(total)
    one, _, unit = wording.size(used).partition(" ")
    if not whole.endswith(f" {unit}"):
        one = f"{one} {unit}"
    return Cell(f"{one}/{whole}", tone, used)


def byte_rate(per_second: float | None, tone: Tone = Tone.PLAIN) -> Cell:
    """`120 MiB/s`; a rate of nothing is dim."""
    if not _is_known(per_second):
        return ABSENT
    return Cell(f"{wording.size(round(per_second))}/s", tone if per_second >= 0.5 else Tone.DIM, per_second)


def seconds(value: float | None, tone: Tone = Tone.PLAIN) -> Cell:
    """A length of time, such as an uptime or an age: `3m12s`."""
    return Cell(wording.duration(max(value, 0.0)), tone, value) if _is_known(value) else ABSENT


def took(value: float | None, tone: Tone = Tone.PLAIN) -> Cell:
    """How long a step took: `85 ms`, `1.24 s`."""
    return Cell(span_of_time(value), tone, value) if _is_known(value) else ABSENT


def latency(quantiles: Quantiles | None) -> Cell:
    """p50/p99 in milliseconds: `12/85`; sorted by the p50."""
    if quantiles is None or (quantiles.p50 is None and quantiles.p99 is None):
        return ABSENT
    return Cell(f"{_milliseconds(quantiles.p50)}/{_milliseconds(quantiles.p99)}", Tone.PLAIN, quantiles.p50)


def percent(share: float | None, tone: Tone = Tone.PLAIN) -> Cell:
    """A share (0 to 1) as `87%`; what is more than nothing and less than all never looks like either."""
    return Cell(percentage(share), tone, share) if _is_known(share) else ABSENT


def percentage(share: float) -> str:
    if 0.0 < share < 0.01:
        return "<1%"
    return f"{min(round(share * 100), 99) if share < 1.0 else round(share * 100)}%"


def ratio(part: int, whole: int) -> float | None:
    """`part` of `whole`; None when there is no whole to be a part of."""
    return part / whole if whole > 0 else None


def bar(share: float | None, width: int, tone: Tone = Tone.ACCENT) -> Cell:
    """`███░░░░░  37%`, with a bar of `width` columns."""
    if not _is_known(share):
        return ABSENT
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Cell(f"{_BAR * filled}{_BAR_REST * (width - filled)} {percentage(share):>4}", tone, share)


def clock(at: float, now: float) -> Cell:
    """Unix time as the local time of day, with the date if that is a day or more from `now`."""
    return moment(at, "%H:%M:%S" if abs(now - at) < _DAY_S else "%m-%d %H:%M:%S")


def moment(at: float, pattern: str) -> Cell:
    """Unix time as `strftime` writes it; absent if it is none, whatever a recording says."""
    return Cell(time.strftime(pattern, time.localtime(at)), Tone.DIM, at) if is_time(at) else ABSENT


# processes and devices


def state(word: str) -> Cell:
    """A state of a process, a model or the box, in the tone that goes with it."""
    return Cell(one_line(word), STATE_TONES.get(word, Tone.PLAIN), word)


def state_and_phase(process: ProcessInfo) -> Cell:
    """`ready`, or `starting loading weights 120 MiB of 513 MiB`."""
    word = process.state
    if not process.phase and process.progress is None:
        return state(word)
    progress = process.progress
    extent = "" if progress is None else wording.amount(progress.done, progress.total, progress.unit)
    words = one_line(" ".join(part for part in (word, process.phase, extent) if part))
    return Cell(words, STATE_TONES.get(word, Tone.PLAIN), word)


def pid(value: int | None) -> Cell:
    """A process id, without commas; absent where nothing runs."""
    return ABSENT if value is None else Cell(str(value), Tone.PLAIN, value)


def queue(running: int, waiting: int) -> Cell:
    """Requests running/waiting: `12/3`; sorted by both together."""
    return Cell(f"{running}/{waiting}", Tone.WARN if waiting else Tone.PLAIN, running + waiting)


def kv_pool(worker: WorkerFigures) -> Cell:
    """What running requests use of the KV pool: in bytes, or without a unit in blocks, where their size isn't known.
    Absent while there is none, as in a worker that sleeps.
    """
    used, total = worker.kv_blocks_used, worker.kv_blocks_total
    if worker.kv_bytes is not None:
        if not worker.kv_bytes:
            return ABSENT
        return size_of(worker.kv_bytes * used // total if total > 0 else None, worker.kv_bytes, Tone.KV)
    return Cell(f"{used:,}/{total:,}", Tone.KV, used) if total > 0 else ABSENT


def other_bytes(process: ProcessInfo) -> int | None:
    """Resident memory beside weights and KV, which only on the cpu device are part of it.

    None where the worker doesn't say how much these are, or where they are not resident as a whole. What a process has
    touched of the host tier is in it too: nobody tells how much that is.
    """
    resident, worker = process.rss_bytes, process.figures
    if resident is None or process.device != "cpu":
        return resident
    if not isinstance(worker, WorkerFigures) or worker.weights_bytes is None or worker.kv_bytes is None:
        return None
    rest = resident - worker.weights_bytes - worker.kv_bytes
    return rest if rest >= 0 else None


def device_names(devices: Iterable[DeviceInfo]) -> Mapping[str, str]:
    """What to call each device, by its id: the id, and of a long one (a GPU's UUID) as much of its beginning as tells
    it from all others, which is also how CUDA_VISIBLE_DEVICES takes it.
    """
    return _device_names(tuple([device.id for device in devices]))


@lru_cache(8)
def _device_names(ids: tuple[str, ...]) -> Mapping[str, str]:
    return {each: one_line(_shortest_prefix(each, ids)) for each in ids}


def device_label(device: str | None, names: Mapping[str, str]) -> Cell:
    """The device (or devices, joined by commas) of a process, by the names of `device_names`."""
    if not device:
        return ABSENT
    known = names.get(device)
    return text(known or ", ".join(names.get(each, each) for each in device.split(",")))


def _shortest_prefix(name: str, names: Sequence[str]) -> str:
    for length in range(_LONGEST_ID, len(name)):
        prefix = name[:length]
        if sum(other.startswith(prefix) for other in names) == 1:
            return prefix
    return name


# whole tables, and lines of details


def number_column(key: str, title: str, *, keep: int = 0, help: str = "") -> Column:  # noqa: A002 - the field's name
    """A column that is shown whole or not at all: a figure that is cut reads as another."""
    return Column(key, title, right=True, keep=keep, least=_NEVER_CUT, help=help)


def table(
    key: str, title: str, columns: Sequence[Column], rows: Sequence[Row], *, empty: str = "", note: str = ""
) -> Table:
    """A table without the columns in which no row has anything; the first one stays in any case."""
    kept = [
        index
        for index in range(len(columns))
        if index == 0 or not rows or any(row.cells[index].text not in ("", ABSENT.text) for row in rows)
    ]
    if len(kept) < len(columns):
        rows = [Row(row.key, tuple([row.cells[index] for index in kept])) for row in rows]
        columns = [columns[index] for index in kept]
    return Table(key, title, tuple(columns), tuple(rows), empty, note)


def remark(words: str) -> Line:
    return (Span(words, Tone.DIM),)


def section(words: str, lines: Sequence[Line]) -> list[Line]:
    """Lines below a heading, an empty line above it; nothing at all without lines."""
    return [(), (Span(words, Tone.TITLE),), *lines] if lines else []


def facts(pairs: Iterable[tuple[str, Cell]]) -> list[Line]:
    """One line a fact, labels in a column of their own; absent ones have no line, long ones are wrapped."""
    known = [(clip(label, _LONGEST_LABEL), cell) for label, cell in pairs if cell.text not in ("", ABSENT.text)]
    margin = max((width_of(label) for label, _ in known), default=0) + 2
    lines: list[Line] = []
    for label, cell in known:
        first, *rest = wrapped(cell.text, DETAIL_WIDTH - margin)
        lines.append((Span(fill(label, margin), Tone.DIM), Span(first, cell.tone)))
        lines.extend((Span(" " * margin), Span(each, cell.tone)) for each in rest)
    return lines


def _is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _milliseconds(value: float | None) -> str:
    if not _is_known(value):
        return "-"
    scaled = value * 1000
    return f"{scaled:.{1 if scaled < 9.95 else 0}f}"
