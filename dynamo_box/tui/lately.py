"""The last ten seconds of a box: what its workers did a second, how busy they were, and what that gives advice for.

Snapshots are kept a second apart, so that there are a dozen at most. Rates are from the oldest of them to now; advice
is from the oldest to the newest that is kept, and so is worked out anew once a second, and only if somebody asks.
"""

from __future__ import annotations

from collections import deque

from dynamo_box.advise.load import ModelLoad, measure
from dynamo_box.advise.rules import Advice, advise
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo

SPAN_S = 10.0
STEP_S = 1.0
LEAST_S = 0.9
"""Over less time a share or a rate says nothing."""


class Lately:
    """`feed` it what comes; times only grow, or it starts over."""

    def __init__(self) -> None:
        self._kept: deque[BoxSnapshot] = deque(maxlen=int(SPAN_S / STEP_S) + 1)
        self._before: dict[str, ProcessInfo] = {}
        self._now: BoxSnapshot | None = None
        self._loads: dict[str, ModelLoad] = {}
        self._advice: dict[str, Advice] = {}

    def clear(self) -> None:
        self._kept.clear()
        self._before.clear()
        self._loads.clear()
        self._advice.clear()
        self._now = None

    def feed(self, snapshot: BoxSnapshot) -> None:
        self._now = snapshot
        if self._kept and snapshot.at - self._kept[-1].at < STEP_S:
            return
        self._kept.append(snapshot)
        while snapshot.at - self._kept[0].at > SPAN_S + STEP_S and len(self._kept) > 2:
            self._kept.popleft()
        self._before = {process.name: process for process in self._kept[0].processes}
        self._loads.clear()
        self._advice.clear()

    def busy(self, process: ProcessInfo) -> float | None:
        """The share of the time in which a worker of the newest snapshot computed."""
        grown = self._grown(process, "busy_s")
        return None if grown is None else min(grown, 1.0)

    def handed_over(self, process: ProcessInfo) -> float | None:
        """Prefill legs a second whose KV it held for others."""
        return self._grown(process, "handed_over")

    def taken_over(self, process: ProcessInfo) -> float | None:
        """Decode legs a second that went on here without computing any of their prompt."""
        return self._grown(process, "taken_over")

    def load(self, model: str) -> ModelLoad | None:
        """None before the first snapshot."""
        if model not in self._loads and self._kept:
            self._loads[model] = measure(model, self._kept[0], self._kept[-1])
        return self._loads.get(model)

    def advice(self, model: str) -> Advice | None:
        """None before the first snapshot."""
        if model not in self._advice and (load := self.load(model)) is not None:
            self._advice[model] = advise(load)
        return self._advice.get(model)

    def _grown(self, process: ProcessInfo, field: str) -> float | None:
        """A second; None until it has been watched long enough, or if it says nothing. A new life counts from zero."""
        now, earlier = process.figures, self._before.get(process.name)
        if self._now is None or not isinstance(now, WorkerFigures) or not self._kept:
            return None
        span_s = self._now.at - self._kept[0].at
        if span_s < LEAST_S:
            return None
        before = earlier.figures if earlier is not None and earlier.pid == process.pid else None
        base: float = getattr(before, field) if isinstance(before, WorkerFigures) else 0.0
        later: float = getattr(now, field)
        return max(later - base, 0.0) / span_s
