"""A layout that sleeps on disk: a directory of shards and a manifest, whole or not there.

    <root>/<directory_of(layout)>/        0700
        manifest.json                     0600: what it is of, and size and checksum of each shard
        shard-00000.bin …                 0600: all allocations end to end, cut every SHARD_BYTES
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.gms.copying import Make, MoveFailed, never
from dynamo_box.protocol.gms import EpochRecord

SHARD_BYTES = 1 << 30


class DiskFull(MoveFailed):
    pass


class SnapshotDamaged(MoveFailed):
    """`path` must not be used: `what` is wrong with it."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what


@dataclass(frozen=True)
class Saved:
    """`bytes` on disk; `phases` are seconds, in order: write, verify."""

    bytes: int
    phases: dict[str, float]


def directory_of(root: Path, layout: str) -> Path:
    """Where the snapshot of a layout is. Any name of a layout makes a safe and different name of a directory."""
    raise NotImplementedError


def save(
    directory: Path,
    record: EpochRecord,
    descriptors: Sequence[int],
    *,
    shard_bytes: int = SHARD_BYTES,
    stop: Callable[[], bool] = never,
) -> Saved:
    """Write a snapshot of `record` to `directory` (from `directory_of`), replacing what is there, and read it back: on
    return it is on the disk, and whole. `descriptors` are those of `record.allocations`. Missing parents are made.

    Raises:
        DiskFull, MoveStopped, MoveFailed: no temporary file is left, and a snapshot that was there is still there.
    """
    raise NotImplementedError


def verify(directory: Path, record: EpochRecord, *, stop: Callable[[], bool] = never) -> int:
    """Read all of it and compare; bytes of the snapshot on disk. `record.epoch` may differ: the content counts.

    Raises:
        SnapshotDamaged: it is not there, not whole, or of something else.
        MoveStopped, MoveFailed: it can't be said.
    """
    raise NotImplementedError


def load(directory: Path, record: EpochRecord, make: Make, *, stop: Callable[[], bool] = never) -> list[int]:
    """New memory files, made by `make`, in the order of `record.allocations`, filled and verified.

    Manifest, names and sizes are checked before anything is made; nothing is returned unless every checksum is right.

    Raises:
        SnapshotDamaged, OutOfMemory, MoveStopped, MoveFailed: every descriptor made is closed.
    """
    raise NotImplementedError


def remove(directory: Path) -> int:
    """Delete a snapshot, if there is one; bytes that it had on disk."""
    raise NotImplementedError


def clean(root: Path, wanted_layouts: Collection[str]) -> list[Path]:
    """Delete what of ours lies in `root` and nobody will load: snapshots of layouts that aren't wanted, and what a
    save that died has left. Files and directories that aren't ours stay, and so does what a living process is saving.
    """
    raise NotImplementedError
