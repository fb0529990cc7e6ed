"""The ids of pieces of text seen lately: a conversation's earlier messages need no second tokenising."""

from __future__ import annotations

import threading
from collections import OrderedDict

BYTES_PER_CHARACTER = 4


class SegmentCache:
    """Least recently used, bounded in bytes; for any thread."""

    def __init__(self, max_bytes: int, max_segment_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_segment_bytes = max_segment_bytes
        self._packed: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def get(self, text: str) -> bytes | None:
        with self._lock:
            packed = self._packed.get(text)
            if packed is not None:
                self._packed.move_to_end(text)
            return packed

    def put(self, text: str, packed: bytes) -> None:
        cost = _cost(text, packed)
        if cost > self._max_segment_bytes:
            return
        with self._lock:
            if text in self._packed:
                return
            self._packed[text] = packed
            self.bytes += cost
            while self.bytes > self._max_bytes:
                self.bytes -= _cost(*self._packed.popitem(last=False))


def _cost(text: str, packed: bytes) -> int:
    return len(text) * BYTES_PER_CHARACTER + len(packed)
