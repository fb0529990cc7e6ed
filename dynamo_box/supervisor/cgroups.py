"""A cgroup a process of the box, where a cgroup v2 is writable: `cgroup.kill` gets what no signal walk can
miss.

Layout: `<our own cgroup>/dynbox.<run id>/<process>`. No controller is enabled, so nothing else changes.
Without a writable cgroup v2 everything here is silently absent: guards and sweep do the work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from dynamo_box.supervisor.identity import RunId

PREFIX = "dynbox."


class BoxCgroup:
    """The box's directory in the cgroup tree; made at start, removed at the end."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def create(cls, run_id: RunId) -> BoxCgroup | None:
        """None where there is no cgroup v2, no right to make one, or no cgroup.kill (Linux before 5.14)."""
        parent = _own_cgroup()
        if parent is None:
            return None
        root = parent / f"{PREFIX}{run_id}"
        try:
            root.mkdir(exist_ok=True)
        except OSError:
            return None
        if not (root / "cgroup.kill").exists():
            _remove(root)
            return None
        return cls(root)

    def join_path(self, process: str) -> str:
        """A directory for the process's program to join; "" when it can't be made."""
        path = self._root / process
        try:
            path.mkdir(exist_ok=True)
        except OSError:
            return ""
        return str(path)

    def remove(self) -> None:
        """Remove the directories; those that still hold a process stay for the next sweep."""
        for path in self._root.glob("*/"):
            _remove(path)
        _remove(self._root)


def members(wanted: Callable[[RunId], bool], process: str | None = None) -> set[int]:
    """Who is in the cgroups of the boxes whose id is wanted (in that of one process of theirs)."""
    found: set[int] = set()
    for path in _process_cgroups(wanted, process):
        with contextlib.suppress(OSError):  # it has just been removed
            found.update(map(int, (path / "cgroup.procs").read_text().split()))
    return found


def kill(wanted: Callable[[RunId], bool], process: str | None = None) -> None:
    """KILL all of them, with whatever they fork meanwhile."""
    for path in _process_cgroups(wanted, process):
        with contextlib.suppress(OSError):  # it has just been removed
            (path / "cgroup.kill").write_text("1")


def remove_empty(wanted: Callable[[RunId], bool]) -> None:
    """Remove cgroups of boxes whose id is wanted; the kernel refuses where somebody still is."""
    for root in _box_cgroups(wanted):
        BoxCgroup(root).remove()


def _box_cgroups(wanted: Callable[[RunId], bool]) -> list[Path]:
    parent = _own_cgroup()
    if parent is None:
        return []
    ids = {path: RunId.parse(path.name.removeprefix(PREFIX)) for path in parent.glob(f"{PREFIX}*/")}
    return [path for path, run_id in ids.items() if run_id is not None and wanted(run_id)]


def _process_cgroups(wanted: Callable[[RunId], bool], process: str | None) -> list[Path]:
    return [path for root in _box_cgroups(wanted) for path in root.glob("*/") if process in (None, path.name)]


def _own_cgroup() -> Path | None:
    """Where this process is in the cgroup v2 tree, as a directory; None without one."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    inside = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    for mount in mounts:
        fields, _, kind = mount.partition(" - ")
        if inside is not None and kind.startswith("cgroup2 "):
            path = Path(fields.split()[4]) / inside.lstrip("/")
            return path if os.access(path, os.W_OK) else None
    return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # absent, or still populated
        path.rmdir()
