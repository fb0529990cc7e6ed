"""The box of this run dir, if one runs, and the port that it has or would get."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from dynamo_box import ports
from dynamo_box.control.client import ControlClient
from dynamo_box.control.launch import is_held
from dynamo_box.doctor import leftovers, processes
from dynamo_box.doctor.finding import FIX, Finding, failed, passed, skipped, warned
from dynamo_box.doctor.machine import Machine, is_ours, user_name
from dynamo_box.doctor.processes import BoxProcess
from dynamo_box.errors import BoxError, NotRunning
from dynamo_box.snapshot import BoxSnapshot

ANSWER_TIMEOUT_S = 1.0
PORT_VARIABLE = "DYNBOX_PORT"
DEFAULT_PORT = 8000
LAST_PORT = 65535

_LISTENING = "0A"
_IN_THE_WAY = {"00000000", "0100007F", "0" * 32, "0000000000000000FFFF00000100007F"}
"""Addresses as /proc/net/tcp writes them that keep a box from 127.0.0.1: any, that one, and both over IPv6."""


@dataclass(frozen=True)
class Listener:
    address: str
    port: int
    uid: int


@dataclass(frozen=True)
class Holder:
    """Who listens on a port; `pid` is None for another user's process, `member` says which box it belongs to."""

    who: str
    pid: int | None = None
    member: BoxProcess | None = None


def check(machine: Machine) -> list[Finding]:
    try:
        with ControlClient.connect(machine.run, ANSWER_TIMEOUT_S) as client:
            snapshot = client.snapshot(ANSWER_TIMEOUT_S)
    except NotRunning:
        is_starting = is_ours(machine.run.root) and is_held(machine.run)
        found = "one is just starting or stopping" if is_starting else "none is running"
        return [skipped("box", found), *_check_wanted_port(machine)]
    except BoxError as error:
        supervisor = leftovers.lock_holder(machine.run)
        command = f"kill -9 {supervisor.pid}; dynbox down" if supervisor else ""
        return [failed("box", error.what, "nothing can be asked of it or stopped", command)]
    port = urlsplit(snapshot.box.endpoint).port or DEFAULT_PORT
    holder = holder_of(machine, [each for each in read_listeners(machine) if each.port == port])
    return [*judge_box(snapshot), judge_own_port(port, holder, snapshot.box.pid, machine.run.key)]


def judge_box(snapshot: BoxSnapshot) -> list[Finding]:
    """One finding for the box, and one for each process that was given up."""
    box = snapshot.box
    known = f"{box.state}, profile {box.profile} at {box.endpoint}, supervisor pid {box.pid}"
    restarts = sum(process.restarts for process in snapshot.processes)
    if restarts:
        known += f", {restarts} restarts"
    if box.state in ("ready", "starting", "stopping"):
        findings = [passed("box", known)]
    else:
        judge = warned if box.state == "degraded" else failed
        why = box.cause or "requests go to what is left of it"
        findings = [judge("box", known, why, "dynbox ps")]
    for process in snapshot.processes:
        if process.state == "fatal":
            found = f"fatal: {process.cause or 'no cause is known'}"
            why = "it failed again and again, and is not restarted any more"
            findings.append(failed(process.name, found, why, f"dynbox restart {process.name}"))
    return findings


def judge_own_port(port: int, holder: Holder | None, supervisor: int, key: str) -> Finding:
    """Of a box that runs; `supervisor` is its pid, `key` that of its run dir."""
    if holder is None:
        why = "no client reaches the box"
        return failed("port", f"nobody listens on {port}, the box's own port", why, "dynbox down && dynbox up")
    member = holder.member
    if holder.pid in (None, supervisor) or (member is not None and member.key == key):
        return passed("port", f"{port}, the box's own")
    found = f"{port} is held by {holder.who}, not by the box"
    return failed("port", found, "clients reach something else", "dynbox ps")


def judge_wanted_port(port: int, holder: Holder | None, free: int | None, key: str) -> Finding:
    """Of a box that would be started in the run dir with that key; `free` is another port."""
    if holder is None:
        return passed("port", f"{port} is free")
    why = "`dynbox up` refuses to start"
    member = holder.member
    if member is not None and member.key == key and not member.box_alive:
        return failed("port", f"{port} is taken by {holder.who}, which a dead box left", why, FIX)
    who = f"{holder.who} of the box in {member.run_dir or 'another run dir'}" if member else holder.who
    return failed("port", f"{port} is taken by {who}", why, "" if free is None else f"export {PORT_VARIABLE}={free}")


def holder_of(machine: Machine, listeners: Sequence[Listener]) -> Holder | None:
    """Who the listeners on one port belong to; None if there are none."""
    if not listeners:
        return None
    found = ports.holder(listeners[0].port)
    if found is None:
        return Holder(f"a process of {user_name(listeners[0].uid)}")
    return Holder(str(found), found.pid, processes.box_process(machine, found.pid))


def read_listeners(machine: Machine) -> list[Listener]:
    found = []
    for table in ("proc/net/tcp", "proc/net/tcp6"):
        for fields in map(str.split, machine.lines(table)[1:]):
            address, _, port = fields[1].partition(":")
            if fields[3] == _LISTENING:
                found.append(Listener(address, int(port, 16), int(fields[7])))
    return found


def _check_wanted_port(machine: Machine) -> list[Finding]:
    text = os.environ.get(PORT_VARIABLE) or str(DEFAULT_PORT)
    if not text.isdecimal() or not 0 < int(text) <= LAST_PORT:
        why = "the shipped profiles take their port from it"
        return [failed("port", f"{PORT_VARIABLE} is {text!r}, which is no port", why, f"unset {PORT_VARIABLE}")]
    port = int(text)
    listeners = [each for each in read_listeners(machine) if each.address in _IN_THE_WAY]
    taken = {each.port for each in listeners}
    free = next((each for each in range(port + 1, LAST_PORT + 1) if each not in taken), None)
    holder = holder_of(machine, [each for each in listeners if each.port == port])
    return [judge_wanted_port(port, holder, free, machine.run.key)]
