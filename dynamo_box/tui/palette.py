"""What ctrl+p finds: screens, acts and themes by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from textual.command import DiscoveryHit, Hit, Hits, Provider


class Command(NamedTuple):
    title: str
    help: str
    run: Callable[[], object]


class Commanded(Protocol):
    """An app that says what can be done with it now."""

    def commands(self) -> Iterable[Command]: ...


class BoxCommands(Provider):
    async def discover(self) -> Hits:
        for command in self._commands():
            yield DiscoveryHit(command.title, command.run, help=command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in self._commands():
            if (score := matcher.match(command.title)) > 0:
                yield Hit(score, matcher.highlight(command.title), command.run, help=command.help)

    def _commands(self) -> Iterable[Command]:
        app: Commanded = self.app  # type: ignore[assignment]  # only our app names this provider
        return app.commands()
