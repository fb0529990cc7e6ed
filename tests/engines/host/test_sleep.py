"""Sleep and wake as the supervisor asks for them, and what clients and routers see of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from worker_process import Peer, WorkerProcess, wait_until, worker_spec

from dynamo_box.protocol import status
from dynamo_box.protocol.request import KvCleared, Subscribe
from engines.shell_sleep import GOING_TO_SLEEP

HOLD = ("hold",)


@pytest.fixture(autouse=True)
def engine_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())]))


@contextmanager
def sleepy(tmp_path: Path, manner: str = "") -> Iterator[WorkerProcess]:
    run_dir = tmp_path / "run"
    process = WorkerProcess(run_dir, worker_spec(run_dir, options={"manner": manner}), "sleepy_engine")
    try:
        yield process
    finally:
        process.end()


def sleep(process: WorkerProcess, number: int = 1, drain_s: float = 30.0, **how: Any) -> status.Slept:
    process.status.send(status.Sleep(number, drain_s, **how))
    slept: status.Slept = process.await_status(status.Slept)
    assert slept.id == number
    return slept


def wake(process: WorkerProcess, number: int = 2, deadline_s: float = 30.0) -> status.Woken:
    process.status.send(status.Wake(number, deadline_s))
    woken: status.Woken = process.await_status(status.Woken)
    assert woken.id == number
    return woken


def fall_asleep(process: WorkerProcess, peer: Peer) -> None:
    """What the peer has asked for runs; the worker refuses more and can't be found."""
    assert peer.run([1], stream=100)[1].finish == "length"
    process.status.send(status.Sleep(1, 60.0))
    wait_until(lambda: process.instance() is None, "the worker withdrew")
    assert peer.run([1], stream=101)[1].error == GOING_TO_SLEEP


def serves(process: WorkerProcess) -> bool:
    with process.peer() as peer:
        return process.instance() is not None and peer.run([1, 2])[1].finish == "length"


