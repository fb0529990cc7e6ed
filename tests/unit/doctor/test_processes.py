"""Other processes, as /proc shows them to a user who may not see everything."""

from __future__ import annotations

import os
from pathlib import Path

from fake_machine import add_process, put

from dynamo_box.doctor import processes
from dynamo_box.doctor.leftovers import judge_processes
from dynamo_box.doctor.machine import Machine
from dynamo_box.doctor.processes import RUN_ID_VARIABLE, BoxProcess
from dynamo_box.paths import RunDir
from dynamo_box.supervisor import identity

KEY = "0123456789ab"


def test_the_run_id_is_read_as_the_supervisor_writes_it(machine: Machine, tmp_path: Path) -> None:
    run_id = identity.RunId.of_this_process(RunDir(tmp_path))
    assert identity.RUN_ID_VARIABLE == RUN_ID_VARIABLE
    here = Machine(machine.run, machine.home)
    assert processes.start_time(here, os.getpid()) == run_id.start_time
    add_process(machine, 70, "router", environment={RUN_ID_VARIABLE: str(run_id), "DYNBOX_RUN_DIR": str(tmp_path)})
    add_process(machine, run_id.pid, "supervisor", start=run_id.start_time)
    assert processes.box_process(machine, 70) == BoxProcess(70, "router", RunDir(tmp_path).key, True, str(tmp_path))


def test_a_box_is_dead_without_its_supervisor_or_with_its_pid_used_again(machine: Machine) -> None:
    add_process(machine, 10, "supervisor", start=500)
    add_process(machine, 11, "supervisor", start=7, state="Z")
    add_process(machine, 20, "alive", environment={RUN_ID_VARIABLE: f"{KEY}.10.500"})
    add_process(machine, 21, "reused", environment={RUN_ID_VARIABLE: f"{KEY}.10.499"})
    add_process(machine, 22, "zombie", environment={RUN_ID_VARIABLE: f"{KEY}.11.7"})
    add_process(machine, 23, "gone", environment={RUN_ID_VARIABLE: f"{KEY}.12.1"})
    found = {process.name: process.box_alive for process in processes.box_processes(machine)}
    assert found == {"alive": True, "reused": False, "zombie": False, "gone": False}


def test_entries_that_can_not_be_read_are_no_processes_of_a_box(machine: Machine) -> None:
    add_process(machine, 20, "fine", environment={RUN_ID_VARIABLE: f"{KEY}.12.1"})
    (machine.root / "proc/21").mkdir()
    (machine.root / "proc/22/environ").mkdir(parents=True)
    put(machine, "proc/23/environ", f"{RUN_ID_VARIABLE}=nonsense\0")
    put(machine, "proc/24/environ", f"{RUN_ID_VARIABLE}={KEY}.x.y\0no equals sign\0\0")
    put(machine, "proc/25/stat", "25 (odd")
    put(machine, "proc/uptime", "1 1")
    assert [process.pid for process in processes.box_processes(machine)] == [20]
    assert processes.start_time(machine, 25) is None
    assert processes.command(machine, 21) is None
    assert list(processes.open_files(machine, 21)) == []
    assert processes.uid_of(machine, 99) is None


def test_a_machine_without_proc_has_no_processes(machine: Machine) -> None:
    assert processes.box_processes(machine) == []


def test_leftovers_of_this_run_dir_are_ours_to_end_and_others_are_named() -> None:
    alive = BoxProcess(1, "router", KEY, True, "/run/a")
    ours = BoxProcess(2, "worker", KEY, False, "/run/a")
    foreign = BoxProcess(3, "frontend", "f" * 12, False, "/run/my box")
    assert judge_processes([alive], KEY).status == "pass"
    mine = judge_processes([alive, ours, foreign], KEY)
    assert mine.fixable
    assert mine.found == "a dead box left 1 process: worker (pid 2)"
    others = judge_processes([alive, foreign], KEY)
    assert not others.fixable
    assert others.command == "DYNBOX_RUN_DIR='/run/my box' dynbox down"
    many = judge_processes([BoxProcess(pid, "w", KEY, False, None) for pid in range(9)], KEY)
    assert many.found.endswith("and 4 more")
