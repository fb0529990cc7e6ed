"""Limits, as /proc has them."""

from __future__ import annotations

import os

import pytest
from fake_machine import add_process, put, write

from dynamo_box.doctor import limits
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine

HEAD = "Limit                     Soft Limit           Hard Limit           Units     \n"


def limits_file(memlock: str = "8388608", files: str = "1024", most: str = "524288") -> str:
    return (
        f"{HEAD}Max locked memory         {memlock:<20} {memlock:<20} bytes     \n"
        f"Max open files            {files:<20} {most:<20} files     \n"
        "Max nice priority         0                    0                    \n"
    )


def test_the_limits_of_a_machine_are_found(machine: Machine) -> None:
    write(
        machine,
        {
            "proc/self/limits": limits_file(memlock="unlimited", files="1024"),
            "proc/sys/fs/inotify/max_user_instances": "128\n",
            "proc/sys/fs/inotify/max_user_watches": "65536\n",
        },
    )
    memlock, descriptors, inotify = limits.check(machine)
    assert (memlock.status, memlock.found) == (Status.PASS, "unlimited")
    assert (descriptors.status, descriptors.found) == (Status.WARN, "1,024 (at most 524,288)")
    assert descriptors.command == "ulimit -n 524288"
    assert (inotify.status, inotify.found) == (Status.PASS, "0 of 128 instances in use, 65,536 watches")


def test_a_proc_that_says_nothing_is_no_verdict(machine: Machine) -> None:
    assert {finding.status for finding in limits.check(machine)} == {Status.SKIP}


def test_lines_that_are_no_limits_are_passed_over() -> None:
    parsed = limits.parse_limits([*limits_file().splitlines(), "", "garbage", "Max open" + " " * 30 + "x y z"])
    assert parsed["Max locked memory"] == (8388608, 8388608)
    assert parsed["Max nice priority"] == (0, 0)
    assert len(parsed) == 3


@pytest.mark.parametrize(
    ("limit", "has_gpu", "exempt", "status"),
    [
        ((None, None), True, False, Status.PASS),
        ((8 << 20, 8 << 20), False, False, Status.PASS),
        ((8 << 20, 8 << 20), True, True, Status.PASS),
        ((8 << 20, 8 << 20), True, False, Status.WARN),
    ],
)
def test_locked_memory_matters_where_there_is_a_gpu(
    limit: limits.Limit, has_gpu: bool, exempt: bool, status: Status
) -> None:
    found = limits.judge_memlock(limit, has_gpu=has_gpu, exempt=exempt)
    assert found.status is status
    assert bool(found.command) == (status is Status.WARN)


@pytest.mark.parametrize(("mask", "exempt"), [("000001ffffffffff", True), ("0000000000000000", False)])
def test_the_right_to_lock_memory_lifts_its_limit(machine: Machine, mask: str, exempt: bool) -> None:
    write(machine, {"proc/self/status": f"Name:\tx\nCapEff:\t{mask}\n", "proc/self/limits": limits_file()})
    put(machine, "proc/driver/nvidia/version", "")
    assert (limits.check(machine)[0].status is Status.PASS) == exempt


@pytest.mark.parametrize(
    ("limit", "status", "command"),
    [
        ((None, None), Status.PASS, ""),
        ((4096, 4096), Status.PASS, ""),
        ((1024, None), Status.WARN, "ulimit -n 4096"),
        ((1024, 1024), Status.WARN, "limits.d"),
        ((64, 4096), Status.FAIL, "ulimit -n 4096"),
    ],
)
def test_few_descriptors_are_told_with_what_raises_them(limit: limits.Limit, status: Status, command: str) -> None:
    found = limits.judge_descriptors(limit)
    assert found.status is status
    assert command in found.command


def test_watchers_are_counted_and_unreadable_processes_passed_over(machine: Machine) -> None:
    add_process(machine, 10, "watcher")
    put(machine, "proc/11/fd", "a file in the place of a directory")
    descriptors = machine.root / "proc/10/fd"
    descriptors.mkdir()
    (descriptors / "3").symlink_to("anon_inode:inotify")
    (descriptors / "4").symlink_to("socket:[17]")
    (descriptors / "5").write_text("not a link")
    assert (machine.root / "proc/10").stat().st_uid == os.getuid()
    assert limits.inotify_in_use(machine) == 1


@pytest.mark.parametrize(("used", "status"), [(3, Status.PASS), (6, Status.WARN), (8, Status.FAIL)])
def test_no_instance_left_to_watch_with(used: int, status: Status) -> None:
    found = limits.judge_inotify(8, 1000, used)
    assert found.status is status
    assert ("max_user_instances=512" in found.command) == (status is not Status.PASS)
