"""One model of a box as the supervisor knows it: its workers, its weights, and what is said of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from dynamo_box.plan.awake import Needs
from dynamo_box.plan.types import ModelPolicy
from dynamo_box.protocol.figures import GmsFigures, LayoutFigures, WorkerFigures
from dynamo_box.protocol.residency import Residency
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.model_states import ModelState, check


class Model:
    """`said` is changed by `to` and `say` only, which call `changed`. Who acts on the model has its `turn`.

    `service` is the weight memory that its weights are in, if its engine can sleep. Times are the loop's; `since` in
    what is said is Unix time.
    """

    def __init__(
        self,
        name: str,
        policy: ModelPolicy,
        needs: Needs,
        workers: tuple[Child, ...],
        service: Child | None,
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.policy = policy
        self.needs = needs
        self.workers = workers
        self.service = service
        self.turn = asyncio.Lock()
        self.awake_at = 0.0
        self.asleep_at = 0.0
        self.said = Residency(
            model=name,
            since=time.time(),
            engine_sleeps=bool(policy.gms),
            keep=policy.keep,
            pin=policy.pin,
            idle_ttl_s=policy.idle_ttl_s,
            min_awake_s=policy.min_awake_s,
        )
        self._changed = changed

    @property
    def state(self) -> ModelState:
        return ModelState(self.said.state)

    @property
    def is_up(self) -> bool:
        return any(worker.is_ready for worker in self.workers)

    @property
    def runs(self) -> bool:
        """Something runs or waits on its workers, by what they last reported."""
        return any(
            isinstance(worker.figures, WorkerFigures) and worker.figures.running + worker.figures.waiting > 0
            for worker in self.workers
        )

    @property
    def service_figures(self) -> GmsFigures | None:
        figures = self.service.figures if self.service is not None else None
        return figures if isinstance(figures, GmsFigures) else None

    @property
    def layout(self) -> LayoutFigures | None:
        """Its weights, by what the service last reported."""
        figures = self.service_figures
        return next((one for one in figures.layouts if one.name == self.name), None) if figures is not None else None

    @property
    def residency(self) -> Residency:
        """As everyone sees it."""
        weights = self.layout
        bytes_ = weights.bytes if weights is not None and weights.bytes else None
        said = msgspec.structs.replace(self.said, weights_bytes=bytes_)
        if self.state is ModelState.AWAKE and not self.is_up:
            return msgspec.structs.replace(said, state="unavailable")
        return said

    def to(self, state: ModelState, *, since: float | None = None, phase: str = "", **more: Any) -> None:
        """
        Raises:
            IllegalTransition: there is no way from its state to this one.
        """
        check(self.state, state)
        self.say(state=str(state), since=time.time() if since is None else since, phase=phase, **more)

    def say(self, **changes: Any) -> None:
        self.said = msgspec.structs.replace(self.said, **changes)
        self._changed()
