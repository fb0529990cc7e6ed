"""Links to the workers that the instance directory names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from dynamo_box.discovery.instances import Instance
from dynamo_box.router.link import Link, Notify
from dynamo_box.router.placement import Placement
from dynamo_box.router.pool import ROLES
from dynamo_box.router.slices import Slices


class WorkerLink(Link):
    """One life of a worker. It is placed on while it is connected and announced."""

    def __init__(
        self,
        instance: Instance,
        placement: Placement,
        slices: Slices,
        notify: Notify,
        on_lost: Callable[[WorkerLink], None],
    ) -> None:
        self.instance = instance
        self.connected = False
        self.withdrawn = False
        self._pool = placement.pools[instance.model]
        self._on_connection_lost = on_lost
        super().__init__(instance.name, Path(instance.socket), self._pool.index, placement, slices, notify)

    def on_connected(self) -> None:
        self.connected = True
        self._pool.connect(self.name)

    def on_disconnected(self) -> None:
        self.connected = False
        self._pool.disconnect(self.name)
        self._on_connection_lost(self)

    def cleared(self) -> None:
        self._pool.workers[self.name].predictions.clear()
        super().cleared()

    def withdraw(self) -> None:
        self.withdrawn = True
        self._pool.withdraw(self.name)

    def announce_again(self, instance: Instance) -> None:
        """The same life, perhaps in another role."""
        if instance.role != self.instance.role:
            self._log.info("another role", role=instance.role, before=self.instance.role)
        self.instance = instance
        self.withdrawn = False
        self._pool.announce_again(instance)


class Workers:
    """Keeps one link for each worker that fits a model of the box.

    A worker that takes its file away sleeps, ends, or comes back in another role. While its connection stands it is
    the same life, which will tell what becomes of its blocks: the link stays, and ends with the connection.
    """

    def __init__(self, placement: Placement, slices: Slices, notify: Notify) -> None:
        self._placement = placement
        self._slices = slices
        self._notify = notify
        self._links: dict[str, WorkerLink] = {}
        self._unfit: dict[str, Instance] = {}

    def update(self, instances: dict[str, Instance]) -> None:
        """Follow the directory: link what is new, drop links to what was replaced, or is gone and not connected."""
        for name, link in list(self._links.items()):
            self._follow(link, instances.get(name))
        self._unfit = {name: known for name, known in self._unfit.items() if instances.get(name) == known}
        for name, instance in instances.items():
            if name not in self._links and name not in self._unfit:
                self._join(instance)

    def close(self) -> None:
        for link in list(self._links.values()):
            self._leave(link)

    def _follow(self, link: WorkerLink, instance: Instance | None) -> None:
        if instance is None:
            if not link.connected:
                self._leave(link)
            elif not link.withdrawn:
                link.withdraw()
        elif not _same_life(instance, link.instance):
            self._leave(link)
        elif link.withdrawn or instance != link.instance:
            link.announce_again(instance)

    def _join(self, instance: Instance) -> None:
        problem = self._placement.join(instance)
        if problem:
            self._unfit[instance.name] = instance
            self._notify("error", f"a worker can't be used: {problem}")
            return
        link = WorkerLink(instance, self._placement, self._slices, self._notify, self._on_lost)
        self._links[instance.name] = link

    def _on_lost(self, link: WorkerLink) -> None:
        if link.withdrawn:
            self._leave(link)

    def _leave(self, link: WorkerLink) -> None:
        del self._links[link.name]
        link.close()
        pool = self._placement.pools[link.instance.model]
        pool.leave(link.name)
        self._slices.add(pool.index.sweep)


def _same_life(instance: Instance, known: Instance) -> bool:
    """Nothing but the role is another."""
    return replace(instance, role=known.role) == known and instance.role in ROLES
