"""The machine as the box reads it: this one, and made-up ones from files as Linux writes them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from dynamo_box.limits import Cgroups
from dynamo_box.supervisor import host
from dynamo_box.supervisor.host import HostReader, Utilisation
from dynamo_box.supervisor.procfs import Proportional, proportional_bytes

MIB = 1 << 20


def rollup(root: Path, pid: int, *, anonymous: int = 0, file: int = 0, shared: int = 0) -> None:
    (root / f"proc/{pid}").mkdir(parents=True, exist_ok=True)
    (root / f"proc/{pid}/smaps_rollup").write_text(
        "5581c7c1d000-7ffc8e9f2000 ---p 00000000 00:00 0                          [rollup]\n"
        f"Rss:              999999 kB\nPss:              {anonymous + file + shared} kB\nPss_Dirty:             0 kB\n"
        f"Pss_Anon:         {anonymous} kB\nPss_File:         {file} kB\nPss_Shmem:             {shared} kB\n"
    )


def meminfo(root: Path, **sizes: int) -> None:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text("".join(f"{name}:  {size} kB\n" for name, size in sizes.items()))


def ticks(root: Path, *cores: tuple[int, int]) -> None:
    """(busy, idle) ticks by core."""
    lines = [f"cpu{number} {busy} 0 0 {idle} 0 0 0 0 0 0\n" for number, (busy, idle) in enumerate(cores)]
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/stat").write_text("cpu  1 2 3 4 5 6 7 8 9 10\n" + "".join(lines) + "intr 5\n")


def test_this_machine() -> None:
    sample = HostReader(os.sched_getaffinity(0)).read([os.getpid()])
    figures = sample.figures
    assert figures.used_bytes is not None and figures.box_bytes is not None and sample.memory_bytes is not None
    assert 0 < figures.box_bytes < figures.used_bytes <= sample.memory_bytes
    assert sample.available_bytes is not None


def test_mapped_files_of_the_box_are_in_use_and_shared_pages_count_once(tmp_path: Path) -> None:
    meminfo(tmp_path, MemTotal=1000, MemAvailable=700, AnonPages=250)
    rollup(tmp_path, 11, anonymous=60, file=100)
    rollup(tmp_path, 12, anonymous=40, file=100)
    sample = HostReader((0,), tmp_path).read([11, 12, 13])
    figures = sample.figures
    assert figures.used_bytes == (300 + 200) * 1024
    assert figures.box_bytes == 300 * 1024
    assert figures.other_bytes == 150 * 1024
    assert (sample.memory_bytes, sample.available_bytes) == (1000 * 1024, 700 * 1024)


def test_sizes_are_not_added_up_more_often_than_they_are_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(tmp_path, MemTotal=1000, MemAvailable=700)
    for allowed, expected in ((1e-9, 100), (float("inf"), 200)):
        monkeypatch.setattr(host, "LARGEST_SHARE", allowed)
        reader = HostReader((0,), tmp_path)
        rollup(tmp_path, 11, file=100)
        reader.read([11])
        rollup(tmp_path, 11, file=200)
        assert reader.read([11]).figures.box_bytes == expected * 1024


def test_what_has_ended_holds_nothing_and_what_is_new_counts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "LARGEST_SHARE", 1e-9)
    meminfo(tmp_path, MemTotal=1000, MemAvailable=700)
    for pid in (11, 12, 13):
        rollup(tmp_path, pid, file=pid)
    reader = HostReader((0,), tmp_path)
    seen = [reader.read(pids).figures.box_bytes for pids in ([11, 12], [12], [12, 13], [])]
    assert seen == [23 * 1024, 12 * 1024, 25 * 1024, None]


def test_what_the_kernel_does_not_tell_is_none(tmp_path: Path) -> None:
    sample = HostReader((0,), tmp_path).read([11])
    figures = sample.figures
    assert (sample.memory_bytes, sample.available_bytes) == (None, None)
    assert (figures.used_bytes, figures.box_bytes, figures.other_bytes, figures.utilisation) == (None, None, None, None)


def test_two_processes_share_the_pages_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 * MIB))
    before = proportional_bytes(os.getpid())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        sum(mapped[offset] for offset in range(0, len(mapped), mmap.PAGESIZE))
        after = proportional_bytes(os.getpid())
    assert before is not None and after is not None
    assert after.file - before.file >= 7 * MIB
    assert proportional_bytes(2**22 + 1) is None


def test_memory_files_that_nobody_maps_count_once_whoever_has_them_open(tmp_path: Path) -> None:
    meminfo(tmp_path, MemTotal=1 << 20, MemAvailable=1 << 19, AnonPages=100)
    for pid in (11, 12):
        rollup(tmp_path, pid, anonymous=50, file=10)
        (tmp_path / f"proc/{pid}/fd").symlink_to(f"/proc/{os.getpid()}/fd")

    def box_bytes() -> int:
        size = HostReader((0,), tmp_path).read([11, 12]).figures.box_bytes
        assert size is not None
        return size

    before = box_bytes()
    assert before >= 2 * 60 * 1024
    with open(os.memfd_create("dynbox:asleep"), "wb") as asleep:
        os.posix_fallocate(asleep.fileno(), 0, 8 * MIB)
        assert box_bytes() == before + 8 * MIB
    assert box_bytes() == before


def test_shared_memory_without_a_file_counts_too(tmp_path: Path) -> None:
    meminfo(tmp_path, MemTotal=1000, MemAvailable=700)
    rollup(tmp_path, 11, anonymous=50, shared=100)
    assert HostReader((0,), tmp_path).read([11]).figures.box_bytes == 150 * 1024


def test_sizes_add_up() -> None:
    assert Proportional(3, 1, 2) + Proportional(30, 10, 20) == Proportional(33, 11, 22)


def test_utilisation_is_of_our_own_cores(tmp_path: Path) -> None:
    meter = Utilisation(frozenset({0, 1}), Cgroups(tmp_path), tmp_path)
    ticks(tmp_path, (100, 100), (100, 100), (100, 100))
    assert meter.since_last_time() is None
    ticks(tmp_path, (150, 150), (200, 100), (900, 100))
    assert meter.since_last_time() == 0.75
    assert meter.since_last_time() is None, "no time has passed"


def test_a_quota_that_is_used_up_is_full_use(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/box"
    group.mkdir(parents=True)
    ticks(tmp_path, (0, 1000))
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (group / "cpu.max").write_text("50000 100000\n")
    (group / "cpu.stat").write_text("usage_usec 0\n")
    meter = Utilisation(frozenset({0}), Cgroups(tmp_path), tmp_path)
    meter.since_last_time()
    ticks(tmp_path, (10, 1090))
    (group / "cpu.stat").write_text("usage_usec 900000000000\n")
    assert meter.since_last_time() == 1.0
