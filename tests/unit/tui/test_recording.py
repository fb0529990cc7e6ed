"""Recordings: what goes in comes out, little is lost, and what can't be played says why."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import msgspec
import pytest
from fakes import snapshots

from dynamo_box.control.logs import Entry
from dynamo_box.errors import BoxError, UsageError
from dynamo_box.protocol.figures import FrontendFigures, WorkerFigures
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, ProcessInfo
from dynamo_box.tui import demos, tiers
from dynamo_box.tui.history import Flow, History
from dynamo_box.tui.recorder import Recorder
from dynamo_box.tui.recording import FRAME, MAX_PAYLOAD, Header, Kind, Recording, preamble
from dynamo_box.tui.views.decisions import router_of


def snapshot(number: int) -> BoxSnapshot:
    worker = ProcessInfo(
        "w", "worker", "m", None, "ready", "", 7, 0, None, None, figures=WorkerFigures(prompt_tokens=10 * number)
    )
    return BoxSnapshot(BoxInfo("ready", "demo", "http://h:1", 1, float(number)), (), (worker,), at=1000.0 + number)


def entry(number: int, process: str = "router") -> Entry:
    return Entry(1000.0 + number, process, "info", {"event": f"line {number}", "n": number})


class Ticks:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Ten snapshots, a second apart, each with a batch of three log lines."""
    path = tmp_path / "box.dynrec"
    clock = Ticks()
    with Recorder(path, clock=clock) as recorder:
        for number in range(10):
            recorder.snapshot(snapshot(number))
            recorder.log(entry(3 * number + each) for each in range(3))
            clock.now += 1
    return path


def test_what_was_recorded_is_there_in_order(made: Path) -> None:
    with Recording.open(made) as recording:
        assert len(recording) == 20
        assert recording.header.profile == "demo"
        assert recording.duration_s == 9.0
        assert not recording.cut_short
        assert recording.kind(0) is Kind.SNAPSHOT
        assert recording.snapshot(18) == snapshot(9)
        assert [each.fields["n"] for each in recording.entries(19)] == [27, 28, 29]


def test_sleeping_models_and_shared_layouts_come_out_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "box.dynrec"
    with Recorder(path) as recorder:
        recorder.snapshot(snapshots.shared())
    with Recording.open(path) as recording:
        assert recording.snapshot(0) == snapshots.shared()


@pytest.mark.parametrize("box", [snapshots.tiered(), snapshots.tier_suspended()], ids=["on", "suspended"])
def test_tiers_come_out_as_they_went_in(box: BoxSnapshot, tmp_path: Path) -> None:
    path = tmp_path / "box.dynrec"
    with Recorder(path) as recorder:
        recorder.snapshot(box)
    with Recording.open(path) as recording:
        assert recording.snapshot(0) == box


@pytest.mark.parametrize("demo", ["routed-load", "crash-recovery"])
def test_a_recording_from_before_there_were_tiers_still_plays(demo: str) -> None:
    with Recording.open(demos.path(demo)) as recording:
        old = [recording.snapshot(at) for at in range(len(recording)) if recording.kind(at) is Kind.SNAPSHOT]
    history = History()
    for each in old:
        assert each is not None
        assert tiers.process_of(each) is None
        history.feed(each)
    assert all(history.flow_rate(flow) is None for flow in Flow)
    routers = [router_of(each) for each in old if each is not None]
    candidates = [each for router in routers if router for made in router.decisions for each in made.candidates]
    assert not [each for each in candidates if each.host_blocks or each.disk_blocks]


@pytest.mark.parametrize("demo", ["routed-load", "crash-recovery"])
def test_a_recording_from_before_models_slept_still_plays(demo: str) -> None:
    with Recording.open(demos.path(demo)) as recording:
        old = recording.snapshot(next(at for at in range(len(recording)) if recording.kind(at) is Kind.SNAPSHOT))
    assert all(model.residency is None for model in old.models)
    assert [each.figures.waking for each in old.processes if isinstance(each.figures, FrontendFigures)] in ([], [{}])


def test_the_demo_of_sleep_has_models_in_every_place_and_on_their_ways() -> None:
    seen: set[tuple[str, str]] = set()
    with Recording.open(demos.path("sleep-wake")) as recording:
        moments = [recording.snapshot(at) for at in range(len(recording)) if recording.kind(at) is Kind.SNAPSHOT]
    for moment in moments:
        assert moment is not None
        seen |= {(model.state, model.residency.place) for model in moment.models if model.residency is not None}
    assert {("ready", "device"), ("asleep", "host"), ("asleep", "disk")} <= seen
    assert {"falling_asleep", "waking"} <= {state for state, _ in seen}


def test_a_snapshot_of_no_time_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "box.dynrec"
    with Recorder(path) as recorder:
        for at in (math.nan, math.inf, 7.0):
            recorder.snapshot(msgspec.structs.replace(snapshot(0), at=at))
    with Recording.open(path) as recording:
        assert [recording.snapshot(number) is None for number in range(3)] == [True, True, False]
        assert recording.skipped == 2


def test_nobody_else_may_read_it(made: Path) -> None:
    assert made.stat().st_mode & 0o777 == 0o600


def test_a_file_is_never_replaced(made: Path) -> None:
    before = made.read_bytes()
    with pytest.raises(UsageError, match="exists") as refused:
        Recorder(made)
    assert refused.value.remedy
    assert made.read_bytes() == before


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Recorder(tmp_path / "none" / "box.dynrec")


