"""The logs screen: what processes write arrives on it, whatever happens to files, and keys find their way in it."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from dynamo_box.control.logs import Entry
from dynamo_box.tui.filter import Filter
from dynamo_box.tui.log_feed import LiveLog, LogBatch
from dynamo_box.tui.views.logs import LogsWidget

DEADLINE_S = 60


# The feed


def line(number: int, process: str) -> str:
    stamp = f"2026-01-01T00:{number // 60 % 60:02}:{number % 60:02}.{number // 3600:06}Z"
    return json.dumps({"event": f"{process} {number}", "level": "info", "ts": stamp, "process": process}) + "\n"


def write(directory: Path, process: str, numbers: range) -> None:
    directory.mkdir(exist_ok=True)
    with (directory / f"{process}.log").open("a") as file:
        file.writelines(line(number, process) for number in numbers)


class Arriving:
    """Batches as they come from the feed's thread."""

    def __init__(self) -> None:
        self._batches: queue.Queue[LogBatch] = queue.Queue()
        self.deliver = self._batches.put

    def batch(self) -> LogBatch:
        return self._batches.get(timeout=DEADLINE_S)

    def events(self, count: int) -> list[object]:
        """The next `count` lines, of as many batches as they come in."""
        found: list[object] = []
        while len(found) < count:
            found += [entry.fields["event"] for entry in self.batch().entries]
        return found


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[LiveLog, Arriving]]:
    feed, arriving = LiveLog(tmp_path / "logs"), Arriving()
    yield feed, arriving
    feed.close_log()


def test_first_what_there_is_then_what_comes(tmp_path: Path, live: tuple[LiveLog, Arriving]) -> None:
    feed, arriving = live
    directory = tmp_path / "logs"
    write(directory, "router", range(0, 10, 2))
    write(directory, "worker", range(1, 10, 2))
    feed.start_log(arriving.deliver)
    first = arriving.batch()
    assert first.anew
    assert [entry.fields["event"] for entry in first.entries] == [
        f"{'worker' if number % 2 else 'router'} {number}" for number in range(10)
    ]
    write(directory, "router", range(10, 12))
    assert arriving.events(2) == ["router 10", "router 11"]
    write(directory, "late", range(12, 13))
    assert arriving.events(1) == ["late 12"]


def test_no_line_is_lost_or_doubled_when_files_are_rotated(tmp_path: Path, live: tuple[LiveLog, Arriving]) -> None:
    feed, arriving = live
    directory = tmp_path / "logs"
    write(directory, "w", range(5))
    feed.start_log(arriving.deliver)
    assert len(arriving.batch().entries) == 5
    for start in range(5, 105, 20):
        write(directory, "w", range(start, start + 10))
        (directory / "w.log").rename(directory / f"w.log.{1000 - start}")
        write(directory, "w", range(start + 10, start + 20))
    assert arriving.events(100) == [f"w {number}" for number in range(5, 105)]


def test_a_box_that_logs_elsewhere_is_followed_there(tmp_path: Path, live: tuple[LiveLog, Arriving]) -> None:
    feed, arriving = live
    write(tmp_path / "logs", "w", range(3))
    write(tmp_path / "other", "v", range(4))
    feed.start_log(arriving.deliver)
    assert len(arriving.batch().entries) == 3
    feed.look_in(tmp_path / "other")
    batch = arriving.batch()
    assert batch.anew
    assert [entry.process for entry in batch.entries] == ["v"] * 4
    write(tmp_path / "other", "v", range(4, 5))
    assert arriving.events(1) == ["v 4"]


def test_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    feed, arriving = LiveLog(), Arriving()
    feed.start_log(arriving.deliver)
    feed.look_in(tmp_path / "none")
    assert arriving.batch() == LogBatch((), anew=True)
    write(tmp_path / "none", "w", range(2))
    assert arriving.events(2) == ["w 0", "w 1"]
    feed.close_log()


def test_logs_that_cannot_be_read_say_so_and_come_when_they_can(tmp_path: Path, live: tuple[LiveLog, Arriving]) -> None:
    feed, arriving = live
    (tmp_path / "logs").write_text("not a directory")
    feed.start_log(arriving.deliver)
    (said,) = arriving.batch().entries
    assert (said.level, str(tmp_path / "logs") in str(said.fields["event"])) == ("error", True)
    (tmp_path / "logs").unlink()
    write(tmp_path / "logs", "w", range(2))
    assert arriving.events(2) == ["w 0", "w 1"]


# The widget


