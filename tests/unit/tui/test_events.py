"""The events screen, from snapshots."""

from __future__ import annotations

import pytest
from fakes import snapshots
from fakes.panels import text
from msgspec.structs import replace

from dynamo_box.snapshot import BoxSnapshot, EventInfo
from dynamo_box.tui.model import Table, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import events
from dynamo_box.tui.views.events import EVENTS

VIEW = events.VIEW


def table(snapshot: BoxSnapshot) -> Table:
    (found,) = VIEW.panels(snapshots.frame(snapshot), 120)
    assert isinstance(found, Table)
    return found


def test_the_newest_comes_first() -> None:
    keys = [int(row.key) for row in table(snapshots.degraded()).rows]
    assert keys == sorted(keys, reverse=True)


def test_levels_are_toned_and_sorted_by_how_bad_they_are() -> None:
    shown = table(snapshots.degraded())
    index = [column.key for column in shown.columns].index("level")
    by_level = {row.cells[index].text: row.cells[index] for row in shown.rows}
    assert by_level["error"].tone is Tone.BAD
    assert by_level["warning"].tone is Tone.WARN
    assert by_level["info"].tone is Tone.DIM
    assert sorted(by_level, key=lambda level: by_level[level].sort or 0) == ["info", "warning", "error"]
    assert shown.note == "3 errors, 1 warning"


def test_an_event_of_the_box_itself_has_no_process() -> None:
    shown = table(snapshots.tiny())
    assert "process" not in [column.key for column in shown.columns]
    assert shown.rows[0].cells[-1].text == "starting smollm2 at http://127.0.0.1:8000"


def test_the_detail_has_the_whole_text() -> None:
    long = "a cause that goes on and on, " * 20
    event = EventInfo(7, snapshots.NOW - 90, "error", "w.0", long)
    frame = snapshots.frame(replace(snapshots.tiny(), events=(event,)))
    detail = VIEW.detail(frame, EVENTS, "7")
    assert detail is not None and detail.title == "event 7"
    assert " ".join(text(detail).split()).endswith(" ".join(long.split()))
    assert all(len(line) <= 80 for line in text(detail).splitlines())
    assert "1m30s" in text(detail)


def test_an_event_that_is_gone_has_no_detail() -> None:
    assert VIEW.detail(snapshots.frame(snapshots.busy()), EVENTS, "999") is None


def test_a_box_where_nothing_happened_says_so() -> None:
    assert table(snapshots.empty()).empty == "Nothing has happened yet."


@pytest.mark.parametrize("kind", snapshots.all_kinds())
def test_no_snapshot_breaks_it(kind: str) -> None:
    snapshot = snapshots.all_kinds()[kind]
    shown = table(snapshot)
    assert len(shown.rows) == len(snapshot.events)
    for row in shown.rows:
        assert len(row.cells) == len(shown.columns)
        assert all(cell.text == one_line(cell.text) for cell in row.cells)
        assert "\x1b" not in text(VIEW.detail(snapshots.frame(snapshot), EVENTS, row.key))
