"""The machine itself, read once a second: memory, cores, and the part of both that this box accounts for.

What the kernel calls available includes the pages of mapped files, and a model's weights are such a file. They are in
use nonetheless, so the box's own share of them counts as used here. A page that several processes of the box share
counts once: the kernel gives each its proportional part (PSS), which takes it some 15 ms a GiB to add up. That is why
sizes are taken less often than once a second where they cost much. Memory files take room also where nobody maps them,
as the weights of a model that sleeps in host memory: they count in full, by whoever has them open.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.limits import Cgroups, lines, memory_use
from dynamo_box.snapshot import DeviceFigures
from dynamo_box.supervisor.procfs import Proportional, memory_files, proportional_bytes

LARGEST_SHARE = 0.002
"""Of a core, for adding up proportional sizes."""


@dataclass(frozen=True)
class HostSample:
    """`available_bytes` is the kernel's own figure, with mapped files in it."""

    figures: DeviceFigures
    memory_bytes: int | None
    available_bytes: int | None


class HostReader:
    """`root` is where /proc and /sys lie. One thread at a time; blocks for milliseconds."""

    def __init__(self, cores: Iterable[int], root: Path = Path("/")) -> None:
        self._root = root
        self._groups = Cgroups(root)
        self._utilisation = Utilisation(frozenset(cores), self._groups, root)
        self._sizes: dict[int, Proportional] = {}
        self._files: dict[int, dict[int, int]] = {}
        self._sizes_due = float("-inf")

    def read(self, pids: Iterable[int]) -> HostSample:
        """`pids` are the box's processes."""
        memory = memory_use(self._groups, self._root)
        box = self._box_sizes(pids)
        used, other = memory.used, None
        if used is not None and box is not None:
            used += box.file
            if memory.total is not None:
                used = min(used, memory.total)
            if memory.anonymous is not None:
                other = max(0, memory.anonymous - box.anonymous)
        return HostSample(
            DeviceFigures(
                used_bytes=used,
                box_bytes=None if box is None else box.anonymous + box.file + max(box.shared, self._in_files()),
                other_bytes=other,
                utilisation=self._utilisation.since_last_time(),
            ),
            memory.total,
            memory.available,
        )

    def _box_sizes(self, pids: Iterable[int]) -> Proportional | None:
        """As they were lately: adding them up again waits until it has become a small share of the time. What has ended
        meanwhile holds nothing any more.
        """
        present = set(pids)
        self._sizes = {pid: sizes for pid, sizes in self._sizes.items() if pid in present}
        self._files = {pid: files for pid, files in self._files.items() if pid in present}
        is_due = time.monotonic() >= self._sizes_due
        began = time.thread_time()
        for pid in present if is_due else present - self._sizes.keys():
            if (sizes := proportional_bytes(pid, self._root)) is not None:
                self._sizes[pid] = sizes
                self._files[pid] = memory_files(pid, self._root)
        if is_due:
            self._sizes_due = time.monotonic() + (time.thread_time() - began) / LARGEST_SHARE
        return sum(self._sizes.values(), Proportional()) if self._sizes else None

    def _in_files(self) -> int:
        """Bytes of memory files, each once, however many have it open. What else is shared is seldom and small."""
        return sum({inode: size for files in self._files.values() for inode, size in files.items()}.values())


class Utilisation:
    """Busy share of the cores that this process may use; of its quota of them, if that is what runs out first."""

    def __init__(self, cores: frozenset[int], groups: Cgroups, root: Path = Path("/")) -> None:
        self._cores = cores
        self._groups = groups
        self._root = root
        self._last: tuple[float, float, float | None] | None = None
        """Time that passed on the cores, the busy part of it, and seconds of a quota that were used."""
        self._last_at = 0.0

    def since_last_time(self) -> float | None:
        """0 to 1; None the first time, and where the kernel doesn't say."""
        now = time.monotonic()
        passed, busy = self._core_times()
        quota, used_s = self._groups.cpu_quota(), self._groups.cpu_used_s()
        last, last_at = self._last, self._last_at
        self._last, self._last_at = (passed, busy, used_s), now
        if last is None or passed <= last[0]:
            return None
        share = (busy - last[1]) / (passed - last[0])
        if quota is not None and used_s is not None and last[2] is not None and now > last_at:
            share = max(share, (used_s - last[2]) / (quota * (now - last_at)))
        return round(min(1.0, max(0.0, share)), 3)

    def _core_times(self) -> tuple[float, float]:
        """(all, busy) ticks of the cores together. Waiting for a disk is idle; guests are in user time already."""
        passed = busy = 0
        for line in lines(self._root / "proc/stat"):
            name, *words = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._cores:
                user, nice, system, idle, waiting, *rest = (int(word) for word in words[:8])
                passed += user + nice + system + idle + waiting + sum(rest)
                busy += user + nice + system + sum(rest)
        return passed, busy
