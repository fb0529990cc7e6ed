"""What this process may use of the machine's memory and cores, as its cgroups (v1 and v2) and /proc say now.

A file that can't be read leaves a gap (None), never an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a number near 2**63


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. `used` leaves out the pages of files, which the kernel can read again; `anonymous` is the part of it that
    processes have mapped; `available` is what could be had without swapping.
    """

    total: int | None = None
    available: int | None = None
    used: int | None = None
    anonymous: int | None = None


def memory_use(groups: Cgroups, root: Path = Path("/")) -> MemoryUse:
    """Of the machine, or of the cgroup that allows less. `root` is where /proc and /sys lie."""
    sizes = meminfo(root)
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    used = None if total is None or available is None else max(0, total - available)
    machine = MemoryUse(total, available, used, sizes.get("AnonPages"))
    tightest = groups.tightest_memory()
    if tightest is None or (total is not None and tightest.total is not None and tightest.total >= total):
        tightest = machine
    return MemoryUse(
        total=least(total, tightest.total),
        available=least(available, groups.memory_left()),
        used=tightest.used,
        anonymous=tightest.anonymous,
    )


class Cgroups:
    """The limits of this process's cgroup and of all above it: the tightest one counts. Which group that is, is looked
    up once.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._mount = root / "sys/fs/cgroup"
        self._paths: dict[str, str] = {}
        for line in lines(root / "proc/self/cgroup"):
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            for controller in controllers.split(","):
                self._paths[controller] = path.lstrip("/")

    def memory_limit(self) -> int | None:
        return least(*(limit for limit, _, _ in self._memory()))

    def memory_left(self) -> int | None:
        """What may still be used before something has to be given back."""
        return least(
            *(max(0, limit - _held(group, files, files.page_cache[:1])) for limit, group, files in self._memory())
        )

    def tightest_memory(self) -> MemoryUse | None:
        """Of the group with the lowest limit, None where nothing is limited."""
        tightest = min(self._memory(), key=lambda each: each[0], default=None)
        if tightest is None:
            return None
        limit, group, files = tightest
        return MemoryUse(
            total=limit,
            used=_held(group, files, files.page_cache),
            anonymous=field(group / "memory.stat", files.anonymous),
        )

    def cpu_quota(self) -> float | None:
        """Cores' worth of time that may be used at once."""
        return min((quota for quota, _ in self._cpu_groups()), default=None)

    def cpu_used_s(self) -> float | None:
        """Seconds of a core that the group with the lowest quota has used so far; None without a quota."""
        quotas = sorted(self._cpu_groups(), key=lambda each: each[0])
        if not quotas:
            return None
        group = quotas[0][1]
        microseconds = field(group / "cpu.stat", "usage_usec")
        if microseconds is not None:
            return microseconds / 1e6
        nanoseconds = number(group / "cpuacct.usage")
        return None if nanoseconds is None else nanoseconds / 1e9

    def _cpu_groups(self) -> Iterator[tuple[float, Path]]:
        for group in self._above(""):
            words = next(lines(group / "cpu.max"), "").split()
            if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
                yield int(words[0]) / int(words[1]), group
        for group in self._above("cpu"):
            quota, period = number(group / "cpu.cfs_quota_us"), number(group / "cpu.cfs_period_us")
            if quota is not None and quota > 0 and period:
                yield quota / period, group

    def _memory(self) -> Iterator[tuple[int, Path, _MemoryFiles]]:
        """Each group that limits memory, with its limit."""
        for controller, files in (("", _V2), ("memory", _V1)):
            for group in self._above(controller):
                limit = number(group / files.limit)
                if limit is not None and limit < _UNLIMITED:
                    yield limit, group, files

    def _above(self, controller: str) -> Iterator[Path]:
        """From this process's group to the mount; in a container the path may lie outside what is mounted."""
        path = self._paths.get(controller)
        if path is None:
            return
        top = self._mount / controller
        group = top / path
        while group != top and top in group.parents:
            yield group
            group = group.parent
        yield top


@dataclass(frozen=True)
class _MemoryFiles:
    """Where a version of the controller says what: files of a group, and fields of its memory.stat. `page_cache` are
    those of the page cache, the coldest first.
    """

    limit: str
    used: str
    page_cache: tuple[str, ...]
    anonymous: str


_V2 = _MemoryFiles("memory.max", "memory.current", ("inactive_file", "active_file"), "anon")
_V1 = _MemoryFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"), "total_rss"
)


def _held(group: Path, files: _MemoryFiles, cache: tuple[str, ...]) -> int:
    """Bytes in use in a group without these parts of its page cache."""
    cached = sum(field(group / "memory.stat", name) or 0 for name in cache)
    return max(0, (number(group / files.used) or 0) - cached)


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    sizes: dict[str, int] = {}
    for line in lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            sizes[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return sizes


def least(*values: int | None) -> int | None:
    """The lowest of those that are known."""
    return min((value for value in values if value is not None), default=None)


def field(path: Path, key: str) -> int | None:
    """The number behind `key` in a file of `key number` lines."""
    for line in lines(path):
        words = line.split()
        if len(words) == 2 and words[0] == key and words[1].isdigit():
            return int(words[1])
    return None


def number(path: Path) -> int | None:
    """The number that a file holds."""
    text = next(lines(path), "")
    try:
        return int(text)
    except ValueError:
        return None


def lines(path: Path) -> Iterator[str]:
    """Nothing for a file that can't be read."""
    try:
        yield from path.read_text(errors="replace").splitlines()
    except OSError:
        return
