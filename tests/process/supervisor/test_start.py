"""From the launch to a ready box, or to a refusal that leaves nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import msgspec
import pytest
from supervised_box import DEADLINE_S, BoxUnderTest, eventually

from dynamo_box.plan.types import Plan
from dynamo_box.protocol import control


def refused(box: BoxUnderTest, plan: Plan) -> control.Error:
    """Launch a plan that can't come up; nothing of it may be left."""
    launched = box.launch(plan)
    reply = launched.result()
    assert isinstance(reply, control.Error)
    assert launched.exit_code() == reply.code
    assert box.processes() == []
    assert not box.run_dir.control_socket.exists()
    return reply


def changed(plan: Plan, process: str, **fields: object) -> Plan:
    """The plan with other fields in one process."""
    processes = tuple(
        msgspec.structs.replace(each, **fields) if each.name == process else each for each in plan.processes
    )
    return msgspec.structs.replace(plan, processes=processes)


def test_a_box_is_ready_once_its_model_has_answered(box: BoxUnderTest) -> None:
    launched = box.up()
    assert box.answers()
    snapshot = box.snapshot()
    assert (snapshot.box.state, snapshot.box.endpoint) == ("ready", f"http://127.0.0.1:{box.port}")
    assert snapshot.box.pid == launched.process.pid
    assert [model.state for model in snapshot.models] == ["ready"]
    assert [process.state for process in snapshot.processes] == ["ready"] * 3
    assert all(process.pid and process.guard_pid for process in snapshot.processes)
    assert any("canary" in event.text for event in snapshot.events)
    sampled = box.until("router", lambda process: process.rss_bytes, "has its memory sampled")
    assert sampled.rss_bytes is not None and sampled.rss_bytes > 1_000_000


def test_the_launcher_sees_phases_and_progress(box: BoxUnderTest) -> None:
    launched = box.launch(box.plan(worker="steps:4:0 until:seen"))
    launched.follow_until(lambda snapshot: snapshot.processes[0].progress)
    worker = launched.snapshots[-1].processes[0]
    assert (worker.state, worker.phase) == ("starting", "weights")
    (box.run_dir.root / "seen").touch()
    assert isinstance(reply := launched.result(), control.Done), reply


def test_the_last_that_the_launcher_sees_is_a_box_that_is_ready(box: BoxUnderTest) -> None:
    last = box.up().snapshots[-1]
    assert [process.state for process in last.processes] == ["ready"] * 3
    assert last.box.state == "ready"


def test_progress_moves_the_start_deadline(box: BoxUnderTest) -> None:
    began = time.monotonic()
    box.up(changed(box.plan(worker="steps:8:0.5"), "tiny.aggregated.0", start_deadline_s=2.9))
    assert time.monotonic() - began > 2.9


def test_a_silent_child_runs_out_of_its_start_deadline(box: BoxUnderTest) -> None:
    error = refused(box, changed(box.plan(worker="silent"), "tiny.aggregated.0", start_deadline_s=0.5))
    assert error.code == 4
    assert "tiny.aggregated.0: no progress for 0.5 s" in error.what


def test_processes_wait_for_those_they_come_after(box: BoxUnderTest) -> None:
    plan = changed(box.plan(worker="steps:3:0.2"), "router", after=("tiny.aggregated.0",))
    launched = box.up(plan)
    for snapshot in launched.snapshots:
        states = {process.name: process.state for process in snapshot.processes}
        assert states["router"] == "planned" or states["tiny.aggregated.0"] == "ready"


def test_a_permanent_failure_ends_the_start_at_once_with_the_last_lines_of_that_process(box: BoxUnderTest) -> None:
    error = refused(box, box.plan(worker="log:the-last-straw fail:permanent", router="log:not-this"))
    assert error.code == 1
    assert "tiny.aggregated.0: it was told to fail" in error.what
    assert error.remedy == "tell it otherwise"
    assert error.details == ("the-last-straw",)


def test_a_failing_start_is_tried_twice(box: BoxUnderTest) -> None:
    error = refused(box, box.plan(worker="log:a-life exit:3"))
    assert "exited with status 3" in error.what
    assert box.log("tiny.aggregated.0").count("a-life") == 2
    assert error.details == ("a-life",), "only the lines of the last life"


def test_a_passing_failure_is_got_over(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="exit-once:1"))
    assert box.process("tiny.aggregated.0").restarts == 1


def test_a_program_that_is_not_there_is_a_permanent_failure(box: BoxUnderTest) -> None:
    error = refused(box, changed(box.plan(), "router", program=("/nowhere/router",)))
    assert "can't be executed: /nowhere/router: No such file" in error.what


def test_a_child_that_breaks_the_protocol_is_ended(box: BoxUnderTest) -> None:
    error = refused(box, box.plan(router="garbage"))
    assert "broke the status protocol" in error.what


def test_a_model_that_does_not_answer_fails_the_start(box: BoxUnderTest) -> None:
    error = refused(box, box.plan(frontend="no-model"))
    assert "model tiny doesn't answer: HTTP 400: no such thing" in error.what


def test_a_taken_port_is_refused_before_anything_starts_and_names_the_holder(box: BoxUnderTest) -> None:
    with socket.create_server(("127.0.0.1", box.port)):
        error = refused(box, box.plan(worker="log:started"))
    assert f"port {box.port} on 127.0.0.1 is taken by" in error.what
    assert f"(pid {os.getpid()})" in error.what
    assert box.log("tiny.aggregated.0") == ""


def test_a_second_supervisor_says_who_holds_the_run_dir_and_leaves_it_alone(box: BoxUnderTest) -> None:
    first = box.up()
    second = box.launch(box.plan())
    reply = second.result()
    assert isinstance(reply, control.Error)
    assert f"profile fake, supervisor pid {first.process.pid}" in reply.what
    assert second.exit_code() == 1
    assert box.answers()


def test_of_two_at_once_one_wins(box: BoxUnderTest) -> None:
    replies = [launched.result() for launched in [box.launch(box.plan()) for _ in range(2)]]
    assert sorted(type(reply).__name__ for reply in replies) == ["Done", "Error"]
    assert box.answers()


def test_when_the_launcher_goes_away_the_start_is_called_off(box: BoxUnderTest) -> None:
    launched = box.launch(box.plan(worker="daemon silent"))
    eventually(lambda: (box.run_dir.root / "tiny.aggregated.0.daemon").exists(), "the worker has begun")
    launched.channel.close()
    assert launched.exit_code() == 1
    assert box.processes() == []


def test_nothing_starts_for_a_launcher_that_went_before_it_asked(box: BoxUnderTest) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        done = subprocess.run(
            [sys.executable, "-m", "dynamo_box.supervisor", "--launch-fd", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            timeout=DEADLINE_S,
        )
    assert done.returncode == 0
    assert not box.run_dir.root.exists()


@pytest.mark.parametrize("junk", ["lock", "control.sock", "router.sock", "instances/ghost.json", "plan.json"])
def test_a_stale_file_never_blocks_a_start(box: BoxUnderTest, junk: str) -> None:
    box.run_dir.create()
    (box.run_dir.root / junk).write_text('{"pid": 1, "profile": "long gone"}')
    box.up()
    assert not (box.run_dir.instances / "ghost.json").exists()
    assert box.run_dir.plan.stat().st_mode & 0o777 == 0o600


def test_a_worker_gets_its_cores(box: BoxUnderTest) -> None:
    core = max(os.sched_getaffinity(0))
    box.up(changed(box.plan(), "tiny.aggregated.0", cores=(core,)))
    assert box.process("tiny.aggregated.0").info["cores"] == str(core)
