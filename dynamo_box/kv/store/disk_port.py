"""What the host tier needs of the disk tier. All of it is called, and calls back, on the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from dynamo_box.protocol.figures import TierFigures
from dynamo_box.protocol.kv import Block, KvLayout


class DiskEvents(Protocol):
    """Blocks of one layout that came to the disk or left it; both never hold the same one."""

    @property
    def layout(self) -> str: ...
    @property
    def stored(self) -> Sequence[bytes]: ...
    @property
    def removed(self) -> Sequence[bytes]: ...


class ReadResult(Protocol):
    """One `good` for each block that was asked for: its bytes are where they were wanted, and their checksum is right.
    `error` says why others aren't.
    """

    @property
    def good(self) -> Sequence[bool]: ...
    @property
    def took_s(self) -> float: ...
    @property
    def error(self) -> str: ...


class DiskPort(Protocol):
    """Names of layouts are `KvLayout.name`."""

    def attach(self, layout: KvLayout) -> None:
        """Blocks of this layout may be asked for from now on; those of former lives turn up as they are indexed."""

    def has(self, layout_name: str, digest: bytes) -> bool: ...

    def priority_of(self, layout_name: str, digest: bytes) -> int | None: ...

    def write(self, layout_name: str, block: Block, data: memoryview, done: Callable[[bool], None]) -> str:
        """Why it isn't written, "" if it will be: then `data` must not change until `done`."""

    def read(
        self, layout_name: str, wanted: Sequence[tuple[bytes, memoryview]], done: Callable[[ReadResult], None]
    ) -> bool:
        """Whether it will be tried: then `done` is called once, and until then the views are the disk's."""

    def pin(self, layout_name: str, digests: Iterable[bytes]) -> None:
        """Not to be evicted until as many `unpin`."""

    def unpin(self, layout_name: str, digests: Iterable[bytes]) -> None: ...

    def touch(self, layout_name: str, digest: bytes) -> None:
        """It counts as used now."""

    def raise_priority(self, layout_name: str, digest: bytes, priority: int | None) -> None:
        """To this one, if it is there and this counts for more than what it has."""

    def digests(self, layout_name: str) -> Sequence[bytes]:
        """A copy of what is there now, for a dump."""

    def blocks(self, layout_name: str) -> int: ...

    def start(self) -> None:
        """Begin, in the background."""

    def clear(self) -> int:
        """Forget all blocks that aren't pinned; how many."""

    def figures(self) -> TierFigures: ...

    @property
    def settled(self) -> bool:
        """Whether it works, and knows all that is there."""

    @property
    def indexing(self) -> int: ...
    @property
    def indexed_in_s(self) -> float | None: ...

    async def close(self, flush_s: float) -> None:
        """What waits to be written may be for so long."""
