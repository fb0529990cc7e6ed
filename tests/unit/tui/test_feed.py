"""What events of a source add up to."""

from __future__ import annotations

import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.tui.bars import keys, nothing_yet, status, tab_at, tabs
from dynamo_box.tui.feed import Feed, Link
from dynamo_box.tui.model import Span, Tone
from dynamo_box.tui.screens import SCREENS
from dynamo_box.tui.source import Connected, Ended, Jumped, Lost, NewSnapshot, SourceEvent, Why
from dynamo_box.tui.text import Line, spans_width

BUSY = snapshots.busy()
NOW = snapshots.NOW


def fed(*events: SourceEvent, live: bool = True) -> Feed:
    feed = Feed(live=live)
    for event in events:
        feed.take(event, NOW)
    return feed


def text(line: Line) -> str:
    return "".join(span.text for span in line.spans)


class TestFeed:
    def test_a_live_box_grows_older_between_snapshots(self) -> None:
        feed = fed(Connected(), NewSnapshot(BUSY))
        frame = feed.frame(NOW + 3)
        assert frame is not None
        assert frame.now == NOW + 3
        assert feed.uptime_s(NOW + 3) == BUSY.box.uptime_s + 3

    def test_a_box_that_is_gone_and_a_recording_do_not(self) -> None:
        for feed in (
            fed(NewSnapshot(BUSY), Lost(Why.BROKEN, "gone")),
            fed(NewSnapshot(BUSY), live=False),
        ):
            frame = feed.frame(NOW + 3)
            assert frame is not None
            assert frame.now == NOW
            assert feed.uptime_s(NOW + 3) == BUSY.box.uptime_s

    def test_another_box_starts_a_history_of_its_own(self) -> None:
        feed = fed(NewSnapshot(BUSY))
        before = feed.history
        feed.take(NewSnapshot(snapshots.later(BUSY)), NOW + 1)
        assert feed.history is before
        feed.take(NewSnapshot(replace(BUSY, box=replace(BUSY.box, run_id="another"))), NOW + 2)
        assert feed.history is not before

    def test_a_jump_takes_its_past_as_history(self) -> None:
        feed = fed(NewSnapshot(snapshots.later(BUSY, 100)), live=False)
        before = feed.history
        feed.take(Jumped((BUSY, snapshots.later(BUSY))), NOW)
        assert feed.history is not before
        assert feed.snapshot == snapshots.later(BUSY)
        feed.take(Ended(), NOW)
        assert feed.link is Link.ENDED


class TestStatus:
    def test_it_says_how_the_box_is(self) -> None:
        line = text(status(fed(NewSnapshot(BUSY)), NOW, (), 200))
        for word in ("ready", "llama-8gpu", BUSY.box.endpoint, "tok/s", "active", "errors"):
            assert word in line

    def test_the_least_important_goes_first_and_marks_stay(self) -> None:
        line = text(status(fed(NewSnapshot(BUSY)), NOW, (Span("READ ONLY", Tone.DIM),), 40))
        assert "ready" in line and line.endswith("READ ONLY")
        assert BUSY.box.endpoint not in line

    def test_a_loss_stands_before_everything(self) -> None:
        line = text(status(fed(NewSnapshot(BUSY), Lost(Why.BROKEN, "lost: it went")), NOW, (), 60))
        assert line.startswith("lost: it went; reconnecting")

    def test_a_silent_supervisor_is_noticed(self) -> None:
        feed = fed(NewSnapshot(BUSY))
        assert "no word" not in text(status(feed, NOW + 4, (), 200))
        assert "no word from the box for 12s" in text(status(feed, NOW + 12, (), 200))

    def test_also_one_that_has_said_nothing_yet(self) -> None:
        feed = fed(Connected())
        assert "no word" not in text(status(feed, NOW + 4, (), 200))
        assert "no word from the box for 12s" in text(status(feed, NOW + 12, (), 200))

    def test_a_box_that_is_gone_is_not_said_to_be_ready(self) -> None:
        line = text(status(fed(NewSnapshot(BUSY), Lost(Why.STOPPED, "the box has stopped")), NOW, (), 200))
        assert "the box has stopped" in line and "ready" not in line

    @pytest.mark.parametrize("width", [1, 7, 20, 39, 40, 80, 300])
    @pytest.mark.parametrize("snapshot", snapshots.all_kinds().values(), ids=snapshots.all_kinds().keys())
    def test_it_fits_every_terminal(self, snapshot: snapshots.BoxSnapshot, width: int) -> None:
        for events in ((), (NewSnapshot(snapshot),), (Lost(Why.ABSENT, "no [b]box[/]"),)):
            line = status(fed(*events), NOW, (Span("PAUSED"),), width)
            assert spans_width(line.spans) <= width
            assert "\x1b" not in text(line)


def test_before_the_first_snapshot_the_way_to_start_a_box_is_shown() -> None:
    lines = nothing_yet(fed(Lost(Why.ABSENT, "no box is running", "start one with `dynbox up`")), "/run/box", 80, 20)
    said = " ".join(text(line) for line in lines)
    assert "no box is running" in said and "dynbox up" in said and "/run/box" in said


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("current", [each.name for each in SCREENS])
def test_a_click_hits_the_tab_that_stands_there(current: str, width: int) -> None:
    line = text(tabs(current, width))
    assert current in line or width < 40
    for each in SCREENS:
        if (at := line.find(each.key)) >= 0:
            assert tab_at(at, current, width) == each.name


def test_keys_that_find_no_room_are_left_out_from_the_right() -> None:
    hints = [("r", "restart"), ("s", "sort"), ("q", "quit")]
    assert text(keys(hints, 80)) == "r restart  s sort  q quit"
    assert text(keys(hints, 20)) == "r restart  s sort"
