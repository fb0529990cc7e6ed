"""One version of a layout: what it has allocated, and what lies in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from dynamo_box.protocol.gms import Allocation, Entry, EpochRecord, Place


@dataclass(eq=False)
class Epoch:
    """Under construction, committed, or replaced and still read. `sizes` are by allocation id, in order of creation."""

    number: int
    content: str
    sizes: dict[int, int] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    layout_hash: str = ""
    place: Place = "device"
    next_allocation: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        return tuple(Allocation(id_, size) for id_, size in self.sizes.items())

    def add(self, sizes: Iterable[int]) -> tuple[Allocation, ...]:
        added = []
        for size in sizes:
            self.sizes[self.next_allocation] = size
            added.append(Allocation(self.next_allocation, size))
            self.next_allocation += 1
        return tuple(added)

    def problem(self) -> str:
        """What keeps it from being committed: entries must have names of their own and lie inside allocations."""
        names: set[str] = set()
        for entry in self.entries:
            if entry.name in names:
                return f"two entries are named {entry.name!r}"
            names.add(entry.name)
            size = self.sizes.get(entry.allocation)
            if size is None:
                return f"entry {entry.name!r} lies in allocation {entry.allocation}, which there is not"
            if entry.offset < 0 or entry.nbytes < 0 or entry.offset + entry.nbytes > size:
                return f"entry {entry.name!r} reaches outside allocation {entry.allocation} of {size} bytes"
        return ""

    def compute_hash(self) -> str:
        """Equal for layouts of equal content, sizes and entries, whoever wrote them and whenever."""
        canonical = msgspec.msgpack.encode((self.content, tuple(self.sizes.values()), self.entries))
        return blake2b(canonical, digest_size=16).hexdigest()

    def record(self, layout: str, snapshot: str = "") -> EpochRecord:
        return EpochRecord(
            layout,
            self.number,
            self.layout_hash,
            self.content,
            self.place,
            self.allocations,
            self.entries,
            snapshot,
        )

    @classmethod
    def of(cls, record: EpochRecord) -> Epoch:
        sizes = {allocation.id: allocation.size for allocation in record.allocations}
        return cls(record.epoch, record.content, sizes, record.entries, record.layout_hash, record.place)
