"""Another role for a worker that lives, as the supervisor asks for it, and what clients see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_sleep import ENDS, HOLD, engine_can_be_found, serves, sleep, sleepy, wake  # noqa: F401  a fixture among them
from worker_process import Peer, WorkerProcess, wait_until

from dynamo_box.protocol import status
from dynamo_box.protocol.request import Generate, GiveUp, Sampling, Transfer, pack_tokens
from engines.shell_role import CHANGING

BUSY = "the worker is changing its role"


def begin(process: WorkerProcess, role: str, number: int = 1, drain_s: float = 30.0) -> None:
    process.status.send(status.SetRole(number, role, drain_s))


def answer(process: WorkerProcess, number: int = 1) -> status.Answer:
    answered: status.Answer = process.await_status(status.Answer, where=lambda one: one.id == number)
    return answered


def set_role(process: WorkerProcess, role: str, number: int = 1, drain_s: float = 30.0) -> status.Answer:
    begin(process, role, number, drain_s)
    return answer(process, number)


def announced(process: WorkerProcess) -> str | None:
    instance = process.instance()
    return None if instance is None else instance.role


def begin_with_one_running(process: WorkerProcess, peer: Peer, role: str = "prefill") -> None:
    """The peer's stream 1 runs, the role is being changed, and more is refused."""
    peer.generate(1, [1], annotations=HOLD)
    assert peer.run([1], stream=100)[1].finish == "length"
    begin(process, role, drain_s=600.0)
    wait_until(lambda: process.instance() is None, "the worker withdrew")
    last = peer.run([1], stream=101)[1]
    assert (last.finish, last.error, last.rejected) == ("error", CHANGING, False)


def test_it_finishes_what_runs_and_serves_as_something_else(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        pid = process.instance().pid  # type: ignore[union-attr]
        assert process.figures(lambda figures: figures.role).role == announced(process) == "aggregated"
        begin_with_one_running(process, peer)
        process.ask(status.CancelRequest(3, "r1"))
        assert peer.finish(1)[1][1].finish == "cancelled"
        assert answer(process) == status.Answer(1, text="serves as prefill")
        assert announced(process) == "prefill"
        assert process.instance().pid == pid  # type: ignore[union-attr]
        assert process.figures(lambda figures: figures.role == "prefill").requests >= 2
        assert serves(process)
        assert peer.run([1], stream=5)[1].finish == "length", "on the same connection"
        for number, role in enumerate(("decode", "aggregated", "aggregated"), 10):
            assert not set_role(process, role, number, drain_s=0.0).error
            assert announced(process) == role


def test_with_requests_left_at_the_deadline_it_serves_on_as_before(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        peer.generate(1, [1], annotations=HOLD)
        assert peer.run([1], stream=100)[1].finish == "length"
        refusal = set_role(process, "prefill", drain_s=0.5).error
        assert refusal == "1 requests still run after 0.5 s: it serves on as aggregated"
        assert announced(process) == "aggregated"
        assert serves(process)
        process.ask(status.CancelRequest(3, "r1"))
        assert not set_role(process, "decode", 4).error
        assert announced(process) == "decode"


def test_one_change_at_a_time(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        begin_with_one_running(process, peer)
        assert set_role(process, "decode", 2).error == BUSY
        assert sleep(process, 3).error == BUSY
        assert wake(process, 4).error == BUSY
        process.ask(status.CancelRequest(5, "r1"))
        assert answer(process).text == "serves as prefill"
        process.status.send(status.Drain(30.0))
        assert process.exit_code() == 0


def test_asleep_it_takes_a_role_at_once_and_wakes_with_it(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        peer.generate(1, [1], annotations=HOLD)
        assert peer.run([1], stream=2)[1].finish == "length"
        process.status.send(status.Sleep(1, 60.0))
        wait_until(lambda: process.instance() is None, "the worker withdrew")
        assert set_role(process, "decode", 2).error == "the worker is falling asleep"
        process.ask(status.CancelRequest(3, "r1"))
        assert not process.await_status(status.Slept).error
        assert not set_role(process, "decode", 4).error
        assert announced(process) is None, "it sleeps on"
        assert not wake(process, 5).error
        assert announced(process) == "decode"
        assert serves(process)


@pytest.mark.parametrize(
    ("manner", "role", "says"),
    [("", "both", "not one of prefill, decode, aggregated"), ("whole requests only", "prefill", "has no KV tiers")],
)
def test_a_role_that_it_can_not_have(tmp_path: Path, manner: str, role: str, says: str) -> None:
    with sleepy(tmp_path, manner) as process:
        process.ready()
        assert says in set_role(process, role).error
        assert announced(process) == "aggregated"
        assert not set_role(process, "aggregated", 2).error
        assert serves(process)


def test_before_it_is_ready_and_while_it_drains_there_is_none(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process:
        begin(process, "prefill", 1)
        assert answer(process, 1).error == "the worker is not ready yet"
        with process.ready().peer() as peer:
            begin_with_one_running(process, peer)
            process.status.send(status.Drain(60.0))
            assert set_role(process, "decode", 2).error == "the worker is draining"
            assert peer.run([1], stream=102)[1].error == "worker is draining"
            assert process.instance() is None
            process.status.send(status.CancelRequest(3, "r1"))
            assert process.exit_code() == 0


@ENDS
def test_it_ends_as_ever_in_the_middle_of_a_change(tmp_path: Path, end: Any) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        begin_with_one_running(process, peer)
        end(process)
        if end.__name__ == "drain":
            wait_until(lambda: peer.run([1], stream=102)[1].error == "worker is draining", "it drains")
            process.status.send(status.CancelRequest(3, "r1"))
        assert process.exit_code() == 0
        assert process.instance() is None


def test_a_transfer_that_nobody_goes_on_from_is_given_up(tmp_path: Path) -> None:
    with sleepy(tmp_path) as process, process.ready().peer() as peer:
        peer.send(GiveUp(b"k" * 16))
        process.figures(lambda figures: figures.transfers_failed == 1)
        leaves = process.peer()
        leaves.send(Generate(1, "r1", pack_tokens([1]), Sampling(8), b"i" * 32, annotations=HOLD, leg="prefill"))
        assert leaves.run([1], stream=2)[1].finish == "length"
        leaves.close()
        process.figures(lambda figures: figures.transfers_failed == 2)


def test_a_leg_that_the_engine_does_not_serve_is_rejected(tmp_path: Path) -> None:
    transfer = Transfer(b"k" * 16, 1)
    with sleepy(tmp_path, "whole requests only") as process, process.ready().peer() as peer:
        for stream, leg in ((1, "prefill"), (2, "decode")):
            isolation = b"i" * 32
            knobs = Sampling(8)
            peer.send(Generate(stream, "r", pack_tokens([1, 2]), knobs, isolation, leg=leg, transfer=transfer))  # type: ignore[arg-type]
            _, last = peer.finish(stream)[stream]
            assert last.rejected
            assert last.error == f"this worker's engine does not serve {leg} legs: it lacks 'disagg'"
        peer.send(GiveUp(transfer.key))
        assert serves(process)
