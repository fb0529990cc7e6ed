"""The bytes of epochs: which descriptors are theirs, what they take of the budgets, and how they move between device,
host and disk.

Calls of the kernel that make or free hundreds of MiB take a good part of a second, so none of them runs on the event
loop: short ones (make, seal, close) share one thread, in order, and bytes move in another, one layout at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dynamo_box.gms import snapshot_directories, snapshot_files
from dynamo_box.gms.copying import MoveFailed, OutOfMemory, copy_memory
from dynamo_box.gms.epoch import Epoch
from dynamo_box.gms.keeping import Keeper
from dynamo_box.gms.names import memfd_name
from dynamo_box.gms.snapshot_directories import SnapshotDamaged
from dynamo_box.gms.vmm import HostVmm, VmmError, VmmOutOfMemory
from dynamo_box.paths import RunDir
from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.spec import GmsSpec

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)

T = TypeVar("T")


class EpochGone(Exception):
    """It was discarded while memory for it was being made."""


@dataclass
class Relocated:
    """`epoch` has the same bytes at the new place. `phases` are seconds, in order."""

    epoch: Epoch
    phases: dict[str, float] = field(default_factory=dict)


class Places:
    """Every descriptor of weight memory that this process holds is in here."""

    def __init__(self, spec: GmsSpec, vmm: HostVmm, keeper: Keeper) -> None:
        self._device = spec.device
        self._run_key = RunDir(Path(spec.run_dir)).key
        self._snapshots = Path(spec.snapshots)
        self._capacity = {"device": spec.capacity_bytes, "host": spec.host_capacity_bytes}
        self._vmm = vmm
        self._keeper = keeper
        self._held: dict[Epoch, dict[int, int]] = {}
        self._promised = {"device": 0, "host": 0}
        self._stop = threading.Event()
        self._kernel = ThreadPoolExecutor(1, "kernel")
        self._mover = ThreadPoolExecutor(1, "mover")

    # What is held

    def used(self, place: Place) -> int:
        """Bytes there, those under construction and on their way included."""
        held = sum(epoch.bytes for epoch in self._held if epoch.place == place)
        return held + self._promised.get(place, 0)

    def begin(self, epoch: Epoch) -> None:
        self._held[epoch] = {}

    def adopt(self, epoch: Epoch, descriptors: Sequence[int]) -> None:
        """Take over descriptors in the order of the epoch's allocations."""
        self._held[epoch] = dict(zip(epoch.sizes, descriptors, strict=True)) if epoch.place != "disk" else {}

    def descriptors(self, epoch: Epoch, ids: Iterable[int] | None = None) -> list[int]:
        held = self._held[epoch]
        return list(held.values()) if ids is None else [held[id_] for id_ in ids]

    def discard(self, epoch: Epoch) -> Awaitable[None]:
        """Its bytes count no longer; done when its descriptors are closed."""
        return self._close(self._held.pop(epoch, {}).values())

    def free(self, epoch: Epoch, ids: Iterable[int]) -> Awaitable[None]:
        held = self._held[epoch]
        descriptors = [held.pop(id_) for id_ in ids]
        for id_ in ids:
            del epoch.sizes[id_]
        return self._close(descriptors)

    async def allocate(self, layout: str, epoch: Epoch, sizes: Sequence[int]) -> list[int]:
        """Ids of new allocations on the device; all or none.

        Raises:
            OutOfMemory: over the budget, or the kernel has no more memory or descriptors.
            MoveFailed: the kernel refuses for another reason.
            EpochGone: its writer is gone meanwhile.
        """
        total = sum(sizes)
        self._promise("device", total)
        try:
            made = await self._run(self._kernel, self._make_all, layout, sizes)
        finally:
            self._promised["device"] -= total
        if epoch not in self._held:
            await self._close(made)
            raise EpochGone
        added = epoch.add(sizes)
        self._held[epoch].update(zip((allocation.id for allocation in added), made, strict=True))
        return [allocation.id for allocation in added]

    async def seal(self, epoch: Epoch) -> None:
        """
        Raises:
            StillMapped: somebody can still write to it; what was sealed by then stays so.
            VmmError
        """
        await self._run(self._kernel, self._seal_all, self.descriptors(epoch))

    def readonly(self, epoch: Epoch, ids: Iterable[int]) -> list[int]:
        """New descriptors for readers, the caller's; all or none.

        Raises:
            OutOfMemory: no more descriptors.
            MoveFailed
        """
        made: list[int] = []
        try:
            for descriptor in self.descriptors(epoch, ids):
                made.append(self._vmm.readonly(descriptor))  # noqa: PERF401  # those made are closed on an error
        except VmmError as error:
            _close_all(made)
            raise _as_out_of_memory(error) from error
        return made

    # Moves

    async def relocate(self, layout: str, epoch: Epoch, place: Place) -> Relocated:
        """Bring a committed epoch's bytes elsewhere, have the supervisor hold them there, and let go of those here: on
        return they are free, unless `place` is the device, on which somebody waits for them. Freeing takes 60 ms a GiB.

        Raises:
            SnapshotDamaged: it was on disk and can't be had back.
            MoveFailed, VmmError, NotKept: it is where it was.
        """
        assert epoch.place != place
        moved = Relocated(dataclasses.replace(epoch, place=place))
        if place == "disk":
            await self._save(layout, epoch, moved)
        else:
            await self._fill(layout, epoch, place, moved)
        freed = self.discard(epoch)
        if place != "device":
            await freed
        return moved

    async def clean(self, wanted: Sequence[str]) -> list[Path]:
        """
        Raises:
            MoveFailed: something can't be deleted.
        """
        return await self._run(self._mover, snapshot_directories.clean, self._snapshots, wanted)

    def stop(self) -> None:
        """What moves now fails soon."""
        self._stop.set()

    def close(self) -> None:
        """Let go of everything; waits for its threads."""
        self._stop.set()
        for descriptors in self._held.values():
            for descriptor in descriptors.values():
                os.close(descriptor)
        self._held.clear()
        self._mover.shutdown()
        self._kernel.shutdown()

    async def _save(self, layout: str, epoch: Epoch, moved: Relocated) -> None:
        directory = self._directory(layout)
        record = moved.epoch.record(layout, snapshot=str(directory))
        with _timed(moved.phases, "verify"):
            there = await self._run(self._mover, self._is_there, directory, epoch, layout)
        if not there:
            moved.phases.clear()
            saved = await self._run(
                self._mover,
                lambda: snapshot_files.save(directory, record, self.descriptors(epoch), stop=self._stop.is_set),
            )
            moved.phases.update(saved.phases)
        with _timed(moved.phases, "keep"):
            await self._keeper.keep(record, ())
        self.adopt(moved.epoch, ())

    def _is_there(self, directory: Path, epoch: Epoch, layout: str) -> bool:
        """A snapshot of an earlier sleep, of these very bytes and whole."""
        try:
            snapshot_files.verify(directory, epoch.record(layout), stop=self._stop.is_set)
        except SnapshotDamaged:
            return False
        return True

    async def _fill(self, layout: str, epoch: Epoch, place: Place, moved: Relocated) -> None:
        sizes = list(epoch.sizes.values())
        total = sum(sizes)
        make = self._maker(layout, place)
        self._promise(place, total)
        try:
            if epoch.place == "disk":
                directory, record = self._directory(layout), epoch.record(layout)
                with _timed(moved.phases, "read"):
                    made = await self._run(
                        self._mover, lambda: snapshot_files.load(directory, record, make, stop=self._stop.is_set)
                    )
            else:
                sources = self.descriptors(epoch)
                with _timed(moved.phases, "copy"):
                    made = await self._run(
                        self._mover, lambda: copy_memory(sources, sizes, make, stop=self._stop.is_set)
                    )
            try:
                with _timed(moved.phases, "keep"):
                    await self._run(self._mover, self._seal_all, made)
                    await self._keeper.keep(moved.epoch.record(layout), made)
            except BaseException:
                await self._close(made)
                raise
            self.adopt(moved.epoch, made)
        finally:
            self._promised[place] -= total

    def _promise(self, place: Place, count: int) -> None:
        left = self._capacity[place] - self.used(place)
        if count > left:
            raise OutOfMemory(
                f"{count} bytes are wanted on {place}, and {max(left, 0)} of its {self._capacity[place]} are left"
            )
        self._promised[place] += count

    def _make_all(self, layout: str, sizes: Sequence[int]) -> list[int]:
        name = memfd_name(self._run_key, "device", self._device, layout)
        made: list[int] = []
        try:
            for size in sizes:
                made.append(self._vmm.create(size, name))  # noqa: PERF401  # those made are closed on an error
        except (VmmError, OSError) as error:
            _close_all(made)
            raise _as_out_of_memory(error) from error
        return made

    def _maker(self, layout: str, place: Place) -> Callable[[int, int], int]:
        name = memfd_name(self._run_key, place, self._device, layout)

        def make(_number: int, size: int) -> int:
            try:
                return self._vmm.create(size, name)
            except (VmmError, OSError) as error:
                raise _as_out_of_memory(error) from error

        return make

    def _seal_all(self, descriptors: Sequence[int]) -> None:
        for descriptor in descriptors:
            self._vmm.seal(descriptor)

    def _close(self, descriptors: Iterable[int]) -> Awaitable[None]:
        wanted = tuple(descriptors)
        return asyncio.shield(self._run(self._kernel, _close_all, wanted))

    def _run(self, executor: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(executor, work, *arguments)

    def _directory(self, layout: str) -> Path:
        return snapshot_directories.directory_of(self._snapshots, layout)


class _timed:  # noqa: N801  # reads as the statement it is
    """Seconds of a block, under their name."""

    def __init__(self, phases: dict[str, float], name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._phases[self._name] = time.monotonic() - self._began


def _as_out_of_memory(error: VmmError | OSError) -> MoveFailed:
    """A lack of descriptors is a lack of room as well."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(error, VmmOutOfMemory) or (isinstance(cause, OSError) and cause.errno in _NO_ROOM):
        return OutOfMemory(str(error))
    return MoveFailed(str(error))


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
