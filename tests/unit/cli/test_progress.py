"""The three ways to show what is on its way."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest

from dynamo_box.cli import progress
from dynamo_box.cli.progress import JsonDisplay, LiveDisplay, PlainDisplay, Row
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, EventInfo, ProcessInfo, Progress


def weights(done: int, total: int | None = 100) -> Row:
    return Row("w", "starting", "weights", done, total, "layers")


def test_plain_lines_come_with_a_new_state_phase_or_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay()
    display.update([Row("w", "planned")])
    for done in (0, 5, 9, 10, 11):
        display.update([weights(done)])
    display.update([weights(11)._replace(phase="warm-up", done=None)])
    display.update([Row("w", "ready")])
    assert capsys.readouterr().err.splitlines() == [
        "w  starting  weights  0 of 100 layers",
        "w  starting  weights  10 of 100 layers",
        "w  starting  warm-up",
        "w  ready",
    ]


def test_a_phase_without_an_extent_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay()
    for done in range(50):
        display.update([weights(done, None)])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_json_lines_come_with_any_change(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonDisplay()
    for done in (1, 1, 2):
        display.update([weights(done)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["done"] for line in lines] == [1, 2]
    assert lines[0]["event"] == "progress"


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    return FakeTerminal()


def test_the_live_display_goes_back_up_over_what_it_drew_and_never_wraps(screen: FakeTerminal) -> None:
    display = LiveDisplay()
    rows = [weights(1), Row("a-process-with-a-name-that-is-longer-than-the-terminal", "starting")]
    with contextlib.redirect_stderr(screen):
        display.update(rows)
        first = screen.getvalue()
        display.update(rows[:1])
    assert not first.startswith("\x1b["), "there is nothing to go back over yet"
    second = screen.getvalue()[len(first) :]
    assert second.startswith("\x1b[2A\r")
    assert second.endswith("\x1b[K\n\x1b[J"), "what the fewer rows leave is cleared"
    for text in (first + second).replace("\x1b[2A", "").replace("\x1b[K", "").replace("\x1b[J", "").split("\n"):
        assert len(text.strip("\r")) < 40


def test_an_event_stands_above_the_live_lines(screen: FakeTerminal) -> None:
    display = LiveDisplay()
    with contextlib.redirect_stderr(screen):
        display.update([weights(1)])
        before = len(screen.getvalue())
        display.tell(EventInfo(1, 0.0, "warning", "w", "slow disk"))
        display.update([weights(2)])
    after = screen.getvalue()[before:]
    assert after.startswith("\x1b[1A\r\x1b[Jwarning: w: slow disk\n\r")


@pytest.mark.parametrize(("term", "kind"), [("dumb", PlainDisplay), ("xterm", LiveDisplay)])
def test_a_dumb_terminal_gets_plain_lines(
    screen: FakeTerminal, monkeypatch: pytest.MonkeyPatch, term: str, kind: type
) -> None:
    monkeypatch.setenv("TERM", term)
    with contextlib.redirect_stderr(screen):
        assert isinstance(progress.make_display(as_json=False), kind)
    assert isinstance(progress.make_display(as_json=True), JsonDisplay)


def test_rows_carry_progress_while_it_starts_and_events_come_once(capsys: pytest.CaptureFixture[str]) -> None:
    def process(state: str, **more: Any) -> ProcessInfo:
        return ProcessInfo("w", "worker", None, None, state, "weights", 1, 0, None, None, **more)

    def box(process: ProcessInfo, *events: EventInfo) -> BoxSnapshot:
        return BoxSnapshot(BoxInfo("starting", "p", "e", 1, 0.0), (), (process,), events=events)

    starting = process("starting", progress=Progress(1, 4, "bytes"))
    assert progress.rows_of(box(starting)) == [Row("w", "starting", "weights", 1, 4, "bytes")]
    for done in ("ready", "asleep", "stopped"):
        assert progress.rows_of(box(process(done, progress=Progress(4, 4, "bytes")))) == [Row("w", done)]

    shown = progress.BoxProgress(PlainDisplay())
    info, warning = EventInfo(1, 0.0, "info", None, "quiet"), EventInfo(2, 0.0, "warning", "w", "loud\x07")
    shown.show(box(starting, info, warning))
    shown.show(box(starting, info, warning))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["warning: w: loud\\x07", "w  starting  weights  1 B of 4 B"]


def test_a_process_that_fails_shows_why() -> None:
    row = Row("w", "backoff", cause="exit status 1")
    assert progress.line(row, 3, with_bar=True) == "w    backoff   (exit status 1)"
