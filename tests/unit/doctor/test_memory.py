"""RAM, cgroup, shared memory, huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_machine import put, write

from dynamo_box.doctor import memory
from dynamo_box.doctor.finding import Finding, Status
from dynamo_box.doctor.machine import Machine
from dynamo_box.doctor.memory import SharedFile
from dynamo_box.hardware import CpuDevice

GIB = 1 << 30


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_the_memory_of_a_machine(machine: Machine) -> None:
    write(
        machine,
        {
            "proc/meminfo": (
                f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB\nHugePages_Total: 16384\nHugepagesize: 2048 kB\n"
            ),
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        },
    )
    (machine.root / "dev/shm").mkdir(parents=True)
    found = by_name(memory.check(machine))
    assert found["memory"].found == "48.0 GiB available of 64.0 GiB"
    assert found["huge pages"].status is Status.WARN
    assert "sudo tee /sys/kernel/mm/transparent_hugepage/enabled" in found["huge pages"].command
    assert found["reserved pages"].status is Status.WARN
    assert found["reserved pages"].found == "32.0 GiB of 64.0 GiB set aside as huge pages"
    assert "free of" in found["shared memory"].found


def test_a_machine_that_says_nothing(machine: Machine) -> None:
    found = by_name(memory.check(machine))
    assert found["memory"].status is Status.SKIP
    assert found["huge pages"].status is Status.SKIP
    assert found["reserved pages"].status is Status.PASS
    assert found["shared memory"].status is Status.WARN
    assert found["cgroup"].found.startswith("none that is writable")


def test_a_cgroup_that_allows_less_than_the_machine_has_is_named(machine: Machine) -> None:
    write(
        machine,
        {
            "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {60 << 20} kB\n",
            "proc/self/cgroup": "0::/user/box\n",
        },
    )
    put(machine, "sys/fs/cgroup/user/box/memory.max", str(GIB))
    put(machine, "sys/fs/cgroup/user/box/memory.current", str(GIB - (100 << 20)))
    found = by_name(memory.check(machine))["memory"]
    assert found.status is Status.FAIL
    assert found.found == "100 MiB available of 1.0 GiB (a cgroup's limit; the machine has 64.0 GiB)"


@pytest.mark.parametrize(("left", "status"), [(8 * GIB, Status.PASS), (GIB, Status.WARN), (GIB // 4, Status.FAIL)])
def test_little_memory(left: int, status: Status) -> None:
    assert memory.judge_memory(CpuDevice(memory_total=16 * GIB, memory_available=left), 16 * GIB).status is status


def test_the_writable_cgroup_is_where_cgroup2_is_mounted(machine: Machine) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "4:memory:/elsewhere\n0::/box\n",
            "proc/self/mountinfo": "30 1 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n",
        },
    )
    assert memory.writable_cgroup(machine) is None
    group = machine.root / "sys/fs/cgroup/unified/box"
    group.mkdir(parents=True)
    assert memory.writable_cgroup(machine) == group
    assert str(group) in memory.judge_cgroup(group).found


def test_who_fills_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name, size in (("a", 10), ("b", 300_000), ("below/c", 200_000), ("d", 100_000)):
        (tmp_path / name).write_bytes(b"x" * size)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(GIB)
    largest = memory.largest_files(tmp_path)
    assert [file.name for file in largest] == ["b", "below/c", "d"]
    assert largest[0].bytes >= 300_000


@pytest.mark.parametrize(
    ("total", "free", "status", "command"),
    [
        (16 * GIB, 8 * GIB, Status.PASS, ""),
        (64 << 20, 64 << 20, Status.WARN, "sudo mount -o remount"),
        (16 * GIB, 1 << 20, Status.WARN, "ls -lS"),
    ],
)
def test_small_or_full_shared_memory(total: int, free: int, status: Status, command: str) -> None:
    found = memory.judge_shared(total, free, [SharedFile("nccl-x", 5 * GIB, "ann"), SharedFile("tiny", 4, "bob")])
    assert found.status is status
    assert command in found.command
    assert "nccl-x 5.0 GiB of ann" in found.found
    assert "tiny" not in found.found
