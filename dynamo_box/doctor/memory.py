"""Main memory and its cgroup, shared memory, huge pages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dynamo_box import wording
from dynamo_box.doctor.finding import Finding, failed, passed, skipped, warned
from dynamo_box.doctor.machine import Machine, user_name
from dynamo_box.hardware import CpuDevice, detect_cpu
from dynamo_box.limits import meminfo

MEMORY_LEAST = 512 << 20
MEMORY_TIGHT = 2 << 30
SHARED_TIGHT = 1 << 30
SHARED_FREE_TIGHT = 64 << 20
LARGE_FILE = 64 << 20
RESERVED_SHARE = 0.1

_THP = "sys/kernel/mm/transparent_hugepage/enabled"
_SHARED_WHY = "NCCL and torch exchange tensors between processes through it"
_LISTED = 3
_SCANNED = 10_000


@dataclass(frozen=True)
class SharedFile:
    name: str
    bytes: int
    user: str


def check(machine: Machine) -> list[Finding]:
    sizes = meminfo(machine.root)
    ram = sizes.get("MemTotal")
    return [
        judge_memory(detect_cpu(machine.root), ram),
        judge_cgroup(writable_cgroup(machine)),
        check_shared(machine),
        judge_transparent(machine.text(_THP)),
        judge_reserved(sizes.get("HugePages_Total", 0) * sizes.get("Hugepagesize", 0), ram),
    ]


def judge_memory(cpu: CpuDevice, ram: int | None) -> Finding:
    """`ram` is what the machine has; the cpu device says what this process may use of it."""
    total, left = cpu.memory_total, cpu.memory_available
    if total is None or left is None:
        return skipped("memory", "/proc/meminfo doesn't say")
    known = f"{wording.size(left)} available of {wording.size(total)}"
    if ram is not None and total < ram:
        known += f" (a cgroup's limit; the machine has {wording.size(ram)})"
    if left >= MEMORY_TIGHT:
        return passed("memory", known)
    why = "weights and KV cache of models on the CPU live there, and so do the box's processes (about 500 MiB)"
    return (failed if left < MEMORY_LEAST else warned)("memory", known, why, "ps axu --sort -rss | head")


def writable_cgroup(machine: Machine) -> Path | None:
    """This process's group in cgroup v2, if groups may be made below it."""
    inside = next((line[3:] for line in machine.lines("proc/self/cgroup") if line.startswith("0::")), None)
    for mount in machine.lines("proc/self/mountinfo"):
        fields, _, kind = mount.partition(" - ")
        if inside is not None and kind.startswith("cgroup2 "):
            path = machine.root / fields.split()[4].lstrip("/") / inside.lstrip("/")
            return path if os.access(path, os.W_OK) else None
    return None


def judge_cgroup(group: Path | None) -> Finding:
    if group is None:
        return passed("cgroup", "none that is writable; guards and the sweep end what a box leaves")
    return passed("cgroup", f"{group} is writable; the kernel ends a box's processes at once")


def check_shared(machine: Machine) -> Finding:
    directory = machine.root / "dev/shm"
    try:
        status = os.statvfs(directory)
    except OSError as error:
        return warned("shared memory", f"{directory}: {error.strerror}", _SHARED_WHY)
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    return judge_shared(total, free, largest_files(directory))


def judge_shared(total: int, free: int, largest: list[SharedFile]) -> Finding:
    known = f"{wording.size(free)} free of {wording.size(total)}"
    if large := [file for file in largest if file.bytes >= LARGE_FILE]:
        known += "; " + ", ".join(f"{file.name} {wording.size(file.bytes)} of {file.user}" for file in large)
    if total < SHARED_TIGHT:
        return warned("shared memory", known, _SHARED_WHY, "sudo mount -o remount,size=8G /dev/shm")
    if free < SHARED_FREE_TIGHT:
        return warned("shared memory", known, _SHARED_WHY, "ls -lS /dev/shm")
    return passed("shared memory", known)


def largest_files(directory: Path) -> list[SharedFile]:
    """The few largest, by what they hold and not what they claim."""
    found = []
    seen = 0
    for folder, _, names in os.walk(directory):
        for name in names[: _SCANNED - seen]:
            seen += 1
            path = Path(folder, name)
            try:
                info = path.lstat()
            except OSError:
                continue  # removed since
            found.append((info.st_blocks * 512, str(path.relative_to(directory)), info.st_uid))
    largest = sorted(found, reverse=True)[:_LISTED]
    return [SharedFile(name, size, user_name(uid)) for size, name, uid in largest]


def judge_transparent(text: str | None) -> Finding:
    """`text` is the kernel's list with brackets around the mode that holds."""
    if text is None or "[" not in text:
        return skipped("huge pages", "the kernel has no transparent ones")
    mode = text.partition("[")[2].partition("]")[0]
    if mode != "never":
        return passed("huge pages", mode)
    return warned(
        "huge pages",
        mode,
        "weights on the CPU are read faster through large pages",
        f"echo madvise | sudo tee /{_THP}",
    )


def judge_reserved(reserved: int, ram: int | None) -> Finding:
    if not reserved or not ram:
        return passed("reserved pages", "none")
    known = f"{wording.size(reserved)} of {wording.size(ram)} set aside as huge pages"
    if reserved < RESERVED_SHARE * ram:
        return passed("reserved pages", known)
    return warned("reserved pages", known, "no process of a box uses these", "sudo sysctl vm.nr_hugepages=0")
