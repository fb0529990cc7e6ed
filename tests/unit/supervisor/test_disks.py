"""The file systems that a box writes to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamo_box.supervisor import disks
from dynamo_box.supervisor.disks import DiskReader, directory_bytes, mount_point


def test_directories_of_one_file_system_are_one_disk(tmp_path: Path) -> None:
    (tmp_path / "models/a").mkdir(parents=True)
    (tmp_path / "models/a/weights").write_bytes(os.urandom(1 << 20))
    (tmp_path / "models/again").hardlink_to(tmp_path / "models/a/weights")
    (tmp_path / "models/elsewhere").symlink_to("/")
    (disk,) = DiskReader({"models": tmp_path / "models", "logs": tmp_path / "logs"}).read()
    assert disk.purpose == "models, logs"
    assert Path(disk.path) == mount_point(tmp_path)
    assert os.path.ismount(disk.path) or disk.path == "/"
    assert 0 <= disk.free_bytes < disk.total_bytes
    assert disk.box_bytes is not None
    assert 1 << 20 <= disk.box_bytes < 3 << 19


def test_who_knows_what_a_directory_takes_is_asked(tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir()
    (tmp_path / "tier/block").write_bytes(b"not counted")
    known: list[int | None] = [7, 9, None]
    reader = DiskReader(
        {"models": tmp_path / "models", "KV tier": tmp_path / "tier"}, {"KV tier": lambda: known.pop(0)}
    )
    assert [reader.read()[0].box_bytes for _ in range(3)] == [7, 9, None], "every time, since it costs nothing"


def test_two_file_systems_are_two_disks(tmp_path: Path) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("only one file system to write to")
    found = DiskReader({"models": tmp_path, "logs": Path("/dev/shm/dynbox-test/logs")}).read()
    assert [(disk.purpose, disk.path) for disk in found] == [
        ("models", str(mount_point(tmp_path))),
        ("logs", "/dev/shm"),
    ]


def test_a_directory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert directory_bytes(tmp_path / "nothing") == 0


def test_of_a_directory_with_too_many_files_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "MAX_ENTRIES", 5)
    for number in range(6):
        (tmp_path / str(number)).touch()
    assert directory_bytes(tmp_path) is None
    (disk,) = DiskReader({"models": tmp_path}).read()
    assert disk.box_bytes is None
