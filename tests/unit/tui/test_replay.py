"""Replay: a recording gives the events that a box gave, by a clock that can be stopped, hastened and moved."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo_box.control.logs import Entry
from dynamo_box.errors import BoxError, UsageError
from dynamo_box.protocol.figures import RouterFigures, WorkerFigures
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, ProcessInfo
from dynamo_box.tui import demos
from dynamo_box.tui.headless import as_text, look
from dynamo_box.tui.history import History
from dynamo_box.tui.log_feed import LogBatch
from dynamo_box.tui.recorder import Recorder
from dynamo_box.tui.recording import Recording
from dynamo_box.tui.replay import Replay, locate, open_replay
from dynamo_box.tui.session import Options
from dynamo_box.tui.source import Connected, Ended, Jumped, NewSnapshot, Seekable, SourceEvent

DEADLINE_S = 60


def snapshot(second: int) -> BoxSnapshot:
    processes = (
        ProcessInfo("r", "router", None, None, "ready", "", 6, 0, None, None, figures=RouterFigures()),
        ProcessInfo(
            "w", "worker", "m", None, "ready", "", 7, 0, None, None, figures=WorkerFigures(prompt_tokens=10 * second)
        ),
    )
    return BoxSnapshot(BoxInfo("ready", "demo", "", 1, float(second)), (), processes, at=1000.0 + second)


def record(path: Path, seconds: int) -> Path:
    """A snapshot and a log line a second."""
    now = 0.0
    with Recorder(path, clock=lambda: now) as recorder:
        for second in range(seconds + 1):
            now = float(second)
            recorder.snapshot(snapshot(second))
            recorder.log([Entry(1000.0 + second, "router", "info", {"event": f"second {second}"})])
    return path


class Seen:
    """What a replay has delivered, and waiting for more."""

    def __init__(self) -> None:
        self.events: list[SourceEvent] = []
        self.batches: list[LogBatch] = []
        self._queue: queue.Queue[SourceEvent] = queue.Queue()
        self._batches: queue.Queue[LogBatch] = queue.Queue()

    def deliver(self, event: SourceEvent) -> None:
        self._queue.put(event)

    def deliver_log(self, batch: LogBatch) -> None:
        self._batches.put(batch)

    def until(self, wanted: Callable[[Any], bool]) -> SourceEvent:
        while True:
            self.events.append(self._queue.get(timeout=DEADLINE_S))
            if wanted(self.events[-1]):
                return self.events[-1]

    def batch(self) -> LogBatch:
        self.batches.append(self._batches.get(timeout=DEADLINE_S))
        return self.batches[-1]

    @property
    def seconds(self) -> list[float]:
        return [each.snapshot.at - 1000 for each in self.events if isinstance(each, NewSnapshot)]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., tuple[Replay, Seen]]]:
    """Start to play a recording of so many seconds; closed at the end."""
    started: list[Replay] = []

    def begin(seconds: int, speed: float = 1.0, *, paused: bool = False) -> tuple[Replay, Seen]:
        replay = open_replay(str(record(tmp_path / f"{len(started)}.dynrec", seconds)), speed)
        started.append(replay)
        replay.set_paused(paused)
        seen = Seen()
        replay.start(seen.deliver)
        return replay, seen

    yield begin
    for replay in started:
        replay.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "replay"]


def ended(event: SourceEvent) -> bool:
    return isinstance(event, Ended)


def jumped(event: SourceEvent) -> bool:
    return isinstance(event, Jumped)


def test_it_plays_from_the_start_to_the_end_and_holds_the_last(play: Callable[..., tuple[Replay, Seen]]) -> None:
    replay, seen = play(4, 10, paused=True)
    seen.until(jumped)  # to the very first snapshot: a thread that starts late would begin with a later one
    replay.set_paused(False)
    seen.until(ended)
    assert isinstance(replay, Seekable)
    assert not replay.acts
    assert isinstance(seen.events[0], Connected)
    assert seen.events[1] == Jumped((snapshot(0),))
    assert seen.seconds[-1] == 4
    assert seen.seconds == sorted(seen.seconds)
    assert replay.position_s == replay.duration_s == 4


def test_however_fast_the_history_gets_what_it_needs(play: Callable[..., tuple[Replay, Seen]]) -> None:
    replay, seen = play(60, 100, paused=True)
    seen.until(jumped)
    replay.set_paused(False)
    seen.until(ended)
    history = History()
    for event in seen.events:
        if isinstance(event, Jumped):
            history.feed(event.past[-1])
        if isinstance(event, NewSnapshot):
            history.feed(event.snapshot)
    assert [bucket.prompt_tokens for bucket in history.workers["w"]][1:-1] == [50] * 11


def test_paused_it_stays_and_can_be_moved(play: Callable[..., tuple[Replay, Seen]]) -> None:
    replay, seen = play(60, paused=True)
    seen.until(jumped)
    assert replay.position_s == 0
    replay.seek(30.5)
    found = seen.until(jumped)
    assert isinstance(found, Jumped)
    assert found.past[-1] == snapshot(30)
    assert replay.paused
    assert replay.position_s == 30.5
    replay.seek(-5)
    assert seen.until(jumped) == Jumped((snapshot(0),))
    replay.seek(10_000)
    found = seen.until(jumped)
    assert isinstance(found, Jumped)
    assert found.past[-1] == snapshot(60)
    seen.until(ended)


def test_moving_brings_the_history_of_the_minutes_before(play: Callable[..., tuple[Replay, Seen]]) -> None:
    replay, seen = play(2000, paused=True)
    seen.until(jumped)
    replay.seek(1500)
    found = seen.until(jumped)
    assert isinstance(found, Jumped)
    assert 150 <= len(found.past) <= 200
    history = History()
    for each in found.past:
        history.feed(each)
    buckets = list(history.workers["w"])
    assert len(buckets) >= 175
    assert {bucket.prompt_tokens for bucket in buckets[:-1]} == {50}


def test_from_the_end_it_can_be_moved_back_and_ends_again(play: Callable[..., tuple[Replay, Seen]]) -> None:
    replay, seen = play(3, 100)
    seen.until(ended)
    replay.seek(1)
    assert seen.until(jumped)
    seen.until(ended)
    assert seen.seconds[-1] == 3


def test_speed_is_kept_within_what_is_allowed(play: Callable[..., tuple[Replay, Seen]]) -> None:
    replay, seen = play(3, paused=True)
    replay.set_speed(1e9)
    assert replay.speed == 100
    replay.set_speed(0)
    assert replay.speed == 0.1
    replay.set_speed(100)
    replay.set_paused(False)
    seen.until(ended)


def test_log_lines_come_with_their_moment(play: Callable[..., tuple[Replay, Seen]]) -> None:
    replay, seen = play(10, paused=True)
    replay.seek(4)
    replay.start_log(seen.deliver_log)
    batch = seen.batch()
    while len(batch.entries) != 5:
        batch = seen.batch()
    assert batch.anew
    assert [each.fields["event"] for each in batch.entries] == [f"second {n}" for n in range(5)]
    replay.set_speed(50)
    replay.set_paused(False)
    later: list[Entry] = []
    while len(later) < 6:
        batch = seen.batch()
        assert not batch.anew
        later += batch.entries
    assert later[-1].fields["event"] == "second 10"
    replay.close_log()
    replay.seek(0)
    seen.until(lambda event: isinstance(event, Jumped) and event.past[-1] == snapshot(0))


def test_a_recording_cut_short_says_so(tmp_path: Path) -> None:
    path = record(tmp_path / "cut.dynrec", 3)
    path.write_bytes(path.read_bytes()[:-1])
    replay = open_replay(str(path))
    screen = as_text(look(replay, replay, Options()).lines(100, 5))
    assert "cut short  REPLAY" in screen.splitlines()[0]


def test_a_recording_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.dynrec"
    with Recorder(path) as recorder:
        recorder.snapshot(msgspec.structs.replace(snapshot(0), at="noon"))
    with pytest.raises(BoxError, match="no snapshot") as refused:
        open_replay(str(path))
    assert "recorded it" in (refused.value.remedy or "")


@pytest.mark.parametrize("speed", [0.0, -1.0, 0.09, 101.0, float("nan"), float("inf")])
def test_a_speed_out_of_range(tmp_path: Path, speed: float) -> None:
    path = record(tmp_path / "box.dynrec", 1)
    with pytest.raises(UsageError, match="--speed"):
        open_replay(str(path), speed)


def test_an_unknown_name_lists_the_demos(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        locate(str(tmp_path / "routed-laod"))
    assert all(any(name in line for line in refused.value.details) for name in demos.DEMOS)


@pytest.mark.parametrize("name", list(demos.DEMOS))
def test_demos_ship_and_can_be_read_to_the_end(name: str) -> None:
    with Recording.open(locate(name)) as recording:
        assert not recording.cut_short
        for frame in range(len(recording)):
            assert recording.snapshot(frame) if recording.kind(frame) == 1 else recording.entries(frame)
        assert recording.skipped == 0