class Host(App[None]):
    CSS = "LogsWidget { height: 1fr; }"

    def __init__(self) -> None:
        super().__init__()
        self.logs = LogsWidget()
        self.opened = 0

    def compose(self) -> ComposeResult:
        yield self.logs

    def on_logs_widget_opened(self) -> None:
        self.opened += 1


def entries(start: int, end: int) -> tuple[Entry, ...]:
    levels = ("debug", "info", "warning", "error")
    return tuple(
        Entry(1_700_000_000.0 + n, f"w.{n % 2}", levels[n % 4], {"event": f"line {n}", "more": f"detail {n}"})
        for n in range(start, end)
    )


def drive(story: Callable[[Host, Pilot[None]], Awaitable[None]], size: tuple[int, int] = (120, 30)) -> None:
    async def run() -> None:
        host = Host()
        async with host.run_test(size=size) as pilot:
            await story(host, pilot)

    asyncio.run(run())


async def settled(host: Host, pilot: Pilot[None]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not host.logs.pane.complete:
            await pilot.pause()
    await pilot.pause()


def shown(host: Host) -> list[str]:
    return host.logs.text.splitlines()


def test_keys() -> None:
    async def story(host: Host, pilot: Pilot[None]) -> None:
        host.logs.take(LogBatch(entries(0, 400), anew=True))
        await settled(host, pilot)
        assert "line 399" in shown(host)[-1]
        await pilot.press("l", "l", "l")
        await settled(host, pilot)
        assert "error and above" in shown(host)[0]
        assert all("error" in line for line in shown(host)[1:])
        await pilot.press("l", "p")
        await settled(host, pilot)
        assert all(" w.0 " in line for line in shown(host)[1:])
        await pilot.press("P", "o")
        await settled(host, pilot)
        assert all(" w.1 " in line for line in shown(host)[1:])
        await pilot.press("o")
        host.logs.move(-5)
        host.logs.take(LogBatch(entries(400, 500)))
        await settled(host, pilot)
        assert "line 399" in shown(host)[-1]
        await pilot.press("f")
        assert "line 499" in shown(host)[-1]

    drive(story)


def test_a_filter_over_a_hundred_thousand_lines_leaves_the_screen_usable() -> None:
    async def story(host: Host, pilot: Pilot[None]) -> None:
        for start in range(0, 100_000, 5000):
            host.logs.take(LogBatch(entries(start, start + 5000)))
        host.logs.set_filter(Filter.parse("line [0-9]*77 "))
        assert not host.logs.pane.complete
        assert "line 99977" in shown(host)[-1]
        host.logs.move(-3)
        await settled(host, pilot)
        assert "1,000 of 100,000 lines" in shown(host)[0]

    drive(story)


def test_paused_it_holds_still_and_goes_on_where_it_was() -> None:
    async def story(host: Host, pilot: Pilot[None]) -> None:
        host.logs.take(LogBatch(entries(0, 100)))
        host.logs.set_paused(True)
        host.logs.take(LogBatch(entries(100, 200)))
        await pilot.pause()
        assert "line 99" in shown(host)[-1]
        host.logs.set_paused(False)
        assert "line 199" in shown(host)[-1]
        host.logs.page(-1)
        place = shown(host)[1:]
        host.logs.set_paused(True)
        host.logs.set_paused(False)
        assert shown(host)[1:] == place

    drive(story)


def test_mouse() -> None:
    async def story(host: Host, pilot: Pilot[None]) -> None:
        host.logs.take(LogBatch(entries(0, 100)))
        await pilot.pause()
        host.logs.post_message(events.MouseScrollUp(host.logs, 5, 5, 0, -1, 0, False, False, False))
        await pilot.pause()
        assert "line 96" in shown(host)[-1]
        await pilot.click(LogsWidget, offset=(10, 4))
        assert host.logs.pane.current is not None
        assert f"line {host.logs.pane.current}" in shown(host)[4]
        assert host.opened == 0
        await pilot.click(LogsWidget, offset=(10, 4))
        await pilot.pause()
        assert host.opened == 1
        page = host.logs.detail(100)
        assert page is not None
        assert any(f"detail {host.logs.pane.current}" in span.text for spans in page.lines for span in spans)

    drive(story)


@pytest.mark.parametrize("size", [(20, 5), (1, 1), (80, 24), (200, 60)])
def test_any_size(size: tuple[int, int]) -> None:
    async def story(host: Host, pilot: Pilot[None]) -> None:
        host.logs.take(LogBatch(entries(0, 100)))
        await pilot.press("l", "p", "o", "f")
        await pilot.resize_terminal(20, 5)
        await pilot.pause()
        assert len(shown(host)) <= 5

    drive(story, size)
