"""How long a step takes, and keeping to it."""

from __future__ import annotations

import asyncio

from engines.mock.options import MockOptions


def step_seconds(options: MockOptions, prefill_tokens: int, decoding: int) -> float:
    """One step computes its prompt tokens at the prefill rate, and a token for all decoding sequences."""
    if options.speedup == "infinite":
        return 0.0
    seconds = prefill_tokens / options.prefill_tokens_per_s
    if decoding:
        seconds += options.decode_ms / 1000.0
    return seconds / options.speedup


class Pace:
    """Waits for steps to take their time. What one wait overshoots is taken off the next, so that rates hold;
    a pause of the loop longer than a step is not caught up with.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time()

    def restart(self) -> None:
        """After idling: the next step begins now."""
        self._due = self._loop.time()

    async def step(self, seconds: float) -> None:
        """Always gives the loop a turn, however short the step."""
        now = self._loop.time()
        self._due = max(self._due + seconds, now)
        await asyncio.sleep(self._due - now)
