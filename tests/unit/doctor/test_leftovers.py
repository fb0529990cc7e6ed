"""What dead boxes and pulls left, and the mending of it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from fake_machine import add_process

from dynamo_box.doctor import box, leftovers, mend
from dynamo_box.doctor.finding import Finding, Status
from dynamo_box.doctor.leftovers import LogDirectory
from dynamo_box.doctor.machine import Machine
from dynamo_box.paths import RunDir, home, run_dir
from dynamo_box.profile.store import ModelStore

DAY_S = 86400.0


@pytest.fixture
def here(box_env: Any) -> Machine:
    """The real /proc, with a run dir and a home of this test's own."""
    return Machine(run_dir(), home())


def leave_files(machine: Machine) -> None:
    machine.run.create()
    machine.run.lock.write_text('{"pid": 4000000, "profile": "smollm2", "run_id": "x.1.2"}')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(machine.run.router_socket))
    (machine.run.instances / "tiny.aggregated.0.json").write_text("{}")
    (machine.run.instances / ".tmp_tiny.aggregated.1.77").write_text("")


def check(machine: Machine) -> dict[str, Finding]:
    looks = (leftovers.check_run_dir, leftovers.check_processes, leftovers.check_pulls, leftovers.check_logs)
    return {finding.name: finding for look in looks for finding in look(machine)}


def test_a_clean_machine_has_nothing_to_mend(here: Machine) -> None:
    found = check(here)
    assert {finding.status for finding in found.values()} <= {Status.PASS, Status.SKIP, Status.WARN}
    assert not any(finding.fixable for finding in found.values())
    assert mend.mend(here, found.values()) == mend.Mended()
    assert not here.run.root.exists(), "looking leaves nothing"
    assert not here.home.models.exists()


def test_files_of_a_dead_box_are_found_and_removed(here: Machine) -> None:
    leave_files(here)
    found = check(here)
    assert found["run dir"].fixable
    assert "profile smollm2, supervisor pid 4000000) left 3 files" in found["run dir"].found
    mended = mend.mend(here, found.values())
    assert mended.left == []
    assert any("removed 3 sockets and instance files" in deed for deed in mended.done)
    assert any("supervisor 4000000" in deed for deed in mended.done)
    assert check(here)["run dir"].status is Status.PASS


def test_a_run_dir_that_is_held_is_left_alone(here: Machine) -> None:
    leave_files(here)
    stale = check(here)
    with here.run.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check(here)["run dir"].status is Status.PASS
        mended = mend.mend(here, stale.values())
    assert mended.done == []
    assert "a box holds it" in mended.left[0]
    assert here.run.router_socket.exists()


def test_a_run_dir_of_somebody_else_is_a_failure(machine: Machine) -> None:
    machine.run.root.symlink_to(machine.root.parent)
    (found,) = leftovers.check_run_dir(machine)
    assert (found.status, found.found) == (Status.FAIL, f"{machine.run.root} is no directory, but a link")
    assert "DYNBOX_RUN_DIR" in found.command


