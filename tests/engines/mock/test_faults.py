"""Every fault, as a request, a supervisor or a router meets it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worker_process import DEADLINE_S, Index, Peer, WorkerProcess, readable, worker, worker_spec

from dynamo_box.protocol import status
from dynamo_box.protocol.framing import FrameError
from dynamo_box.protocol.request import Cancel, KvDump, KvStored, Load, Subscribe
from engines.mock.faults import EventFault, RequestFault, StartFault, parse_fault

QUIET_S = 0.3


def router(process: WorkerProcess) -> tuple[Peer, Index]:
    """A subscriber that has got its dump."""
    peer, index = process.peer("router"), Index()
    peer.send(Subscribe())
    while not index.loads:
        message = peer.receive()
        assert message is not None
        index.feed(message)
    return peer, index


def stored(peer: Peer, count: int) -> list[KvStored]:
    events: list[KvStored] = []
    while len(events) < count:
        message = peer.receive()
        assert isinstance(message, KvStored | Load)
        if isinstance(message, KvStored):
            events.append(message)
    return events


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", None),
        ("none", None),
        ("stall", RequestFault("stall", 0)),
        ("stall:after=5", RequestFault("stall", 5)),
        ("crash", RequestFault("crash", None)),
        ("crash:after=5", RequestFault("crash", 5)),
        ("freeze:after=1", RequestFault("freeze", 1)),
        ("stall:at=takeover", RequestFault("stall", at="takeover")),
        ("crash:at=first_token", RequestFault("crash", at="first_token")),
        ("fail_handover", RequestFault("fail", at="handover")),
        ("fail_takeover", RequestFault("fail", at="takeover")),
        ("drop_events:3", EventFault("drop_events", 3)),
        ("corrupt_events:1", EventFault("corrupt_events", 1)),
        ("refuse_start:no GPU: none", StartFault("refuse_start", cause="no GPU: none")),
        ("slow_start:0.5", StartFault("slow_start", seconds=0.5)),
    ],
)
def test_the_language(text: str, fault: Any) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    "text",
    [
        "stall:5",
        "crash:after=-1",
        "crash:after=x",
        "drop_events",
        "drop_events:0",
        "slow_start:x",
        "none:1",
        "crash:at=lunch",
        "fail_handover:1",
    ],
)
def test_an_argument_that_makes_no_sense_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"the fault {text.partition(':')[0]} takes"):
        parse_fault(text)


def test_an_unknown_fault_lists_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no fault 'explode'; there are stall, crash, freeze, drop_events"):
        parse_fault("explode")


def test_a_request_stalls_in_mid_stream_until_it_is_cancelled_while_others_go_on(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2], max_tokens=20, annotations=("other", "mock:stall:after=5"))
        deltas = peer.deltas()
        assert [len(next(deltas).tokens) for _ in range(5)] == [1] * 5
        assert len(peer.run([1, 2], stream=2, max_tokens=20)[0]) == 20
        assert not readable([peer.socket], QUIET_S)
        peer.send(Cancel(1))
        assert next(deltas).finish == "cancelled"


def test_a_fault_set_at_run_time_is_in_force_until_none_is_set(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        assert process.ask(status.Set(1, "fault", "stall")).text == "stall"
        peer.generate(1, [1, 2], max_tokens=20)
        assert not readable([peer.socket], QUIET_S)
        assert process.ask(status.Set(2, "fault", "none")).text == "none"
        assert len(peer.run([1, 2], stream=2, max_tokens=20)[0]) == 20
        assert "fault of the start" in process.ask(status.Set(3, "fault", "fail_start")).error


def test_the_process_crashes_when_a_request_has_got_its_tokens(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2], max_tokens=20, annotations=("mock:crash:after=5",))
        assert sum(len(delta.tokens) for delta in peer.deltas()) == 5
        assert process.exit_code() == -signal.SIGKILL


def test_the_process_crashes_at_once(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process:
        assert process.ask(status.Set(1, "fault", "crash")).error == "", "the answer still leaves"
        assert process.exit_code() == -signal.SIGKILL


def test_a_frozen_process_lives_and_says_nothing(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2], max_tokens=20, annotations=("mock:freeze:after=3",))
        deltas = peer.deltas()
        assert sum(len(next(deltas).tokens) for _ in range(3)) == 3
        process.await_frozen()
        assert not readable([peer.socket], QUIET_S)
        assert process.instance() is not None
        process.thaw()
        assert len(peer.finish(1)[1][0]) == 17


def test_dropped_events_leave_a_gap_and_a_new_dump_closes_it(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as client:
        peer, index = router(process)
        process.ask(status.Set(1, "fault", "drop_events:2"))
        for stream in range(4):
            client.run([stream] * 40, stream=stream, max_tokens=1)
        events = stored(peer, 2)
        assert [event.event_id for event in events] == [2, 3]
        with pytest.raises(AssertionError):
            index.feed(events[0])
        peer.send(Subscribe())
        again = Index()
        while again.next_event_id is None:
            message = peer.receive()
            if isinstance(message, KvDump):
                again.feed(message)
        assert len(again.blocks) == 4 * 2
        peer.close()


def test_corrupt_events_are_numbered_but_name_other_blocks(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as client:
        peer, _ = router(process)
        client.run([1] * 40, stream=1, max_tokens=1, annotations=("mock:corrupt_events:1",))
        client.run([2] * 40, stream=2, max_tokens=1)
        wrong, right = stored(peer, 2)
        assert (wrong.event_id, right.event_id) == (0, 1)
        other, truth = router(process)
        other.close()
        assert truth.blocks.isdisjoint(wrong.hashes)
        assert truth.blocks.issuperset(right.hashes)
        peer.close()


def test_garbled_events_are_frames_that_no_decoder_takes(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as client:
        peer, _ = router(process)
        client.run([1] * 40, max_tokens=1, annotations=("mock:garble_events:1",))
        with pytest.raises((FrameError, msgspec.ValidationError)):
            stored(peer, 1)
        peer.close()


def start_with(run_dir: Path, fault: str) -> WorkerProcess:
    return WorkerProcess(run_dir, worker_spec(run_dir, options={"fault": fault}))


def test_a_start_that_is_refused_is_refused_for_good(tmp_path: Path) -> None:
    process = start_with(tmp_path / "run", "refuse_start:no room: none")
    failed = process.await_status(status.Failed)
    assert (failed.cause, failed.permanent) == ("no room: none", True)
    assert process.exit_code() == 1
    process.end()


def test_a_start_that_fails_may_be_tried_again(tmp_path: Path) -> None:
    process = start_with(tmp_path / "run", "fail_start")
    assert not process.await_status(status.Failed).permanent
    assert process.exit_code() == 1
    process.end()


def test_a_crash_in_the_start_comes_without_a_word(tmp_path: Path) -> None:
    process = start_with(tmp_path / "run", "crash_start")
    assert process.exit_code() == -signal.SIGKILL
    assert process.status.receive(DEADLINE_S) is None
    process.end()


def test_a_slow_start_is_silent_but_comes_to_an_end(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start_with(tmp_path / "run", "slow_start:0.6")
    assert readable([process.status], DEADLINE_S)
    assert time.monotonic() - began >= 0.6, "it says nothing before"
    process.ready().end()


def test_a_fault_that_does_not_exist_refuses_the_start(tmp_path: Path) -> None:
    process = start_with(tmp_path / "run", "explode")
    assert "no fault 'explode'" in process.await_status(status.Failed).cause
    process.end()
