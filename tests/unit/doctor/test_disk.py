"""Room on the disks, and their speed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dynamo_box.doctor import disk
from dynamo_box.doctor.disk import Room, Speed
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine

GIB = 1 << 30


def test_directories_on_one_disk_are_one_line(machine: Machine, tmp_path: Path) -> None:
    (found,) = disk.check_space(machine)
    assert found.name == "disk space"
    assert "for models, logs, run dir, KV tier" in found.found
    assert not machine.home.models.exists(), "looking makes no directories"


@pytest.mark.parametrize(
    ("purposes", "free", "inodes", "status"),
    [
        (("models", "logs"), 50 * GIB, None, Status.PASS),
        (("models",), GIB, 10**6, Status.WARN),
        (("models",), GIB // 16, 10**6, Status.FAIL),
        (("run dir",), GIB, 10**6, Status.PASS),
        (("run dir",), GIB // 16, 10**6, Status.FAIL),
        (("models",), 50 * GIB, 3, Status.FAIL),
    ],
)
def test_little_room(purposes: tuple[str, ...], free: int, inodes: int | None, status: Status) -> None:
    found = disk.judge_room(Room(Path("/x"), purposes, free, 100 * GIB, inodes))
    assert found.status is status
    assert bool(found.command) == (status is not Status.PASS)


def test_the_speed_of_a_real_disk_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    speed = disk.measure(tmp_path)
    assert speed.write > 0
    assert speed.read is None or speed.read > 0
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_can_not_be_passed_reading_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(disk.fcntl, "fcntl", refuse)
    speed = disk.measure(tmp_path)
    assert speed.read is None
    assert disk.judge_speed(speed).status is Status.PASS


def test_a_slow_disk_is_a_warning() -> None:
    assert disk.judge_speed(Speed(5e8, 2e9)).found == "write 477 MiB/s, read 1.9 GiB/s"
    assert disk.judge_speed(Speed(5e8, 2e7)).status is Status.WARN


def test_a_home_that_is_not_there_is_not_made_and_one_that_is_full_is_a_failure(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disk.check_speed(machine)[0].status is Status.SKIP
    machine.home.models.mkdir(parents=True)
    assert disk.check_speed(machine)[0].status is not Status.FAIL

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "pwrite", full)
    found = disk.check_speed(machine)[0]
    assert found.status is Status.FAIL
    assert "No space left" in found.found
