"""A box that follows advice by itself (`advise: {auto: true}` in its profile).

It looks every few seconds at what has been computed lately (for as long as advice has to last, since a step of an
engine may take a second, and counts when it is over), and does what a person would do with
`dynbox role` and `dynbox disagg`: one change at a time, only advice that has lasted, and nothing while anything is on
its way elsewhere. When to act is decided by `advise.steady`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from dynamo_box.advise.load import measure
from dynamo_box.advise.rules import Advice, advise
from dynamo_box.advise.steady import Steady
from dynamo_box.errors import BoxError
from dynamo_box.plan.types import Following as Settings
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.supervisor.acts import ROUTER, Acts

DRAIN_S = 120.0
"""What runs on a worker may take so long to finish before it changes its role."""


class Following:
    """`snapshot` is the box now, `changing` says what is on its way, "" if nothing is; `emit(level, process, text)`
    adds to the event list.
    """

    def __init__(
        self,
        settings: Settings,
        acts: Acts,
        *,
        snapshot: Callable[[], BoxSnapshot],
        changing: Callable[[], str],
        emit: Callable[[str, str | None, str], None],
    ) -> None:
        self._settings = settings
        self._acts = acts
        self._snapshot = snapshot
        self._changing = changing
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._steady: dict[str, Steady] = {}
        self._look_at = 0.0
        self._seen: deque[tuple[float, BoxSnapshot]] = deque()
        self._act: asyncio.Task[None] | None = None

    def tick(self) -> None:
        """Once a second."""
        now_s = self._loop.time()
        if not self._settings.auto or now_s < self._look_at:
            return
        self._look_at = now_s + self._settings.look_every_s
        now = self._snapshot()
        if self._busy():
            self._seen.clear()
        while len(self._seen) > 1 and now_s - self._seen[1][0] >= self._settings.lasting_s:
            self._seen.popleft()
        before = self._seen[0][1] if self._seen else None
        self._seen.append((now_s, now))
        if before is None:
            return
        for model in now.models:
            if _has_figures(before, model.name) and self._follow(advise(measure(model.name, before, now))):
                self._seen.clear()
                return

    def _busy(self) -> str:
        """What is on its way, so that nothing is begun, and what was measured before says nothing any more."""
        acting = self._act is not None and not self._act.done()
        return "advice is being followed" if acting else self._changing()

    def _follow(self, advice: Advice) -> bool:
        """Whether something was begun."""
        state = self._steady.get(advice.model)
        if state is None:
            settings = self._settings
            state = Steady(lasting_s=settings.lasting_s, settle_s=settings.settle_s, reverse_s=settings.reverse_s)
        self._steady[advice.model], act, why = state.look(advice, self._loop.time(), changing=self._busy())
        if act:
            self._emit("info", None, f"by itself: {advice.command} ({why})")
            self._act = self._loop.create_task(self._carry_out(advice))
        return act

    async def _carry_out(self, advice: Advice) -> None:
        try:
            if advice.kind == "flip":
                await self._acts.set_role(advice.worker, advice.role, DRAIN_S)
            else:
                await self._acts.set_option(ROUTER, "disagg", advice.setting)
        except BoxError as error:
            self._emit("warning", None, f"by itself: {advice.command} failed: {error.what}")

    async def close(self) -> None:
        """Call off what is under way; the box is about to stop."""
        if self._act is not None:
            self._act.cancel()
            await asyncio.gather(self._act, return_exceptions=True)


def _has_figures(snapshot: BoxSnapshot, model: str) -> bool:
    return any(process.model == model and isinstance(process.figures, WorkerFigures) for process in snapshot.processes)
