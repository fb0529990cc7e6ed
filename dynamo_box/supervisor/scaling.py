"""More or fewer workers of a model in a role, while the box runs.

New ones are planned by `plan.scale.grow`; of those that are there the last ones go, and before them those that are
down. From its start to its end the change has the model to itself: it neither sleeps nor is scaled otherwise meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from dynamo_box.errors import BoxError, UsageError
from dynamo_box.plan.cores import crowding
from dynamo_box.plan.scale import MAX_WORKERS, grow
from dynamo_box.plan.types import Plan, ProcessPlan
from dynamo_box.supervisor.acts import ROLES, WORKER, Acts
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.models import Models

REMOVED = "removed"


class Scaling:
    """`add` makes a child of a plan and `remove` forgets one that has stopped; both are the box's, which knows who else
    has to hear of it. `emit(level, process, text)` adds to the event list.
    """

    def __init__(
        self,
        plan: Plan,
        children: Mapping[str, Child],
        acts: Acts,
        models: Models,
        *,
        add: Callable[[ProcessPlan], Child],
        remove: Callable[[Child], None],
        emit: Callable[[str, str | None, str], None],
    ) -> None:
        self._plan = plan
        self._children = children
        self._acts = acts
        self._models = models
        self._add = add
        self._remove = remove
        self._emit = emit
        self._under_way: set[str] = set()

    @property
    def under_way(self) -> str:
        """What is being done now, in words; "" for nothing."""
        return next((f"{model} is being scaled" for model in self._under_way), "")

    async def scale(self, model: str, role: str, count: int, drain_s: float) -> str:
        """Have `count` workers of `model` in `role`; on return new ones are ready, and of those that went nothing is
        left. In words for people.

        Raises:
            UsageError: no such role, or no such number.
            PlanRefused: there is no room; nothing was started.
            BoxError: no such model, one that sleeps, a worker that didn't come up (it is gone again, others stay), or
                this is no time for it.
        """
        if role not in ROLES:
            raise UsageError(f"there is no role {role!r}", remedy=f"there are {', '.join(ROLES)}")
        if not 0 <= count <= MAX_WORKERS:
            raise UsageError(f"a role has 0 to {MAX_WORKERS} workers, not {count}")
        self._acts.check_is_up()
        if model in self._under_way:
            raise BoxError(f"{model} is being scaled already", remedy="`dynbox ps` shows how far that is")
        self._under_way.add(model)
        try:
            async with self._models.kept_awake(model):
                there = self._workers(model, role)
                if len(there) == count:
                    return f"{_workers(model, role, count)} already"
                if len(there) < count:
                    done = await self._grow(model, role, count - len(there))
                else:
                    done = await self._shrink(there, len(there) - count, drain_s)
        finally:
            self._under_way.discard(model)
        return f"{_workers(model, role, count)}: {done}"

    def _workers(self, model: str, role: str) -> list[Child]:
        return [
            child
            for child in self._children.values()
            if child.plan.kind == WORKER and child.plan.model == model and child.plan.role == role
        ]

    async def _grow(self, model: str, role: str, more: int) -> str:
        present = [child.plan for child in self._children.values()]
        planned = grow(self._plan, present, model, role, more, self._models.asleep)
        self._emit("info", None, f"{model}: {more} more to {role}: {_names(planned)}")
        added = [self._add(process) for process in planned]
        for child in added:
            child.start()
        outcomes = await asyncio.gather(*(child.wait_ready() for child in added), return_exceptions=True)
        failed = [child for child, outcome in zip(added, outcomes, strict=True) if outcome is not None]
        if failed:
            error = failed[0].failure_error()
            await asyncio.gather(*(child.stop(0) for child in failed))
            self._forget(failed)
            raise error
        crowded = crowding(self._plan, [child.plan for child in self._children.values()], self._models.asleep)
        if crowded:
            self._emit("warning", None, crowded)
        return f"{_names(planned)} ready" + (f" ({crowded})" if crowded else "")

    async def _shrink(self, there: Sequence[Child], fewer: int, drain_s: float) -> str:
        """Those that are down first, then the last ones."""
        order = sorted(enumerate(there), key=lambda each: (each[1].is_ready, -each[0]))
        leaving = [child for _, child in order[:fewer]]
        with ExitStack() as alone:
            for child in leaving:
                alone.enter_context(self._acts.alone(child.name, REMOVED))
            for child in leaving:
                self._emit("info", child.name, f"is to go (running requests get {drain_s:g} s)")
            unfinished = sum(await asyncio.gather(*(child.stop(drain_s) for child in leaving)))
            self._acts.check_is_up()
            self._forget(leaving)
        cut = f", with {unfinished} requests unfinished" if unfinished else ""
        model = leaving[0].plan.model
        none = not any(child.plan.model == model for child in self._children.values())
        rest = f"; nothing serves {model} until `dynbox scale` starts a worker of it" if none else ""
        gone = f"{', '.join(child.name for child in leaving)} gone{cut}{rest}"
        self._emit("warning" if unfinished or none else "info", None, gone)
        return gone

    def _forget(self, children: Sequence[Child]) -> None:
        """A box that is on its way down forgets nobody: it goes through them all just now."""
        self._acts.check_is_up()
        for child in children:
            self._remove(child)


def _workers(model: str, role: str, count: int) -> str:
    return f"{model} has {count} {role} worker{'' if count == 1 else 's'}"


def _names(planned: Sequence[ProcessPlan]) -> str:
    return ", ".join(process.name for process in planned)
