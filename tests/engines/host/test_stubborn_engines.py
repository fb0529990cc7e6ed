"""The shell holds its promises to supervisor and clients whatever the engine does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from worker_process import WorkerProcess, worker_spec

from dynamo_box.protocol import status

"""For a machine that is busy with other tests."""


@pytest.fixture(autouse=True)
def engine_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())]))


@contextmanager
def stubborn(tmp_path: Path, manner: str) -> Iterator[WorkerProcess]:
    run_dir = tmp_path / "run"
    process = WorkerProcess(run_dir, worker_spec(run_dir, options={"manner": manner}), "stubborn_engine")
    try:
        yield process
    finally:
        process.end()


def test_neither_a_thread_nor_a_close_without_end_keeps_the_process(tmp_path: Path) -> None:
    with stubborn(tmp_path, "hang in close") as process:
        process.ready().status.send(status.Stop())
        assert process.exit_code() == 0
        assert '"who": "engine"' in process.log


def test_a_drain_of_a_sequence_that_never_ends_is_over_at_its_deadline(tmp_path: Path) -> None:
    with stubborn(tmp_path, "") as process:
        with process.ready().peer() as peer:
            peer.generate(1, [1])
        process.status.send(status.Drain(0.5))
        assert process.exit_code() == 0


@pytest.mark.slow
def test_a_loop_that_is_stuck_on_the_way_out_is_ended_by_the_watchdog(tmp_path: Path) -> None:
    with stubborn(tmp_path, "block the loop in close") as process:
        process.ready().status.send(status.Stop())
        assert process.exit_code() == 1
        assert "in close" in process.log, "the log says where it hung"


def test_a_broken_engine_fails_what_runs_says_why_and_ends(tmp_path: Path) -> None:
    with stubborn(tmp_path, "fatal") as process, process.ready().peer() as peer:
        peer.generate(1, [1])
        _, last = peer.finish(1)[1]
        assert last.finish == "error"
        assert not last.rejected
        assert "fell off the bus" in last.error
        failed = process.await_status(status.Failed)
        assert (failed.cause, failed.permanent) == ("the device fell off the bus", False)
        assert process.exit_code() == 1


def test_an_exception_in_the_start_is_a_failure_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    with stubborn(tmp_path, "raise in start") as process:
        assert process.await_status(status.Failed).cause == "RuntimeError: out of luck"
        assert process.exit_code() == 1
        assert "Traceback" in process.log


def test_an_exception_in_submit_fails_that_request_only(tmp_path: Path) -> None:
    with stubborn(tmp_path, "raise in submit") as process, process.ready().peer() as peer:
        for stream in (1, 2, 2):
            peer.generate(stream, [1])
            _, last = peer.finish(stream)[stream]
            assert (last.finish, last.rejected) == ("error", False)
            assert "no idea" in last.error


def test_outputs_for_sequences_that_are_not_in_flight_are_ignored(tmp_path: Path) -> None:
    with stubborn(tmp_path, "strange keys") as process, process.ready().peer() as peer:
        for stream in (1, 2, 1):
            peer.generate(stream, [1])
            tokens, last = peer.finish(stream)[stream]
            assert (tokens, last.finish) == ([5, 6], "stop")


def test_an_exception_in_set_option_is_the_answer(tmp_path: Path) -> None:
    with stubborn(tmp_path, "") as process:
        process.ready()
        assert "beneath me" in process.ask(status.Set(1, "colour", "red")).error


def test_an_engine_with_other_blocks_than_the_plan_says_does_not_serve(tmp_path: Path) -> None:
    """Its KV events would never match what the frontend hashes."""
    with stubborn(tmp_path, "other block size") as process:
        failed = process.await_status(status.Failed)
        assert failed.permanent
        assert "32 tokens" in failed.cause
        assert process.exit_code() == 1


def test_progress_from_many_threads_is_thinned_out_but_no_phase_is_lost(tmp_path: Path) -> None:
    with stubborn(tmp_path, "chatter in start") as process:
        started = time.monotonic()
        process.ready()
        told = [message for message in process.seen if isinstance(message, status.Starting)]
        assert {message.phase for message in told} == {"first", "second"}
        assert told[-1].done == 19_999
        seconds = time.monotonic() - started
        assert len(told) <= 64 * (1 + 20 * seconds)
