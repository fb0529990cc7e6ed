"""KV blocks: who holds them, which can be reused, and what the router is told of it. Knows nothing of their
content.

A block is in one of three states:

    blank    nobody holds it and its content is worthless
    held     one or more sequences hold it; if it has a digest, more may come to share it
    idle     nobody holds it, but its content is known by a digest; the block idle for longest is evicted first

A block with a digest can be pinned too, while its content is copied out: to others it is as good as held.

A digest names one block at most. When two sequences compute the same tokens side by side, the first to finish
a block gives it its name; the other's copy stays private and becomes blank when it is released.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engines.contract import BlockEvent, RemovedBlocks, StoredBlocks


class BlockPool:
    def __init__(self, total: int) -> None:
        self.total = total
        self._blank = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * total
        self._digest_of: list[bytes | None] = [None] * total
        self._block_of: dict[bytes, int] = {}
        self._pinned: set[int] = set()
        self._events = EventLog()

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._blank) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self.available - sum(self._references[block] == 1 for block in self._pinned)

    @property
    def pinned(self) -> int:
        return len(self._pinned)

    @property
    def idle(self) -> int:
        """Blocks that nobody holds and that are kept for reuse only."""
        return len(self._idle)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of `digests` that is cached. Changes nothing."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def idle_among(self, blocks: Iterable[int]) -> int:
        """By how much `available` would fall if they were shared."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `match` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1

    def find(self, digest: bytes) -> int | None:
        """The block with this content."""
        return self._block_of.get(digest)

    def pin(self, blocks: Sequence[int]) -> None:
        """Keep blocks that `find` found, none of which is pinned, as they are until `unpin`."""
        self._pinned.update(blocks)
        self.share(blocks)

    def unpin(self, blocks: Sequence[int]) -> None:
        self._pinned.difference_update(blocks)
        self.release(blocks)

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks for new content, evicting if need be; the caller has asked `available` whether
        they exist.
        """
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes, parent: bytes) -> None:
        """The held `block` is full and computed: from now on `digest` finds it."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest
            self._events.stored(digest, parent)

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in chain order: the tail, useless without its head, is evicted
        first.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digest_of[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def take_events(self) -> list[BlockEvent]:
        """What has changed since the last call, in order."""
        return self._events.take()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one state and names and blocks agree."""
        blank, idle = set(self._blank), set(self._idle)
        held = {block for block, count in enumerate(self._references) if count > 0}
        _require(min(self._references, default=0) >= 0, "a block was released more often than held")
        _require(len(blank) == len(self._blank), "a block is blank twice")
        _require(len(blank) + len(idle) + len(held) == self.total, "a block is lost or in two states")
        _require(len(blank | idle | held) == self.total, "a block is in two states")
        _require(all(self._digest_of[block] is None for block in blank), "a blank block has a digest")
        _require(all(self._digest_of[block] is not None for block in idle), "an idle block has no digest")
        named = {digest: block for block, digest in enumerate(self._digest_of) if digest is not None}
        _require(named == self._block_of, "names and blocks disagree")
        _require(self._pinned <= held & set(named.values()), "a pinned block is not held, or has no digest")

    def check_idle(self) -> None:
        """Raise AssertionError if a block is held although no sequence is left. Costs nothing."""
        _require(self.held == 0, f"{self.held} blocks are held by nobody")
        _require(len(self._idle) + self.pinned == len(self._block_of), "a block with a name is neither idle nor pinned")

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        digest = self._digest_of[block]
        if digest is None:
            raise AssertionError("an idle block has no digest")
        del self._block_of[digest]
        self._digest_of[block] = None
        self._events.removed(digest)
        return block


class EventLog:
    """Changes in order, neighbours of one kind merged: a chain stored block by block is one event."""

    def __init__(self) -> None:
        self._runs: list[tuple[bytes | None, list[bytes]]] = []

    def stored(self, digest: bytes, parent: bytes) -> None:
        if self._runs and self._runs[-1][0] is not None and self._runs[-1][1][-1] == parent:
            self._runs[-1][1].append(digest)
        else:
            self._runs.append((parent, [digest]))

    def removed(self, digest: bytes) -> None:
        if self._runs and self._runs[-1][0] is None:
            self._runs[-1][1].append(digest)
        else:
            self._runs.append((None, [digest]))

    def take(self) -> list[BlockEvent]:
        runs, self._runs = self._runs, []
        return [
            RemovedBlocks(tuple(digests)) if parent is None else StoredBlocks(tuple(digests), parent)
            for parent, digests in runs
        ]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
