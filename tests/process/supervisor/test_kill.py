"""`kill -9` of everyone: what should come back comes back, and nothing is orphaned."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec
import pytest
from supervised_box import DEADLINE_S, QUICK, BoxUnderTest, alive, eventually

from dynamo_box.errors import BoxError
from dynamo_box.snapshot import ProcessInfo
from dynamo_box.supervisor.lock import RunDirHeld
from dynamo_box.supervisor.sweep import sweep

WORKER = "tiny.aggregated.0"


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def daemon_of(box: BoxUnderTest, name: str) -> int:
    return int((box.run_dir.root / f"{name}.daemon").read_text())


@pytest.mark.parametrize("name", [WORKER, "router", "frontend"])
@pytest.mark.parametrize("what", ["program", "guard"])
def test_a_killed_process_comes_back(box: BoxUnderTest, name: str, what: str) -> None:
    words = {"worker": "daemon", "router": "daemon", "frontend": "serve daemon"}
    box.up(box.plan(**words))
    before, neighbours = box.process(name), [each.pid for each in box.snapshot().processes if each.name != name]
    daemon = daemon_of(box, name)
    kill(before.pid if what == "program" else before.guard_pid)
    after = box.until(name, lambda process: process.state == "ready" and process.restarts == 1, "is ready again")
    assert after.pid != before.pid
    assert after.cause == ("killed by SIGKILL" if what == "program" else "its guard was killed")
    assert not alive(before.pid or 0)
    assert not alive(before.guard_pid or 0)
    assert not alive(daemon), "what the first life left is gone before the second begins"
    assert [each.pid for each in box.snapshot().processes if each.name != name] == neighbours
    assert eventually(box.answers, "the box answers")


def test_an_adopted_orphan_without_our_environment_is_ended_too(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="bare-daemon"))
    daemon = daemon_of(box, WORKER)
    kill(box.process(WORKER).guard_pid)
    eventually(lambda: not alive(daemon), "the daemon is gone")
    box.until(WORKER, lambda process: process.state == "ready" and process.restarts == 1, "is ready again")


def test_the_instance_of_a_dead_worker_goes_at_once(box: BoxUnderTest) -> None:
    slow = msgspec.structs.replace(QUICK, first_s=60.0, longest_s=60.0)
    box.up(box.plan(restart=slow))
    file = box.run_dir.instances / f"{WORKER}.json"
    assert file.exists()
    kill(box.process(WORKER).pid)
    eventually(lambda: not file.exists(), "the instance file is gone")
    assert box.until(WORKER, lambda process: process.state == "backoff", "waits")
    assert [model.state for model in box.snapshot().models] == ["unavailable"]
    assert box.snapshot().box.state == "ready", "a restart under way is no degradation"


def test_a_process_that_keeps_failing_is_fatal_and_degrades_the_box(box: BoxUnderTest) -> None:
    box.up(box.plan(workers=2))
    killed: set[int] = set()

    def killed_or_fatal() -> ProcessInfo | None:
        process = box.process(WORKER)
        if process.state == "ready" and process.pid is not None and process.pid not in killed:
            kill(process.pid)
            killed.add(process.pid)
        return process if process.state == "fatal" else None

    fatal = eventually(killed_or_fatal, "the worker is fatal")
    assert (fatal.restarts, fatal.cause) == (QUICK.give_up_after - 1, "killed by SIGKILL")
    snapshot = box.snapshot()
    assert (snapshot.box.state, snapshot.box.cause) == ("degraded", f"{WORKER}: killed by SIGKILL")
    assert [model.state for model in snapshot.models] == ["ready"], "the other worker serves"
    with box.client() as client:
        client.restart(WORKER, 0.0, DEADLINE_S)
    assert box.snapshot().box.state == "ready"


def test_connections_wait_while_the_frontend_restarts_and_are_refused_once_it_is_fatal(box: BoxUnderTest) -> None:
    slow = msgspec.structs.replace(QUICK, first_s=0.5, longest_s=0.5, give_up_after=2)
    box.up(box.plan(restart=slow))
    answers: list[bool] = []
    kill(box.process("frontend").pid)
    box.until("frontend", lambda process: process.state == "backoff" or process.restarts, "waits")
    client = threading.Thread(target=lambda: answers.append(box.answers()))
    client.start()
    client.join(DEADLINE_S)
    assert answers == [True]
    box.until("frontend", lambda process: process.pid, "is back")
    kill(box.process("frontend").pid)
    box.until("frontend", lambda process: process.state == "fatal", "is given up")
    assert not box.answers()
    with box.client() as control:
        control.restart("frontend", 0.0, DEADLINE_S)
    assert box.answers()


def test_a_frontend_without_its_port_stays_given_up(box: BoxUnderTest) -> None:
    box.up(box.plan(restart=msgspec.structs.replace(QUICK, give_up_after=1)))
    kill(box.process("frontend").pid)
    box.until("frontend", lambda process: process.state == "fatal", "is given up")
    with socket.create_server(("127.0.0.1", box.port)), box.client() as control:
        with pytest.raises(BoxError, match="is taken"):
            control.restart("frontend", 0.0, DEADLINE_S)
        assert (control.snapshot().box.state, box.process("frontend").state) == ("degraded", "fatal")
    with box.client() as control:
        control.restart("frontend", 0.0, DEADLINE_S)
    assert box.answers()


@pytest.mark.slow
def test_without_its_supervisor_everything_ends(box: BoxUnderTest) -> None:
    launched = box.up(box.plan(worker="daemon stubborn", router="daemon"))
    kill(launched.process.pid)
    launched.exit_code()
    eventually(lambda: box.processes() == [], "nothing is left")
    box.up()
    assert box.answers()


def kill_supervisor_and_guards(box: BoxUnderTest) -> int:
    """All at once; the pid of a daemon that has neither guard nor supervisor any more."""
    launched = box.up(box.plan(worker="daemon"))
    daemon = daemon_of(box, WORKER)
    victims = [launched.process.pid, *(process.guard_pid for process in box.snapshot().processes)]
    for pid in victims:
        os.kill(pid or 0, signal.SIGSTOP)
    for pid in victims:
        kill(pid)
    launched.exit_code()
    assert alive(daemon), "it has a session of its own, and nobody was left to end it"
    return daemon


def test_after_supervisor_and_guards_were_killed_at_once_the_next_up_leaves_nothing(box: BoxUnderTest) -> None:
    daemon = kill_supervisor_and_guards(box)
    box.up()
    assert not alive(daemon)
    assert box.answers()
    assert any("a dead box had left" in event.text for event in box.snapshot().events)


def test_after_supervisor_and_guards_were_killed_at_once_a_sweep_leaves_nothing(box: BoxUnderTest) -> None:
    daemon = kill_supervisor_and_guards(box)
    report = sweep(box.run_dir)
    assert daemon in report.pids
    assert report.survivors == ()
    assert report.killed == len(report.pids)
    assert not alive(daemon)
    assert box.processes() == []
    assert list(box.run_dir.root.glob("*.sock")) == []


def test_the_sweep_of_the_command_line_reports_as_json(box: BoxUnderTest) -> None:
    daemon = kill_supervisor_and_guards(box)
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_box.supervisor", "--sweep"], capture_output=True, timeout=DEADLINE_S, check=True
    )
    report = msgspec.json.decode(done.stdout)
    assert daemon in report["pids"]
    assert not alive(daemon)


def test_a_living_box_is_not_swept(box: BoxUnderTest) -> None:
    box.up()
    with pytest.raises(RunDirHeld):
        sweep(box.run_dir)
    assert box.answers()


def test_a_neighbour_with_another_run_dir_is_left_alone(
    box: BoxUnderTest, make_box: Callable[[str], BoxUnderTest]
) -> None:
    box.up()
    other = make_box("other")
    launched = other.up()
    kill(launched.process.pid)
    launched.exit_code()
    sweep(other.run_dir)
    assert other.processes() == []
    assert box.answers()
    assert all(process.restarts == 0 for process in box.snapshot().processes)