def test_it_ends_at_its_limit_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "box.dynrec"
    with Recorder(path, limit_bytes=4096) as recorder:
        for number in range(1000):
            recorder.snapshot(snapshot(number))
        assert "limit of 4.0 KiB" in recorder.ended
    assert path.stat().st_size <= 4096
    with Recording.open(path) as recording:
        assert recording.snapshot(len(recording) - 1) is not None


def test_a_large_batch_is_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "box.dynrec"
    long = [Entry(float(n), "w", "info", {"event": "x" * 200_000}) for n in range(12)]
    with Recorder(path) as recorder:
        recorder.log(long)
        recorder.snapshot(snapshot(0))
    with Recording.open(path) as recording:
        batches = [recording.entries(frame) for frame in range(len(recording) - 1)]
        assert len(batches) > 1
        assert [each for batch in batches for each in batch] == long


def test_a_recorder_that_is_killed_loses_nothing_that_it_has_taken(tmp_path: Path) -> None:
    path = tmp_path / "box.dynrec"
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        from dynamo_box.snapshot import BoxInfo, BoxSnapshot
        from dynamo_box.tui.recorder import Recorder
        recorder = Recorder(Path({str(path)!r}))
        for number in range(5):
            recorder.snapshot(BoxSnapshot(BoxInfo("ready", "p", "", 1, number), (), ()))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGKILL
    with Recording.open(path) as recording:
        assert len(recording) == 5
        assert not recording.cut_short


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_cut_short_it_plays_what_is_whole(made: Path, lost: int) -> None:
    os.truncate(made, made.stat().st_size - lost)
    with Recording.open(made) as recording:
        assert recording.cut_short
        assert len(recording) in (18, 19)
        assert recording.snapshot(16) == snapshot(8)


def test_cut_anywhere_it_plays_or_says_why(made: Path) -> None:
    whole = made.read_bytes()
    for size in range(0, len(whole), 5):
        made.write_bytes(whole[:size])
        try:
            with Recording.open(made) as recording:
                assert recording.snapshot(0) == snapshot(0)
        except UsageError as error:
            assert str(made) in error.what
            assert error.remedy


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"dynbox recording 2\n{}\n", "format '2'"),
        (b"dynbox recording \xff\n{}\n", "format"),
        (b"#!/bin/sh\necho\n", "is not a recording"),
        (b"\0" * 5000, "is not a recording"),
        (b"dynbox recording 1\nnonsense\n", "no readable header"),
        (b'dynbox recording 1\n{"dynbox": "1", "profile": "p", "started": "x"}\n', "no readable header"),
        (b"dynbox recording 1\n", "before its first snapshot"),
        (b"dynbox recording 1\n" + b"x" * 100_000, "before its first snapshot"),
        (preamble(Header("1", "p", 0.0)), "before its first snapshot"),
    ],
)
def test_what_is_no_recording_says_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as refused:
        Recording.open(path)
    assert str(path) in refused.value.what
    assert refused.value.remedy


def test_no_file_a_directory_and_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
    ):
        with pytest.raises(UsageError, match=said):
            Recording.open(path)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 100,
        FRAME.pack(Kind.SNAPSHOT, 5.0, MAX_PAYLOAD + 1) + b"x" * 50,
        FRAME.pack(Kind.SNAPSHOT, 0xFFFFFFFF, 10) + b"x" * 50,
        FRAME.pack(Kind.SNAPSHOT, float("nan"), 10) + b"x" * 50,
        FRAME.pack(Kind.SNAPSHOT, 1.0, 10) + b"x" * 50,
        FRAME.pack(9, 20.0, 10) + b"x" * 50,
    ],
)
def test_garbage_between_frames_says_where_and_what_to_keep(made: Path, garbage: bytes) -> None:
    whole = made.read_bytes()
    with Recording.open(made) as recording:
        assert len(recording) == 20
    made.write_bytes(whole + garbage)
    with pytest.raises(BoxError, match=f"damaged at byte {len(whole)}") as refused:
        Recording.open(made)
    assert f"head -c {len(whole)} " in (refused.value.remedy or "")


def frames(*bodies: bytes) -> bytes:
    packed = [zlib.compress(body) for body in bodies]
    return preamble(Header("9.9", "p", 0.0)) + b"".join(
        FRAME.pack(Kind.SNAPSHOT, float(at), len(payload)) + payload for at, payload in enumerate(packed)
    )


def test_snapshots_of_other_versions_are_read_as_far_as_they_can_be(tmp_path: Path) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot(3)))
    newer = {**fields, "weather": "fine"}
    older = {key: value for key, value in fields.items() if key not in ("events", "at", "disks")}
    foreign = {key: value for key, value in fields.items() if key != "box"}
    path = tmp_path / "file"
    path.write_bytes(frames(*map(msgspec.msgpack.encode, (newer, older, foreign))))
    with Recording.open(path) as recording:
        assert recording.snapshot(0) == snapshot(3)
        assert recording.snapshot(1) == msgspec.structs.replace(snapshot(3), at=0.0)
        assert recording.snapshot(2) is None
        assert recording.snapshot(2) is None
        assert recording.skipped == 1


def test_a_damaged_payload_and_one_that_would_fill_memory_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    good = msgspec.msgpack.encode(snapshot(0))
    whole = bytearray(frames(good, good, b"\0" * (40 * 1024 * 1024)))
    second = whole.index(zlib.compress(good), whole.index(zlib.compress(good)) + 1)
    whole[second + 10] ^= 0xFF
    path.write_bytes(whole)
    with Recording.open(path) as recording:
        assert recording.snapshot(0) == snapshot(0)
        assert recording.snapshot(1) is None
        assert recording.snapshot(2) is None
        assert recording.skipped == 2
