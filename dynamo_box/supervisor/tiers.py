"""The KV tiers as the supervisor sees them: what it tells the frontend, for the box's metrics, and the room they take
on disk. The box serves without them, so nothing here ends a start or a life.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dynamo_box.plan.types import Plan
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import KvStoreFigures, WorkerFigures
from dynamo_box.protocol.spec import KvStoreSpec
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.states import State

KVSTORE = "kvstore"
FRONTEND = "frontend"
DISK_PURPOSE = "KV tier"


class TierNews:
    """Figures of store and workers to every frontend, as they change; all of them to one that has just begun."""

    def __init__(self, children: Mapping[str, Child]) -> None:
        self._store = next((child for child in children.values() if child.plan.kind == KVSTORE), None)
        self._children = children
        self._frontends = [child for child in children.values() if child.plan.kind == FRONTEND]
        self._told: dict[str, tuple[int, status.Tiers]] = {}

    def tick(self) -> None:
        """Once a second."""
        if self._store is None:
            return
        workers = [child for child in self._children.values() if child.plan.model is not None]
        news = status.Tiers(
            store=self.figures,
            workers={
                child.name: child.figures.tiers
                for child in workers
                if isinstance(child.figures, WorkerFigures) and child.figures.tiers is not None
            },
            models={child.name: child.plan.model for child in workers if child.plan.model is not None},
        )
        for frontend in self._frontends:
            if frontend.pid is None or frontend.state is State.STARTING:
                continue
            if (now := (frontend.pid, news)) != self._told.get(frontend.name):
                self._told[frontend.name] = now
                frontend.tell(news)

    @property
    def figures(self) -> KvStoreFigures | None:
        """Of the store; None without one, and while it says nothing."""
        figures = self._store.figures if self._store is not None else None
        return figures if isinstance(figures, KvStoreFigures) else None

    def disk_bytes(self) -> int | None:
        """What the disk tier says it takes; None if it says nothing."""
        return None if self.figures is None else self.figures.disk.used_bytes


def disk_directories(plan: Plan) -> dict[str, Path]:
    """Where the disk tier of a plan lies, by purpose; empty without one, and in a rehearsal, which takes no disk."""
    for process in plan.processes:
        if isinstance(process.spec, KvStoreSpec) and process.spec.disk_bytes and process.spec.rehearsal is None:
            return {DISK_PURPOSE: Path(process.spec.directory)}
    return {}


def flush_s(child: Child) -> float:
    """How long a process may go on at the end although no request runs: the store writes to disk what waits."""
    return child.plan.spec.flush_s if isinstance(child.plan.spec, KvStoreSpec) else 0.0
