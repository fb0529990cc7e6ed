"""What the tiers did since the start, over all layouts, those given up included."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """`host_in_s` is from the reservation of slots to their commit, `host_out_s` from a find to the release of what was
    loaded, without what the disk took: copies, and what waited for them.
    """

    host_lookups: int = 0
    host_hits: int = 0
    host_in_blocks: int = 0
    host_in_bytes: int = 0
    host_in_s: float = 0.0
    host_out_blocks: int = 0
    host_out_bytes: int = 0
    host_out_s: float = 0.0
    host_evicted: int = 0
    """In layouts that were given up since."""
    host_failed: int = 0
    host_dropped: Counter[str] = field(default_factory=Counter)
    disk_lookups: int = 0
    disk_hits: int = 0
    disk_dropped: Counter[str] = field(default_factory=Counter)
    reclaimed: int = 0
    requests: int = 0
    refused: int = 0