def test_a_run_dir_that_can_not_be_is_a_failure_and_the_box_is_looked_at_nonetheless(machine: Machine) -> None:
    file = machine.root.parent / "file"
    file.touch()
    for root, why in ((file, "is no directory, but a file"), (file / "below", ": Not a directory")):
        elsewhere = Machine(RunDir(root), machine.home, machine.root)
        (found,) = leftovers.check_run_dir(elsewhere)
        assert (found.status, found.found) == (Status.FAIL, f"{root}{' ' * (root == file)}{why}")
        assert [finding.name for finding in box.check(elsewhere)] == ["box", "port"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory that belongs to somebody else")
def test_a_run_dir_says_whose_it_is(machine: Machine) -> None:
    machine.run.create()
    os.chown(machine.run.root, 12345, 12345)
    (found,) = leftovers.check_run_dir(machine)
    assert found.found == f"{machine.run.root} belongs to uid 12345"


def test_a_pull_that_was_cut_short_is_found_and_removed(here: Machine) -> None:
    store = ModelStore(here.home.models)
    partial = store.partial_path("tiny", "4000000")
    (partial / "scratch").mkdir(parents=True)
    (partial / "scratch/model.gguf").write_bytes(b"x" * 2048)
    found = check(here)["pulls"]
    assert found.fixable
    assert "2.0 KiB" in found.found
    mended = mend.mend(here, [found])
    assert mended.done == [f"removed {partial} (2.0 KiB)"]
    assert not partial.exists()
    assert check(here)["pulls"].status is Status.PASS


def test_a_pull_that_runs_is_left_alone(here: Machine) -> None:
    store = ModelStore(here.home.models)
    running, dead = store.partial_path("running", "1"), store.partial_path("dead", "1")
    running.mkdir(parents=True)
    dead.mkdir()
    with store.lock("running"):
        found = check(here)["pulls"]
        assert "dead" in found.found
        assert "running" not in found.found
        mended = mend.mend(here, [found])
    assert running.exists()
    assert not dead.exists()
    assert mended.left == [f"{running}: that pull is running"]


def test_one_that_can_not_be_locked_does_not_keep_the_others(here: Machine) -> None:
    store = ModelStore(here.home.models)
    (here.home.models / ".lock-a").mkdir(parents=True)
    locked, dead = store.partial_path("a", "1"), store.partial_path("b", "1")
    locked.mkdir()
    dead.mkdir()
    mended = mend.mend(here, [check(here)["pulls"]])
    assert (locked.exists(), dead.exists()) == (True, False)
    assert mended.left == [f"{locked}: can't write to the model store {here.home.models}: Is a directory"]


def test_a_name_that_no_pull_makes_is_left_to_its_maker(here: Machine) -> None:
    odd = here.home.models / ".partial-what is this"
    odd.mkdir(parents=True)
    found = check(here)["pulls"]
    assert (found.status, found.fixable) == (Status.WARN, False)
    assert found.command == f"rm -r '{odd}'"
    ModelStore(here.home.models).partial_path("dead", "1").mkdir()
    mended = mend.mend(here, [check(here)["pulls"]])
    assert odd.exists()
    assert mended.left == [f"{odd}: no pull makes such a name"]


def test_a_link_in_the_place_of_a_pull_loses_only_itself(here: Machine, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("")
    here.home.models.mkdir(parents=True)
    ModelStore(here.home.models).partial_path("dead", "1").symlink_to(precious)
    assert mend.mend(here, [check(here)["pulls"]]).done
    assert (precious / "file").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file that belongs to somebody else")
def test_what_belongs_to_somebody_else_is_left(here: Machine) -> None:
    partial = ModelStore(here.home.models).partial_path("dead", "1")
    partial.mkdir(parents=True)
    os.chown(partial, 12345, 12345)
    mended = mend.mend(here, [check(here)["pulls"]])
    assert partial.exists()
    assert mended.left == [f"{partial}: it belongs to another user"]


def test_old_logs_are_told_when_they_are_large(machine: Machine) -> None:
    now = time.time()
    old = LogDirectory(Path("/logs/a b"), 300 << 20, now - 40 * DAY_S)
    recent = LogDirectory(Path("/logs/c"), 900 << 20, now - 2 * DAY_S)
    small = LogDirectory(Path("/logs/d"), 1 << 20, now - 40 * DAY_S)
    assert leftovers.judge_logs([recent, small], now).status is Status.PASS
    found = leftovers.judge_logs([old, recent], now)
    assert found.status is Status.WARN
    assert found.command == "rm -r '/logs/a b'"
    assert not found.fixable


def test_logs_of_live_boxes_do_not_count(machine: Machine) -> None:
    keys = ["a" * 12, "b" * 12, machine.run.key, "not-a-key"]
    for key in keys:
        directory = machine.home.logs / key
        directory.mkdir(parents=True)
        (directory / "router.log").write_text("x" * 100)
        os.utime(directory / "router.log", (5, 5))
    add_process(machine, 10, "supervisor", start=500)
    add_process(machine, 20, "router", environment={"DYNBOX_RUN_ID": f"{'a' * 12}.10.500"})
    (read,) = leftovers.read_log_directories(machine.home.logs, {"a" * 12, machine.run.key})
    assert read == LogDirectory(machine.home.logs / ("b" * 12), 100, 5.0)
    assert leftovers.check_logs(machine)[0].found == "100 B of other run dirs"


# weights that slept on disk


def leave_snapshot(machine: Machine, key: str) -> Path:
    folder = machine.home.snapshots / key / "smollm2"
    folder.mkdir(parents=True)
    (folder / "shard-0").write_bytes(bytes(3 << 20))
    return machine.home.snapshots / key


def test_snapshots_of_dead_boxes_are_named_and_removed(here: Machine) -> None:
    mine, other = leave_snapshot(here, here.run.key), leave_snapshot(here, "0123456789ab")
    stranger = leave_snapshot(here, "not-a-run-dir")
    (finding,) = leftovers.check_snapshots(here)
    assert finding.fixable
    assert finding.found.startswith("6.0 MiB of weights that slept in 2 dead boxes")
    done = mend.mend(here, [finding]).done
    assert [line.split(" (")[0] for line in done] == [f"removed {path}" for path in sorted((mine, other))]
    assert stranger.exists(), "no run dir is called like that"
    (finding,) = leftovers.check_snapshots(here)
    assert finding.status is Status.PASS


def test_snapshots_of_live_boxes_stay(here: Machine, tmp_path: Path) -> None:
    mine = leave_snapshot(here, here.run.key)
    elsewhere = Machine(here.run, here.home, tmp_path / "machine")
    theirs = leave_snapshot(here, "0123456789ab")
    add_process(elsewhere, 70, "supervisor", start=7)
    add_process(elsewhere, 71, "worker", environment={"DYNBOX_RUN_ID": "0123456789ab.70.7"})
    here.run.create()
    with open(here.run.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (finding,) = leftovers.check_snapshots(elsewhere)
        assert not finding.fixable
        mended = mend.mend(elsewhere, [finding_of_snapshots()])
    assert mended.done == []
    assert mine.exists()
    assert theirs.exists()


def finding_of_snapshots() -> Finding:
    """From a report that is older than the boxes that live now."""
    return leftovers.judge_snapshots([leftovers.Snapshots(Path("/old"), 1)])
