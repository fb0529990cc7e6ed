"""The block pool of one worker, without the bytes.

A block is in one of four states: free; open (owned by one sequence, not full yet, so without a name); held
(full, named by its digest, in use by one or more sequences); idle (named, in use by nobody, kept for reuse
until its place is needed). Blocks of equal digest are one block.

A sequence holds a whole chain from the start and gives it back last block first, so a block goes idle before
its parent and is evicted before it: whatever is cached is reachable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    def __init__(self, total: int) -> None:
        self.total = total
        self._open = 0
        self._held: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that sequences occupy."""
        return self._open + len(self._held)

    @property
    def idle(self) -> int:
        """Blocks kept for reuse only."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Blocks that could be opened now."""
        return self.total - self.used

    def cached(self) -> list[bytes]:
        """All named blocks."""
        return [*self._held, *self._idle]

    def match(self, digests: Sequence[bytes]) -> int:
        """How many blocks from the start of a chain are here."""
        for index, digest in enumerate(digests):
            if digest not in self._held and digest not in self._idle:
                return index
        return len(digests)

    def hold(self, digests: Sequence[bytes]) -> None:
        """Use blocks that `match` found."""
        for digest in digests:
            if digest in self._idle:
                del self._idle[digest]
                self._held[digest] = 1
            else:
                self._held[digest] += 1

    def open(self, count: int) -> list[bytes]:
        """Take `count` (at most `available`) blocks to fill; the digests of those that were evicted for
        them.
        """
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        missing = count - (self.available - len(self._idle))
        evicted = [self._idle.popitem(last=False)[0] for _ in range(missing)]
        self._open += count
        return evicted

    def seal(self, digest: bytes) -> bool:
        """An open block is full and gets its name. False if there was such a block already: the two become
        one.
        """
        self._open -= 1
        if digest in self._held:
            self._held[digest] += 1
            return False
        new = digest not in self._idle
        if not new:
            del self._idle[digest]
        self._held[digest] = 1
        return new

    def release(self, digests: Sequence[bytes], opened: int) -> None:
        """Give back a sequence's chain and its open blocks. What is named stays for reuse."""
        self._open -= opened
        for digest in reversed(digests):
            users = self._held[digest] - 1
            if users:
                self._held[digest] = users
            else:
                del self._held[digest]
                self._idle[digest] = None

    def check_integrity(self) -> None:
        """
        Raises:
            AssertionError: the books don't add up.
        """
        problems = [
            self._open < 0,
            self.used + self.idle > self.total,
            any(users < 1 for users in self._held.values()),
            bool(self._held.keys() & self._idle.keys()),
        ]
        if any(problems):
            raise AssertionError(f"block pool: {problems}, open {self._open}, held {len(self._held)}")
