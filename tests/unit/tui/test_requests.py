"""The requests screen: what runs now."""

from __future__ import annotations

from typing import Any

from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.protocol.figures import FrontendFigures, RequestFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.history import History
from dynamo_box.tui.model import Frame, Table, Tone
from dynamo_box.tui.views.requests import VIEW


def table(frame: Frame) -> Table:
    (only,) = VIEW.panels(frame, 80)
    assert isinstance(only, Table)
    return only


def texts(found: Table, row: int = 0) -> dict[str, str]:
    return {column.key: cell.text for column, cell in zip(found.columns, found.rows[row].cells, strict=True)}


def request(**given: Any) -> RequestFigures:
    fields: dict[str, Any] = {
        "request_id": "r",
        "model": "m",
        "phase": "decode",
        "worker": "w.0",
        "started": snapshots.NOW - 75,
        "prompt_tokens": 2000,
        "cached_tokens": 500,
        "output_tokens": 40,
    }
    return RequestFigures(**(fields | given))


def serving(*live: RequestFigures, active: int | None = None) -> BoxSnapshot:
    whole = snapshots.tiny()
    *others, frontend = whole.processes
    figures = FrontendFigures(active=len(live) if active is None else active, live=live)
    return replace(whole, processes=(*others, replace(frontend, figures=figures)))


def test_a_row_says_how_far_a_request_is() -> None:
    found = table(snapshots.frame(serving(request())))
    assert texts(found) == {
        "request": "r",
        "age": "1m15s",
        "phase": "decode",
        "model": "m",
        "worker": "w.0",
        "prompt": "2,000",
        "cached": "500",
        "hit": "25%",
        "output": "40",
    }


def test_what_is_not_known_yet_is_absent() -> None:
    waiting = request(phase="queued", worker=None, prompt_tokens=0, cached_tokens=0, output_tokens=0)
    found = texts(table(snapshots.frame(serving(request(), waiting))), 1)
    assert (found["worker"], found["prompt"], found["cached"], found["hit"]) == ("-", "-", "-", "-")
    assert found["output"] == "0"
    miss = texts(table(snapshots.frame(serving(request(cached_tokens=0)))))
    assert (miss["cached"], miss["hit"]) == ("0", "0%")


def test_phases_are_told_apart_by_tone() -> None:
    phases = ("queued", "routing", "prefill", "decode", "dreaming")
    found = table(snapshots.frame(serving(*(request(phase=phase) for phase in phases))))
    assert [row.cells[2].tone for row in found.rows] == [Tone.WARN, Tone.WARN, Tone.ACCENT, Tone.GOOD, Tone.PLAIN]


def test_the_rate_comes_from_two_snapshots() -> None:
    history = History()
    history.feed(serving(request(output_tokens=40)))
    later = replace(serving(request(output_tokens=80)), at=snapshots.NOW + 2)
    history.feed(later)
    assert texts(table(snapshots.frame(later, history)))["rate"] == "20"


def test_priorities_have_a_column_when_there_are_any() -> None:
    assert "priority" not in texts(table(snapshots.frame(serving(request()))))
    found = table(snapshots.frame(serving(request(), request(priority=5))))
    assert (texts(found, 0)["priority"], texts(found, 1)["priority"]) == ("0", "5")


def test_the_note_says_when_more_are_running_than_are_listed() -> None:
    assert table(snapshots.frame(serving(request()))).note == ""
    assert table(snapshots.frame(snapshots.busy(8, 300))).note == "256 oldest of 300"


def test_a_box_without_requests_says_why() -> None:
    assert table(snapshots.frame(snapshots.empty())).empty == "This box has no frontend."
    assert table(snapshots.frame(serving())).empty == "No request is running."


def test_a_detail_explains_the_placement_while_the_router_remembers_it() -> None:
    whole = snapshots.busy()
    *others, frontend = whole.processes
    live = (request(request_id="req-0007"), request(request_id="unplaced"))
    box = replace(whole, processes=(*others, replace(frontend, figures=FrontendFigures(active=2, live=live))))
    frame = snapshots.frame(box)
    placed = detail(frame, "req-0007")
    assert "cached tokens  500" in placed
    assert "▸ llama.aggregated.7" in placed
    unplaced = detail(frame, "unplaced")
    assert "output tokens  40" in unplaced
    assert "candidate" not in unplaced
    assert VIEW.detail(frame, "requests", "ended") is None


def detail(frame: Frame, row: str) -> str:
    found = VIEW.detail(frame, "requests", row)
    assert found is not None
    return "\n".join("".join(span.text for span in line) for line in found.lines)


def test_cancelling_is_asked_first() -> None:
    (act,) = VIEW.acts
    assert (act.key, act.kind, act.needs_row) == ("x", "cancel", True)
    assert "{row}" in act.question


def test_two_thousand_requests_are_two_thousand_rows() -> None:
    found = table(snapshots.frame(snapshots.crowded()))
    assert len({row.key for row in found.rows}) == 2000


def test_ids_have_no_power_over_the_terminal() -> None:
    frame = snapshots.frame(snapshots.hostile())
    found = table(frame)
    every = [cell.text for row in found.rows for cell in row.cells] + [detail(frame, found.rows[0].key)]
    assert not [text for text in every if "\x1b" in text or "\u202e" in text or "\r" in text]