def test_it_withdraws_gives_its_memory_back_and_returns_as_it_was(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process:
        process.ready()
        slept = sleep(process)
        assert (slept.error, slept.kv_bytes, slept.weights_bytes) == ("", 10, 20)
        assert list(slept.phases) == ["drain", "unmap"]
        assert process.instance() is None
        with process.peer() as peer:
            last = peer.run([1])[1]
            assert (last.finish, last.error, last.rejected) == ("error", GOING_TO_SLEEP, False)
        assert process.figures(lambda figures: figures.kv_bytes == 0).running == 0
        woken = wake(process)
        assert (woken.error, list(woken.phases)) == ("", ["attach", "canary", "register"])
        assert serves(process)


def test_either_twice_changes_nothing(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process:
        process.ready()
        assert wake(process, 1) == status.Woken(1)
        assert sleep(process, 2).kv_bytes == 10
        assert sleep(process, 3) == status.Slept(3)
        assert wake(process, 4).phases
        assert wake(process, 5) == status.Woken(5)
        assert serves(process)


def test_the_canary_is_in_no_figures(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process:
        process.ready()
        sleep(process)
        wake(process)
        assert serves(process)
        figures = process.figures(lambda figures: figures.requests > 0)
        assert (figures.requests, figures.output_tokens) == (1, 8)


def test_it_finishes_what_runs_before_it_sleeps(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        peer.generate(1, [1], annotations=HOLD)
        fall_asleep(process, peer)
        process.status.send(status.Wake(9, 5.0))
        assert process.await_status(status.Woken).error == "the worker is falling asleep"
        process.ask(status.CancelRequest(3, "r1"))
        assert peer.finish(1)[1][1].finish == "cancelled"
        slept = process.await_status(status.Slept)
        assert (slept.error, slept.kv_bytes, slept.unfinished) == ("", 10, 0)


def test_with_requests_left_at_the_deadline_it_serves_on(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        peer.generate(1, [1], annotations=HOLD)
        assert peer.run([1], stream=2)[1].finish == "length"
        slept = sleep(process, drain_s=0.2)
        assert (slept.unfinished, slept.error) == (1, "1 requests still run")
        assert serves(process)
        peer.generate(3, [1], annotations=HOLD)
        slept = sleep(process, drain_s=0.0, force=True, why="put to sleep by hand")
        ended = peer.finish(1, 3)
        assert {(last.finish, last.error) for _, last in ended.values()} == {("error", "put to sleep by hand")}
        assert (slept.error, slept.unfinished) == ("", 0)


@pytest.mark.parametrize(
    ("manner", "named"),
    [("other answers after wake", "tokens [2, 2] instead of [1, 1]"), ("silent after wake", "no answer")],
)
def test_one_whose_canary_sings_otherwise_is_broken_and_announced_no_more(
    tmp_path: Path, manner: str, named: str
) -> None:
    with sleepy(tmp_path, manner) as process:
        process.ready()
        sleep(process)
        woken = wake(process, deadline_s=0.5 if manner.startswith("silent") else 30.0)
        assert named in woken.error
        assert woken.broken
        assert process.instance() is None
        with process.peer() as peer:
            assert peer.run([1])[1].error == GOING_TO_SLEEP


def test_without_a_first_canary_there_is_no_start(tmp_path: Path) -> None:
    with sleepy(tmp_path, "no first canary") as process:
        assert "no numbers" in process.await_status(status.Failed).cause
        assert process.exit_code() == 1
        assert process.instance() is None


def test_a_wake_that_can_not_be_had_now_may_be_had_later(tmp_path: Path) -> None:
    with sleepy(tmp_path, "no room") as process:
        process.ready()
        sleep(process)
        for number in (2, 3):
            assert wake(process, number) == status.Woken(number, error="no memory now")
            assert process.instance() is None


def test_a_wake_that_hangs_is_over_at_its_deadline(tmp_path: Path) -> None:
    with sleepy(tmp_path, "hang in wake") as process:
        process.ready()
        sleep(process)
        woken = wake(process, deadline_s=0.2)
        assert woken.broken
        assert "did not wake within 0.2 s" in woken.error


def test_an_engine_that_is_not_tired_serves_on(tmp_path: Path) -> None:
    with sleepy(tmp_path, "can't sleep now") as process:
        process.ready()
        assert sleep(process).error == "not tired"
        assert serves(process)


def test_an_engine_that_breaks_on_the_way_ends(tmp_path: Path) -> None:
    with sleepy(tmp_path, "breaks in sleep") as process:
        process.ready()
        assert sleep(process).error == "fell out of bed"
        assert process.await_status(status.Failed).cause == "fell out of bed"
        assert process.exit_code() == 1


def test_the_router_hears_that_the_cache_is_empty(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer("router") as router:
        router.send(Subscribe())
        assert router.receive() is not None
        sleep(process)
        while not isinstance(message := router.receive(), KvCleared):
            assert message is not None


def stop(process: WorkerProcess) -> None:
    process.status.send(status.Stop())


def drain(process: WorkerProcess) -> None:
    process.status.send(status.Drain(30.0))


def terminate(process: WorkerProcess) -> None:
    process.process.send_signal(signal.SIGTERM)


def lose_the_supervisor(process: WorkerProcess) -> None:
    process.status.close()


ENDS = pytest.mark.parametrize("end", [stop, drain, terminate, lose_the_supervisor])


@ENDS
def test_it_ends_as_ever_while_asleep(tmp_path: Path, end: Any) -> None:
    with sleepy(tmp_path) as process:
        process.ready()
        sleep(process)
        end(process)
        assert process.exit_code() == 0


@ENDS
def test_it_ends_as_ever_in_the_middle_of_waking(tmp_path: Path, end: Any) -> None:
    with sleepy(tmp_path, "hang in wake") as process:
        process.ready()
        sleep(process)
        process.status.send(status.Wake(2, 60.0))
        process.status.send(status.Sleep(3, 1.0))
        assert process.await_status(status.Slept).error == "the worker is waking"
        end(process)
        assert process.exit_code() == 0


@pytest.mark.parametrize("end", [stop, terminate, lose_the_supervisor])
def test_it_ends_as_ever_while_falling_asleep(tmp_path: Path, end: Any) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        peer.generate(1, [1], annotations=HOLD)
        fall_asleep(process, peer)
        end(process)
        assert peer.finish(1)[1][1].error == "worker is stopping"
        assert process.exit_code() == 0
