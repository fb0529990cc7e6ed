"""The most recent decisions, kept to be shown, and how much of their prompts needn't be computed."""

from __future__ import annotations

from collections import deque

from dynamo_box.protocol.figures import Decision

KEPT = 256
SHOWN = 64


class DecisionLog:
    """The last KEPT decisions; the hit rate is taken over the same window."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Decision, int]] = deque(maxlen=KEPT)
        self._cached_blocks = 0
        self._prompt_blocks = 0
        self.routed = 0

    def add(self, decision: Decision, cached_blocks: int) -> None:
        if len(self._kept) == KEPT:
            oldest, oldest_cached = self._kept[0]
            self._cached_blocks -= oldest_cached
            self._prompt_blocks -= oldest.prompt_blocks
        self._kept.append((decision, cached_blocks))
        self._cached_blocks += cached_blocks
        self._prompt_blocks += decision.prompt_blocks
        self.routed += 1

    @property
    def hit_rate(self) -> float | None:
        """Blocks in the winners' pools or loadable by them, of all prompt blocks, 0 to 1; None before the first."""
        return self._cached_blocks / self._prompt_blocks if self._prompt_blocks else None

    def recent(self) -> tuple[Decision, ...]:
        """The last SHOWN, oldest first."""
        start = max(len(self._kept) - SHOWN, 0)
        return tuple(decision for decision, _ in list(self._kept)[start:])
