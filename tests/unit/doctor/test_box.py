"""The box of the run dir, and its port."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from fake_machine import put

from dynamo_box.doctor import box
from dynamo_box.doctor.box import Holder, Listener
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine
from dynamo_box.doctor.processes import BoxProcess
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, ProcessInfo

KEY = "0123456789ab"
TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  4000        0 11 1 0
   1: 0100007F:1F41 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0
   2: 0500000A:1F42 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1 0
"""


def process(name: str, state: str, cause: str = "") -> ProcessInfo:
    return ProcessInfo(name, "router", None, None, state, "", 1, 2, None, None, cause=cause)


def snapshot(state: str, *processes: ProcessInfo) -> BoxSnapshot:
    return BoxSnapshot(BoxInfo(state, "smollm2", "http://127.0.0.1:8000", 77, 1.0), (), processes)


@pytest.mark.parametrize(
    ("state", "status"),
    [("ready", Status.PASS), ("starting", Status.PASS), ("degraded", Status.WARN), ("failed", Status.FAIL)],
)
def test_the_state_of_a_box(state: str, status: Status) -> None:
    (found,) = box.judge_box(snapshot(state, process("router", "ready")))
    assert found.status is status
    assert "2 restarts" in found.found


def test_a_process_that_was_given_up_is_named_with_its_cause() -> None:
    _, fatal = box.judge_box(snapshot("degraded", process("router", "fatal", "killed by SIGKILL")))
    assert (fatal.name, fatal.status) == ("router", Status.FAIL)
    assert fatal.found == "fatal: killed by SIGKILL"
    assert fatal.command == "dynbox restart router"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_port_that_a_stranger_has(machine: Machine, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine(machine.run, machine.home)
    port = listener.getsockname()[1]
    monkeypatch.setenv("DYNBOX_PORT", str(port))
    none_running, found = box.check(here)
    assert none_running.status is Status.SKIP
    assert found.status is Status.FAIL
    assert f"{port} is taken by " in found.found
    assert "(pid " in found.found
    assert found.command.startswith("export DYNBOX_PORT=")
    assert found.command != f"export DYNBOX_PORT={port}"


@pytest.mark.parametrize("text", ["", "no port", "70000", "0", "-1"])
def test_a_port_that_is_none(machine: Machine, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DYNBOX_PORT", text)
    found = box.check(machine)[-1]
    if text:
        assert found.status is Status.FAIL
        assert found.command == "unset DYNBOX_PORT"
    else:
        assert found.found == "8000 is free"


def test_listeners_are_read_with_their_owner(machine: Machine) -> None:
    put(machine, "proc/net/tcp", TCP)
    assert box.read_listeners(machine) == [Listener("0100007F", 8000, 4000), Listener("0500000A", 8002, 0)]
    holder = box.holder_of(machine, [Listener("0100007F", 0, 3999999)])
    assert holder == Holder("a process of uid 3999999")


def test_addresses_that_do_not_stand_in_the_way(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    put(machine, "proc/net/tcp", TCP)
    monkeypatch.setenv("DYNBOX_PORT", "8002")
    assert box.check(machine)[-1].found == "8002 is free"


def test_the_port_of_a_running_box() -> None:
    member = BoxProcess(5, "python", KEY, True, "/run/a")
    assert box.judge_own_port(8000, None, 77, KEY).status is Status.FAIL
    assert box.judge_own_port(8000, Holder("x (pid 77)", 77), 77, KEY).status is Status.PASS
    assert box.judge_own_port(8000, Holder("x (pid 5)", 5, member), 77, KEY).status is Status.PASS
    assert box.judge_own_port(8000, Holder("x (pid 6)", 6), 77, KEY).status is Status.FAIL


def test_whose_port_it_is_decides_what_mends_it() -> None:
    def command(holder: Holder | None) -> str:
        return box.judge_wanted_port(8000, holder, 8001, KEY).command

    assert command(None) == ""
    assert command(Holder("nginx (pid 5)", 5)) == "export DYNBOX_PORT=8001"
    assert command(Holder("python (pid 5)", 5, BoxProcess(5, "python", KEY, False, "/run/a"))) == "dynbox doctor --fix"
    other = box.judge_wanted_port(8000, Holder("python (pid 5)", 5, BoxProcess(5, "p", "f", True, "/b")), None, KEY)
    assert other.found == "8000 is taken by python (pid 5) of the box in /b"
    assert other.command == ""
