"""A worker's life as its supervisor sees it: start, figures, drain, stop, and the ends nobody asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worker_process import WorkerProcess, wait_until, worker, worker_spec

from dynamo_box.discovery.instances import process_start_time
from dynamo_box.protocol import framing, status
from dynamo_box.protocol.spec import RouterSpec

STALL = ("mock:stall:after=2",)
SLOW = {"speedup": 1, "decode_ms": 20}


def starting(run_dir: Path, **changes: Any) -> WorkerProcess:
    return WorkerProcess(run_dir, worker_spec(run_dir, **changes))


def test_it_is_announced_when_it_can_answer_and_says_what_it_is(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process:
        instance = process.instance()
        assert instance is not None
        assert (instance.pid, instance.start_time) == (process.pid, process_start_time(process.pid))
        assert (instance.model, instance.role, instance.engine) == ("m", "aggregated", "mock")
        assert (instance.block_size, instance.kv_blocks_total) == (16, 1000)
        assert instance.socket == str(process.socket_path)
        assert process.socket_path.stat().st_mode & 0o777 == 0o700


def test_progress_is_reported_phase_by_phase_and_not_announced_before_ready(tmp_path: Path) -> None:
    with worker(tmp_path / "run", options={"startup_s": 0.5}) as process:
        steps = [message for message in process.seen if isinstance(message, status.Starting)]
        assert len(steps) <= 21
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert (steps[0].total, steps[-1].done, steps[-1].unit) == (20, 20, "steps")
    long = starting(tmp_path / "long", options={"startup_s": 10.0})
    try:
        long.await_status(status.Starting)
        assert long.instance() is None
        assert not long.socket_path.exists()
    finally:
        long.end()


def test_an_instance_file_that_disappears_is_written_again(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process:
        (process.run_dir.instances / f"{process.name}.json").unlink()
        wait_until(lambda: process.instance() is not None, "the worker announced itself again")


def test_figures_come_when_they_change_and_every_two_seconds_anyway(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.run(list(range(64)), max_tokens=10)
        process.figures(lambda figures: figures.tokens_per_s > 0)
        figures = process.figures(lambda figures: figures.tokens_per_s == 0)
        assert (figures.prompt_tokens, figures.output_tokens, figures.running) == (64, 10, 0)
        assert figures.kv_blocks_total == 1000
        assert figures.kv_blocks_cached == (64 + 10 - 1) // 16
        again = process.await_status(status.Report)
        assert again.figures == figures, "nothing changed, but two seconds are over"


def test_drain_takes_nothing_new_finishes_what_runs_and_exits_with_zero(tmp_path: Path) -> None:
    with worker(tmp_path / "run", options=SLOW) as process, process.peer() as peer:
        peer.generate(1, [1, 2, 3], max_tokens=20, annotations=("mock:freeze:after=2",))
        peer.generate(2, [1, 2, 3], max_tokens=40, annotations=("mock:freeze:after=10",))
        process.await_frozen()
        process.status.send(status.Drain(90.0))
        process.thaw()
        assert process.await_status(status.Draining).in_flight == 2
        assert process.instance() is None
        process.await_frozen(2)
        peer.generate(3, [1, 2, 3])
        process.thaw()
        ended = peer.finish(1, 2, 3)
        assert (ended[3][1].error, ended[3][1].rejected) == ("worker is draining", False)
        assert (len(ended[1][0]), ended[1][1].finish) == (20, "length")
        assert (len(ended[2][0]), ended[2][1].finish) == (40, "length")
        assert peer.receive() is None
        assert [process.await_status(status.Draining).in_flight for _ in range(2)] == [1, 0]
        assert process.exit_code() == 0
        assert not process.socket_path.exists()


def test_at_the_deadline_of_a_drain_what_still_runs_gets_an_error(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2, 3], annotations=STALL)
        next(peer.deltas())
        process.status.send(status.Drain(0.3))
        tokens, last = peer.finish(1)[1]
        assert (last.finish, last.error, last.rejected) == ("error", "worker is draining", False)
        assert len(tokens) <= 2
        assert process.exit_code() == 0


def stop(process: WorkerProcess) -> None:
    process.status.send(status.Stop())


def terminate(process: WorkerProcess) -> None:
    process.process.send_signal(signal.SIGTERM)


def lose_the_supervisor(process: WorkerProcess) -> None:
    process.status.close()


def send_nonsense(process: WorkerProcess) -> None:
    os.write(process.status.fileno(), b"\xff" * 64)


@pytest.mark.parametrize("end", [stop, terminate, lose_the_supervisor, send_nonsense])
def test_stop_term_and_a_lost_supervisor_end_it_and_clients_are_told(tmp_path: Path, end: Any) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2, 3], annotations=STALL)
        next(peer.deltas())
        end(process)
        _, last = peer.finish(1)[1]
        assert (last.finish, last.error, last.rejected) == ("error", "worker is stopping", False)
        assert peer.receive() is None
        assert process.exit_code() == 0
        assert process.instance() is None
        assert not list(process.run_dir.instances.iterdir())


@pytest.mark.parametrize("end", [stop, terminate, lose_the_supervisor])
def test_it_ends_at_once_in_the_middle_of_a_start(tmp_path: Path, end: Any) -> None:
    process = starting(tmp_path / "run", options={"startup_s": 600})
    try:
        wait_until(lambda: handles_sigterm(process.pid), "the process handles SIGTERM")
        end(process)
        assert process.exit_code() == 0
    finally:
        process.end()


def handles_sigterm(pid: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def test_a_ctrl_c_in_the_terminal_is_not_its_business(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        process.process.send_signal(signal.SIGINT)
        assert len(peer.run([1, 2, 3])[0]) == 8


def test_kill_leaves_the_client_an_end_of_stream_and_no_live_instance(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2, 3], annotations=STALL)
        next(peer.deltas())
        process.process.kill()
        while (message := peer.receive()) is not None:
            assert message is not None
        assert process.exit_code() == -signal.SIGKILL
        assert process.instance() is None, "the file is there, but nobody believes it"
    with worker(tmp_path / "run") as successor, successor.peer() as peer:
        assert len(peer.run([1, 2, 3])[0]) == 8


def test_settings_are_passed_on_and_refused_with_the_reason(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process:
        assert process.ask(status.Set(1, "fault", "stall:after=3")) == status.Answer(1, text="stall:after=3")
        answer = process.ask(status.Set(2, "fault", "nonsense"))
        assert answer.id == 2
        assert "nonsense" in answer.error
        assert "no option 'colour'" in process.ask(status.Set(3, "colour", "red")).error


def test_what_a_start_can_not_do_is_a_failure_with_cause_and_remedy(tmp_path: Path) -> None:
    process = starting(tmp_path / "run", options={"decode_msec": 3})
    try:
        failed = process.await_status(status.Failed)
        assert failed.permanent
        assert "decode_msec" in failed.cause
        assert "decode_ms?" in failed.remedy
        assert process.exit_code() == 1
        assert process.instance() is None
    finally:
        process.end()


def test_the_spec_of_another_kind_of_process_is_a_failure(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = WorkerProcess(run_dir, None)
    try:
        process.status.send(status.Start(RouterSpec("router", str(run_dir), ())))
        assert "RouterSpec" in process.await_status(status.Failed).cause
        assert process.exit_code() == 1
    finally:
        process.end()


def test_without_a_supervisor_it_says_who_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(framing.STATUS_FD_VARIABLE, raising=False)
    done = subprocess.run([sys.executable, "-m", "engines.mock"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "dynbox up" in done.stderr


def test_the_run_dir_may_have_a_path_longer_than_the_kernel_takes(tmp_path: Path) -> None:
    with worker(tmp_path / ("long-" * 40) / "run") as process, process.peer() as peer:
        assert len(peer.run([1, 2, 3])[0]) == 8
