"""The control socket of a running box, and its end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from supervised_box import DEADLINE_S, BoxUnderTest, eventually

from dynamo_box.errors import BoxError, NotRunning
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import BlockingChannel, connect_unix

WORKER = "tiny.aggregated.0"


def connect(box: BoxUnderTest) -> BlockingChannel[control.ControlReply]:
    return BlockingChannel(connect_unix(box.run_dir.control_socket), control.reply_decoder)


def down(box: BoxUnderTest, drain_s: float = 30.0) -> control.Stopped:
    with box.client() as client:
        return client.down(drain_s, DEADLINE_S)


def test_the_last_that_watchers_see_is_a_box_that_has_stopped(box: BoxUnderTest) -> None:
    launched = box.up()
    with box.client() as watcher:
        watching = watcher.watch(0.1)
        assert next(watching).box.state == "ready"
        down(box)
        assert [snapshot.box.state for snapshot in watching][-1] == "stopped"
    assert launched.exit_code() == 0


def test_down_drains_the_frontend_first_and_says_what_it_freed(box: BoxUnderTest) -> None:
    launched = box.up(box.plan(workers=2))
    stopped = down(box)
    assert (stopped.processes, stopped.killed, stopped.survivors) == (4, 0, ())
    assert stopped.freed_bytes > 10_000_000
    assert launched.exit_code() == 0
    order = (box.run_dir.root / "drained").read_text().split()
    assert order[:2] == ["frontend", "router"]
    assert sorted(order[2:]) == [WORKER, "tiny.aggregated.1"]
    assert box.processes() == []
    assert list(box.run_dir.root.glob("*.sock")) == []
    assert list(box.run_dir.instances.iterdir()) == []
    cgroups = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names]  # others come and go meanwhile
    assert not [name for name in cgroups if name.startswith(f"dynbox.{box.run_dir.key}.")]


@pytest.mark.slow
def test_what_does_not_drain_is_terminated_and_then_killed(box: BoxUnderTest) -> None:
    launched = box.up(box.plan(worker="stubborn daemon"))
    stopped = down(box, 0.3)
    assert (stopped.killed, stopped.survivors) == (1, ())
    assert launched.exit_code() == 0
    assert box.processes() == []


@pytest.mark.slow
def test_everyone_who_asks_for_the_end_hears_of_it(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="stubborn"))
    first, second = connect(box), connect(box)
    with first, second:
        first.send(control.Down(1, 0.0))
        second.send(control.Down(2, 0.0))
        for number, channel in ((1, first), (2, second)):
            reply = channel.receive(DEADLINE_S)
            assert isinstance(reply, control.Stopped)
            assert reply.id == number


@pytest.mark.slow
def test_terminating_the_supervisor_drains_and_a_second_signal_cuts_that_short(box: BoxUnderTest) -> None:
    launched = box.up(box.plan(frontend="serve stubborn", drain_s=300.0))
    launched.process.send_signal(signal.SIGTERM)
    box.until("frontend", lambda process: process.state == "draining", "drains")
    launched.process.send_signal(signal.SIGTERM)
    assert launched.exit_code() == 0
    assert box.processes() == []


@pytest.mark.slow
def test_a_stopped_guard_does_not_stop_the_end(box: BoxUnderTest) -> None:
    launched = box.up(box.plan(worker="stubborn"))
    os.kill(box.process(WORKER).guard_pid or 0, signal.SIGSTOP)
    assert down(box, 0.0).survivors == ()
    assert launched.exit_code() == 0
    assert box.processes() == []


def test_restart_drains_one_process_and_waits_until_it_is_ready(box: BoxUnderTest) -> None:
    box.up()
    before = box.process(WORKER)
    with box.client() as client:
        client.restart(WORKER, 30.0, DEADLINE_S)
    after = box.process(WORKER)
    assert (after.state, after.restarts) == ("ready", 0), "a restart that was asked for is no failure"
    assert after.pid != before.pid
    assert (box.run_dir.root / "drained").read_text().split() == [WORKER]


def test_a_restart_of_something_unknown_names_what_is_near(box: BoxUnderTest) -> None:
    box.up()
    with box.client() as client, pytest.raises(NotRunning) as caught:
        client.restart("fronted", 0.0, DEADLINE_S)
    assert (caught.value.remedy or "").startswith("did you mean: frontend")


def test_settings_and_cancellations_reach_the_child(box: BoxUnderTest) -> None:
    box.up()
    with connect(box) as channel:
        channel.send(control.SetOption(1, "router", "mode", "random"))
        assert channel.receive(DEADLINE_S) == control.Done(1, "random")
        channel.send(control.SetOption(2, "router", "moad", "random"))
        assert channel.receive(DEADLINE_S) == control.Error(2, 1, "router: no setting moad")
        channel.send(control.SetOption(3, "rooter", "mode", "random"))
        refused = channel.receive(DEADLINE_S)
        assert isinstance(refused, control.Error)
        assert (refused.code, refused.remedy) == (3, "did you mean: router")
        channel.send(control.CancelRequest(4, "abc"))
        assert channel.receive(DEADLINE_S) == control.Done(4, "cancelled abc")
        channel.send(control.Launch(5, msgspec.Raw(b"\xc0")))
        assert isinstance(channel.receive(DEADLINE_S), control.Error)


def test_a_watcher_hears_of_changes_only_and_at_most_four_times_a_second(box: BoxUnderTest) -> None:
    box.up()
    with box.client() as client:
        snapshots = client.watch(1000.0)
        ages = []
        killer = threading.Timer(0.2, os.kill, (box.process(WORKER).pid or 0, signal.SIGKILL))
        killer.start()
        for snapshot in snapshots:
            ages.append(snapshot.box.uptime_s)
            worker = next(process for process in snapshot.processes if process.name == WORKER)
            if (worker.state, worker.restarts) == ("ready", 1):
                break
        killer.join()
    assert len(ages) - 1 <= 4 * (ages[-1] - ages[0]) + 1, ages


def test_clients_are_bounded_and_hostile_ones_are_cut_off(box: BoxUnderTest) -> None:
    box.up()
    with connect_unix(box.run_dir.control_socket) as hostile:
        hostile.sendall(b"\xff" * 1024)
        assert hostile.recv(1) == b""
    clients = [connect(box) for _ in range(64)]
    for number, client in enumerate(clients):
        client.send(control.GetSnapshot(number))
        assert isinstance(client.receive(DEADLINE_S), control.SnapshotReply)
    with connect(box) as one_more:
        refusal = one_more.receive(DEADLINE_S)
        assert isinstance(refusal, control.Error)
        assert "64 clients" in refusal.what
    for client in clients:
        client.close()
    eventually(lambda: _answers(box), "there is room again")


def _answers(box: BoxUnderTest) -> bool:
    try:
        return box.snapshot().box.state == "ready"
    except BoxError:
        return False


def in_foreground(box: BoxUnderTest, **environment: str) -> subprocess.Popen[str]:
    fd = os.memfd_create("plan", 0)
    request = control.Launch(1, msgspec.Raw(msgspec.msgpack.encode(box.plan())))
    os.write(fd, msgspec.msgpack.encode(request))
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "dynamo_box.supervisor", "--plan-fd", str(fd)],
            pass_fds=(fd,),
            stderr=subprocess.PIPE,
            text=True,
            env={**box.environment, **environment},
        )
    finally:
        os.close(fd)


def test_in_the_foreground_systemd_is_told_and_logs_go_to_stderr(box: BoxUnderTest, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(DEADLINE_S)
        process = in_foreground(box, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="500000")
        with process:
            heard: list[str] = []
            while not heard or not heard[-1].startswith("READY=1\nSTATUS="):
                heard.append(notified.recv(4096).decode())
            while heard[-1] != "WATCHDOG=1":
                heard.append(notified.recv(4096).decode())
            assert box.answers()
            while select.select([notified], [], [], 0)[0]:  # else there might be no room for the last word
                heard.append(notified.recv(4096).decode())
            process.send_signal(signal.SIGINT)
            while not heard[-1].startswith("STOPPING=1"):
                heard.append(notified.recv(4096).decode())
            _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert '"event": "box ready"' in stderr
    assert box.processes() == []


def test_in_the_foreground_a_failed_start_is_explained_on_stderr(box: BoxUnderTest) -> None:
    with socket.create_server(("127.0.0.1", box.port)), in_foreground(box) as process:
        _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert f"error: port {box.port} on 127.0.0.1 is taken by" in stderr
    assert "→ stop that program, or choose another port" in stderr


def test_ctrl_c_during_a_start_in_the_foreground_leaves_nothing(box: BoxUnderTest) -> None:
    silent = box.plan
    box.plan = lambda: silent(worker="silent")  # type: ignore[method-assign]
    with in_foreground(box) as process:
        eventually(box.run_dir.control_socket.exists, "it is starting")
        eventually(lambda: box.process("router").state == "ready", "the router is there")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert box.processes() == []
