"""Links to the workers that the instance directory names: one an instance, for as long as its file is there."""

from __future__ import annotations

from pathlib import Path

from dynamo_box.discovery.instances import Instance
from dynamo_box.router.link import Link, Notify
from dynamo_box.router.placement import Placement
from dynamo_box.router.slices import Slices


class WorkerLink(Link):
    """One worker: it is placed on while it is connected."""

    def __init__(self, instance: Instance, placement: Placement, slices: Slices, notify: Notify) -> None:
        self.instance = instance
        self._pool = placement.pools[instance.model]
        super().__init__(instance.name, Path(instance.socket), self._pool.index, placement, slices, notify)

    def on_connected(self) -> None:
        self._placement.connect(self.instance)

    def on_disconnected(self) -> None:
        self._placement.disconnect(self.instance)

    def cleared(self) -> None:
        self._pool.workers[self.name].predictions.clear()
        super().cleared()


class Workers:
    """Keeps one link for each live instance that fits a model of the box."""

    def __init__(self, placement: Placement, slices: Slices, notify: Notify) -> None:
        self._placement = placement
        self._slices = slices
        self._notify = notify
        self._links: dict[str, WorkerLink] = {}
        self._unfit: dict[str, Instance] = {}

    def update(self, instances: dict[str, Instance]) -> None:
        """Follow the directory: drop links to what is gone or was replaced, link what is new."""
        for name, link in list(self._links.items()):
            if instances.get(name) != link.instance:
                self._leave(name)
        self._unfit = {name: known for name, known in self._unfit.items() if instances.get(name) == known}
        for name, instance in instances.items():
            if name not in self._links and name not in self._unfit:
                self._join(instance)

    def close(self) -> None:
        for name in list(self._links):
            self._leave(name)

    def _join(self, instance: Instance) -> None:
        problem = self._placement.join(instance)
        if problem:
            self._unfit[instance.name] = instance
            self._notify("error", f"a worker can't be used: {problem}")
            return
        self._links[instance.name] = WorkerLink(instance, self._placement, self._slices, self._notify)

    def _leave(self, name: str) -> None:
        link = self._links.pop(name)
        link.close()
        self._placement.leave(link.instance)
        self._slices.add(self._placement.pools[link.instance.model].index.sweep)
