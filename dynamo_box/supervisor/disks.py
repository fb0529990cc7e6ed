"""The file systems that the box writes to: how full they are, and how much of that is ours.

A dead network mount blocks whoever asks about it, so none of this belongs on an event loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dynamo_box.snapshot import DiskInfo

COUNT_EVERY_S = 60.0
MAX_ENTRIES = 100_000
"""Files and directories that are looked at to add up a directory's size; of a larger one nothing is said."""


class DiskReader:
    """`directories` by what they are for, such as "models"; they need not exist yet. `sizes` asks somebody who knows
    for the bytes in one of them, in place of a look at every file. One thread at a time.
    """

    def __init__(
        self, directories: Mapping[str, Path], sizes: Mapping[str, Callable[[], int | None]] | None = None
    ) -> None:
        self._directories = dict(directories)
        self._ask = dict(sizes or {})
        self._sizes: dict[str, int | None] = {}
        self._count_at = float("-inf")

    def read(self) -> tuple[DiskInfo, ...]:
        """One entry for each file system, in the order of the directories."""
        if time.monotonic() >= self._count_at:
            counted = {purpose: path for purpose, path in self._directories.items() if purpose not in self._ask}
            self._sizes = {purpose: directory_bytes(path) for purpose, path in counted.items()}
            self._count_at = time.monotonic() + COUNT_EVERY_S
        self._sizes |= {purpose: ask() for purpose, ask in self._ask.items()}
        by_mount: dict[Path, list[str]] = {}
        for purpose, directory in self._directories.items():
            by_mount.setdefault(mount_point(directory), []).append(purpose)
        return tuple(info for mount, purposes in by_mount.items() if (info := self._info(mount, purposes)) is not None)

    def _info(self, mount: Path, purposes: list[str]) -> DiskInfo | None:
        try:
            now = os.statvfs(mount)
        except OSError:
            return None
        sizes = [size for purpose in purposes if (size := self._sizes[purpose]) is not None]
        return DiskInfo(
            path=str(mount),
            purpose=", ".join(purposes),
            total_bytes=now.f_blocks * now.f_frsize,
            free_bytes=now.f_bavail * now.f_frsize,
            box_bytes=sum(sizes) if len(sizes) == len(purposes) else None,
        )


def mount_point(path: Path) -> Path:
    """The root of the file system that `path` is on, or will be on once it exists."""
    here = next(each for each in (path, *path.parents) if each.exists()).resolve()
    device = here.stat().st_dev
    while here.parent != here and here.parent.stat().st_dev == device:
        here = here.parent
    return here


def directory_bytes(root: Path) -> int | None:
    """What the files below `root` take up on the disk, each counted once; 0 if it isn't there, None if there are too
    many of them.
    """
    total = 0
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    stat = entry.stat(follow_symlinks=False)
                    if len(seen) >= MAX_ENTRIES:
                        return None
                    if stat.st_ino not in seen:
                        seen.add(stat.st_ino)
                        total += stat.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
        except OSError:
            continue  # removed meanwhile, or not ours to read
    return total
