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

    def kill(self, process: str) -> None:
        """KILL everything that is in the process's cgroup."""
        _kill(self._root / process)

    def remove(self) -> None:
        """Remove the directories; those that still hold a process stay for the next sweep."""
        for path in self._root.glob("*/"):
            _remove(path)
        _remove(self._root)


def kill_leftovers(wanted: Callable[[RunId], bool]) -> None:
    """KILL and remove the cgroups of boxes whose id is wanted."""
    parent = _own_cgroup()
    if parent is None:
        return
    for root in parent.glob(f"{PREFIX}*"):
        run_id = RunId.parse(root.name.removeprefix(PREFIX))
        if run_id is not None and wanted(run_id):
            _kill(root)
            BoxCgroup(root).remove()


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


def _kill(path: Path) -> None:
    with contextlib.suppress(OSError):  # absent, or not ours any more
        (path / "cgroup.kill").write_text("1")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # absent, or still populated
        path.rmdir()
