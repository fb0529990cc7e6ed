"""A model's weights in an engine: the first process writes them, every other maps them, all of them read-only.

Addresses, once given, stay: `unmap` leaves them reserved and `remap` shows the same bytes there again, so nothing in
the engine that points at a tensor changes while it sleeps. Every imported descriptor is closed as soon as it is
mapped: an open one would pin the memory of a model that sleeps.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from dynamo_box.gms.client.errors import GmsFailure, GmsRefused, OutOfMemory, ServerGone, StaleLayout
from dynamo_box.gms.client.packing import TensorSpec, pack
from dynamo_box.gms.client.session import GmsSession
from dynamo_box.gms.client.watch import FIRST_DELAY_S, MAX_DELAY_S, Watch
from dynamo_box.gms.vmm import HostVmm, VmmError, VmmOutOfMemory
from dynamo_box.gms.vmm import Mapping as VmmMapping
from dynamo_box.gms.vmm.host import view
from dynamo_box.protocol.gms import Allocation, Entry, Granted, Queued

CONNECT_TIMEOUT_S = 5.0
REATTACH_TIMEOUT_S = 5.0

T = TypeVar("T")


class MappedTensor(NamedTuple):
    """Read-only memory of this process; a write ends it."""

    address: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Opened:
    """`wrote`: this process was the first. `phases` are seconds, in order. The rest is what crossed the socket."""

    wrote: bool
    phases: dict[str, float]
    bytes: int
    round_trips: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass
class _Region:
    """An allocation and the addresses it is seen at."""

    allocation: Allocation
    address: int


@dataclass
class _Layout:
    granted: Granted
    regions: list[_Region] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    tensors: Mapping[str, MappedTensor] = field(default_factory=dict)


class Weights:
    """One layout in one process. Any thread may call; calls take turns.

    `content` identifies what the bytes are (model, revision, dtype, format of the engine): a committed epoch of other
    content is replaced, not mapped.
    """

    def __init__(self, socket: Path, layout: str, *, owner: str, content: str) -> None:
        self._socket = socket
        self._name = layout
        self._owner = owner
        self._content = content
        self._vmm = HostVmm()
        self._lock = threading.Lock()
        self._layout: _Layout | None = None
        self._watch: Watch | None = None
        self._closing = threading.Event()

    def open(
        self,
        specs: Callable[[], Sequence[TensorSpec]],
        fill: Callable[[Mapping[str, memoryview]], None],
        *,
        timeout_s: float,
        waiting: Callable[[Queued], None] | None = None,
        make_room: bool = False,
    ) -> Opened:
        """Map the committed epoch; if there is none of our content, write it first. Once in the life of this object.

        The first process is asked for `specs`, and to `fill` the tensors by name. The views end with `fill`. When the
        server dies meanwhile all starts over, with both called again, for as long as `timeout_s` allows.

        Raises:
            LockTimeout: another process has been writing for too long.
            OutOfMemory: no room for it; nothing stays allocated or mapped.
            ServerGone: and no successor came in time.
        """
        with self._lock:
            if self._closing.is_set() or self._layout is not None:
                raise RuntimeError("weights are opened once")
            return self._persist(
                time.monotonic() + timeout_s, lambda left_s: self._open(specs, fill, left_s, waiting, make_room)
            )

    def tensors(self) -> Mapping[str, MappedTensor]:
        """By name; they can be read while mapped."""
        return self._opened().tensors

    def unmap(self) -> int:
        """Let go of the memory and of the lock. Nothing may be using the tensors. Returns the bytes unmapped."""
        with self._lock:
            return self._unmap()

    def remap(self, *, timeout_s: float) -> dict[str, float]:
        """Show the same bytes at the same addresses again: all of them or, on any error, none. Seconds by phase.

        Raises:
            StaleLayout: what is committed now is something else.
            Asleep: the bytes are not on the device.
            OutOfMemory, LockTimeout, ServerGone
        """
        with self._lock:
            layout = self._opened()
            if self._watch is not None:
                return {}
            return self._persist(time.monotonic() + timeout_s, lambda left_s: self._remap(layout, left_s))

    def close(self) -> None:
        """Unmap, and give back the addresses. What waits for a server stops waiting."""
        self._closing.set()
        with self._lock:
            self._unmap()
            self._vmm.close()
            self._layout = None

    @property
    def layout_hash(self) -> str:
        return self._opened().granted.layout_hash

    @property
    def epoch(self) -> int:
        return self._opened().granted.epoch

    @property
    def bytes(self) -> int:
        return sum(region.allocation.size for region in self._opened().regions)

    @property
    def attached(self) -> bool:
        """Mapped, and the server that lives now knows of it."""
        watch = self._watch
        return watch is not None and watch.attached

    def _opened(self) -> _Layout:
        if self._layout is None:
            raise RuntimeError("these weights are not open")
        return self._layout

    def _persist(self, deadline: float, attempt: Callable[[float], T]) -> T:
        """Again with each new life of the server; the first try happens whatever the deadline."""
        delay_s = FIRST_DELAY_S
        while True:
            try:
                return attempt(max(deadline - time.monotonic(), 0.0))
            except ServerGone:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
                if self._closing.wait(
                    min(delay_s, left_s)
                ):  # nothing announces a successor: its socket is there or not
                    raise
                delay_s = min(delay_s * 2, MAX_DELAY_S)

    def _open(
        self,
        specs: Callable[[], Sequence[TensorSpec]],
        fill: Callable[[Mapping[str, memoryview]], None],
        left_s: float,
        waiting: Callable[[Queued], None] | None,
        make_room: bool,
    ) -> Opened:
        phases: dict[str, float] = {}
        with contextlib.ExitStack() as undo:
            session = undo.enter_context(self._connect())
            undo.callback(self._vmm.close)
            with _timed(phases, "acquire"):
                granted = session.acquire(
                    self._name,
                    "rw_or_ro",
                    timeout_s=left_s,
                    content=self._content,
                    make_room=make_room,
                    waiting=waiting,
                )
            wrote = granted.lock == "rw"
            if wrote:
                granted = self._write(session, specs, fill, phases)
            with _refusals():
                layout = self._read(session, granted, phases)
            cost = (session.round_trips, session.bytes_sent, session.bytes_received)
            undo.pop_all()
        self._attach(layout, session)
        return Opened(wrote, phases, sum(region.allocation.size for region in layout.regions), *cost)

    def _write(
        self,
        session: GmsSession,
        specs: Callable[[], Sequence[TensorSpec]],
        fill: Callable[[Mapping[str, memoryview]], None],
        phases: dict[str, float],
    ) -> Granted:
        wanted = list(specs())
        packing = pack(wanted, self._vmm.granularity)
        with _timed(phases, "allocate"):
            allocated = session.allocate(packing.sizes)
        regions: list[_Region] = []
        with _refusals():
            with _timed(phases, "allocate"):
                regions = self._map([one for one, _ in allocated], [fd for _, fd in allocated], writable=True)
                for region in regions:
                    self._vmm.advise_hugepages(region.address, region.allocation.size)
                    self._vmm.populate(region.address, region.allocation.size, write=True)
            with _timed(phases, "fill"):
                starts = [regions[place.allocation].address + place.offset for place in packing.places]
                _fill(fill, {spec.name: (start, spec.nbytes) for spec, start in zip(wanted, starts, strict=True)})
            for region in regions:
                self._vmm.unmap(region.address, region.allocation.size)
                self._vmm.release(region.address, region.allocation.size)
        with _timed(phases, "commit"):
            session.put(packing.entries(wanted, [one.id for one, _ in allocated]))
            return session.commit()

    def _read(self, session: GmsSession, granted: Granted, phases: dict[str, float]) -> _Layout:
        with _timed(phases, "attach"):
            allocations, entries = session.describe()
            fds = session.export([one.id for one in allocations])
        with _timed(phases, "remap"):
            regions = self._map(allocations, fds)
        with _timed(phases, "populate"):
            self._populate(regions)
        return _Layout(granted, regions, entries, _tensors(regions, entries))

    def _map(self, allocations: Sequence[Allocation], fds: Sequence[int], *, writable: bool = False) -> list[_Region]:
        """At addresses of their own. Closes `fds`; what was reserved before an error goes with the whole."""
        with contextlib.ExitStack() as opened:
            for fd in fds:
                opened.callback(os.close, fd)
            regions = [_Region(one, self._vmm.reserve(one.size)) for one in allocations]
            self._map_at(regions, fds, writable=writable)
        return regions

    def _map_at(self, regions: Sequence[_Region], fds: Sequence[int], *, writable: bool = False) -> None:
        self._vmm.map_all(
            [
                VmmMapping(region.address, region.allocation.size, fd, writable)
                for region, fd in zip(regions, fds, strict=True)
            ]
        )

    def _populate(self, regions: Sequence[_Region]) -> None:
        for region in regions:
            self._vmm.populate(region.address, region.allocation.size)

    def _remap(self, layout: _Layout, left_s: float) -> dict[str, float]:
        phases: dict[str, float] = {}
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as opened, _refusals():
            with _timed(phases, "attach"):
                session = undo.enter_context(self._connect())
                granted = session.acquire(self._name, "ro", timeout_s=left_s, expect_hash=layout.granted.layout_hash)
                if granted.layout_hash != layout.granted.layout_hash:
                    raise StaleLayout(f"{self._name} is another layout now", "stale")
                regions = self._regions_now(session, layout, granted)
                fds = session.export([region.allocation.id for region in regions])
                for fd in fds:
                    opened.callback(os.close, fd)
            with _timed(phases, "remap"):
                self._map_at(regions, fds)
                undo.callback(self._hide, regions)
                opened.close()
            with _timed(phases, "populate"):
                self._populate(regions)
            undo.pop_all()
        layout.granted, layout.regions = granted, regions
        self._attach(layout, session)
        return phases

    def _regions_now(self, session: GmsSession, layout: _Layout, granted: Granted) -> list[_Region]:
        """What the allocations are called now: in another epoch of the same layout they may have other ids."""
        if granted.epoch == layout.granted.epoch:
            return layout.regions
        allocations, entries = session.describe()
        sizes = [one.size for one in allocations]
        if sizes != [region.allocation.size for region in layout.regions] or not _same_places(
            (allocations, entries), ([region.allocation for region in layout.regions], layout.entries)
        ):
            raise StaleLayout(f"{self._name} has its tensors at other places now", "stale")
        layout.entries = entries
        return [_Region(one, region.address) for one, region in zip(allocations, layout.regions, strict=True)]

    def _unmap(self) -> int:
        if self._watch is None:
            return 0
        layout = self._opened()
        watch, self._watch = self._watch, None
        session = watch.stop()
        self._hide(layout.regions)
        if session is not None:
            with session, contextlib.suppress(GmsFailure):  # the end of the session gives back the lock as well
                session.release()
        return sum(region.allocation.size for region in layout.regions)

    def _hide(self, regions: Sequence[_Region]) -> None:
        for region in regions:
            self._vmm.unmap(region.address, region.allocation.size)

    def _connect(self) -> GmsSession:
        return GmsSession.connect(self._socket, self._owner, CONNECT_TIMEOUT_S)

    def _attach(self, layout: _Layout, session: GmsSession) -> None:
        def attach(to: GmsSession) -> None:
            to.acquire(self._name, "ro", timeout_s=REATTACH_TIMEOUT_S, expect_hash=layout.granted.layout_hash)

        self._layout = layout
        self._watch = Watch(session, self._connect, attach)


def _fill(fill: Callable[[Mapping[str, memoryview]], None], places: Mapping[str, tuple[int, int]]) -> None:
    views = {name: view(address, nbytes, writable=True) for name, (address, nbytes) in places.items()}
    try:
        fill(MappingProxyType(views))
    finally:
        for one in views.values():
            with contextlib.suppress(BufferError):  # kept by somebody, whom the next use will end
                one.release()


def _tensors(regions: Sequence[_Region], entries: Sequence[Entry]) -> Mapping[str, MappedTensor]:
    """Raises:
    ServerGone: an entry lies outside its allocation.
    """
    by_id = {region.allocation.id: region for region in regions}
    tensors: dict[str, MappedTensor] = {}
    for entry in entries:
        region = by_id.get(entry.allocation)
        if region is None or entry.offset < 0 or not 0 <= entry.nbytes <= region.allocation.size - entry.offset:
            raise ServerGone(f"the server of weight memory says that {entry.name} lies outside its allocation")
        tensors[entry.name] = MappedTensor(
            region.address + entry.offset, entry.nbytes, entry.dtype, entry.shape, entry.stride
        )
    return MappingProxyType(tensors)


def _same_places(
    one: tuple[Sequence[Allocation], Sequence[Entry]], other: tuple[Sequence[Allocation], Sequence[Entry]]
) -> bool:
    def places(allocations: Sequence[Allocation], entries: Sequence[Entry]) -> dict[str, tuple[int, int]]:
        number = {allocation.id: index for index, allocation in enumerate(allocations)}
        return {entry.name: (number.get(entry.allocation, -1), entry.offset) for entry in entries}

    return places(*one) == places(*other)


@contextlib.contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        phases[phase] = phases.get(phase, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What this process's own kernel refuses, in the words that callers know."""
    try:
        yield
    except VmmOutOfMemory as error:
        raise OutOfMemory(str(error), "out_of_memory") from error
    except VmmError as error:
        raise GmsRefused(str(error)) from error
