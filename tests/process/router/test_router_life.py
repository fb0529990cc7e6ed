"""The router process: how it starts, is told things, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from dynamo_box.protocol import status
from dynamo_box.protocol.residency import Residency
from dynamo_box.protocol.route import Place, Release, Unplaced
from dynamo_box.protocol.spec import Disagg


def test_it_says_how_its_start_goes_and_listens_when_ready(stage: Any) -> None:
    router = stage.start_router()
    assert router.expect(status.Starting).phase == "instances"
    ready = router.expect(status.Ready)
    assert ready.info == {"mode": "kv", "disagg": "fallback", "models": "smollm2"}
    reply = stage.frontend().place()
    assert isinstance(reply, Unplaced)
    assert (reply.code, reply.reason) == ("no_workers", "no worker serves smollm2 now")


@pytest.mark.parametrize("ending", ["stop", "end of stream", "SIGTERM", "drain"])
def test_its_endings_are_orderly(stage: Any, ending: str) -> None:
    router = stage.router()
    if ending == "stop":
        router.status.send(status.Stop())
    elif ending == "end of stream":
        router.status.close()
    elif ending == "SIGTERM":
        router.process.send_signal(signal.SIGTERM)
    else:
        router.status.send(status.Drain(deadline_s=60.0))
        assert router.expect(status.Draining).in_flight == 0
    assert router.exit_status() == 0


def test_it_stops_while_workers_and_frontends_are_connected(stage: Any) -> None:
    router = stage.router()
    stage.subscribed_worker(router)
    stage.frontend().placed((1, 2))
    router.status.send(status.Stop())
    assert router.exit_status() == 0


def test_an_interrupt_from_the_terminal_is_ignored(stage: Any) -> None:
    router = stage.router()
    router.process.send_signal(signal.SIGINT)
    router.status.send(status.Set(1, "mode", "random"))
    assert router.expect(status.Answer).error == ""


def test_orders_that_are_for_others_are_passed_over(stage: Any) -> None:
    router = stage.router()
    for order in (
        status.Residencies((Residency("smollm2", "asleep"),)),
        status.Sleep(1, 1.0),
        status.Wake(2, 1.0),
        status.Move(3, "smollm2", "host"),
        status.Told(5, 0, ""),
        status.Set(6, "mode", "random"),
    ):
        router.status.send(order)
    assert router.expect(status.Answer).id == 6


def test_without_a_supervisor_it_says_who_starts_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DYNBOX_STATUS_FD"}
    ended = subprocess.run(
        [sys.executable, "-m", "dynamo_box.router"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert "dynbox up" in ended.stderr


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"mode": "fastest"}, "no routing mode 'fastest'"),
        ({"overlap_weight": -1.0}, "overlap_weight"),
        ({"temperature": float("nan")}, "temperature"),
        ({"disagg": Disagg("conditional", min_uncached_share=1.5)}, "min_uncached_share must be a number from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_fail_for_good(stage: Any, changes: dict[str, Any], cause: str) -> None:
    router = stage.start_router(**changes)
    failed = router.expect(status.Failed)
    assert cause in failed.cause
    assert failed.permanent
    assert router.exit_status() == 1


def test_a_socket_that_cant_be_opened_fails_the_start(stage: Any) -> None:
    stage.run_dir.router_socket.mkdir()
    router = stage.start_router()
    failed = router.expect(status.Failed)
    assert "router.sock" in failed.cause
    assert not failed.permanent
    assert router.exit_status() == 1


def test_its_mode_and_policy_can_be_set_and_nothing_else(stage: Any) -> None:
    router = stage.router()
    router.status.send(status.Set(1, "mode", "round-robin"))
    assert router.expect(status.Answer) == status.Answer(1, text="mode round-robin")
    router.status.send(status.Set(2, "mode", "fastest"))
    assert "there are kv, round-robin, random" in router.expect(status.Answer).error
    router.status.send(status.Set(3, "colour", "red"))
    refusal = "the router has no setting 'colour'; there are mode and disagg"
    assert router.expect(status.Answer) == status.Answer(3, error=refusal)
    router.status.send(status.CancelRequest(4, "req"))
    assert "frontend" in router.expect(status.Answer).error


def test_a_drain_waits_for_what_runs_and_takes_nothing_new(stage: Any) -> None:
    router = stage.router()
    stage.subscribed_worker(router)
    frontend = stage.frontend()
    running = frontend.placed((1, 2))
    router.status.send(status.Drain(deadline_s=60.0))
    assert router.expect(status.Draining).in_flight == 1
    refused = frontend.place()
    assert (refused.code, refused.reason) == ("no_workers", "the router is stopping")
    frontend.send(Release(running.id))
    assert router.expect(status.Draining).in_flight == 0
    assert router.exit_status() == 0


def test_a_drain_ends_at_its_deadline(stage: Any) -> None:
    router = stage.router()
    stage.subscribed_worker(router)
    stage.frontend().placed((1, 2))
    router.status.send(status.Drain(deadline_s=0.1))
    assert router.exit_status() == 0


def test_after_kill_9_the_next_one_finds_the_workers_again(stage: Any) -> None:
    router = stage.router()
    worker = stage.subscribed_worker(router)
    router.process.kill()
    assert router.exit_status() == -signal.SIGKILL
    stage.router()
    worker.accept()
    worker.dump(7, (1, 2, 3))
    frontend = stage.frontend()
    assert frontend.placed((1, 2, 3)).worker == worker.name


@pytest.mark.parametrize("rubbish", [b"\xff" * 64, b"\0\0\0\1\xc1", b"GET / HTTP/1.1\r\n\r\n"])
def test_rubbish_on_one_connection_harms_no_other(stage: Any, rubbish: bytes) -> None:
    router = stage.router()
    stage.subscribed_worker(router)
    hostile, frontend = stage.frontend(), stage.frontend()
    hostile.channel._socket.sendall(rubbish)
    assert hostile.receive() is None
    assert frontend.placed((1,)).worker


def test_connections_are_bounded(stage: Any) -> None:
    router = stage.router()
    stage.subscribed_worker(router)
    frontends = [stage.frontend() for _ in range(64)]
    for frontend in frontends:
        frontend.placed()
    assert stage.frontend().receive() is None
    assert frontends[0].placed().worker


def test_a_request_of_a_later_version_with_more_fields_is_understood(stage: Any) -> None:
    router = stage.router()
    stage.subscribed_worker(router)
    frontend = stage.frontend()
    known = msgspec.to_builtins(Place(1, "r", "smollm2", (), 1))
    frontend.send({**known, "future": True})
    assert frontend.receive().id == 1
