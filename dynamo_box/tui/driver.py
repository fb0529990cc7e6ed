"""Textual's terminal, for one that may go away at any moment: a window that is closed, an ssh connection that breaks.

Textual writes in a thread, which ends at the first write that fails; the app then waits for it for ever as soon as its
queue is full, deaf to SIGHUP and SIGTERM, and outlives its terminal. Here nothing fails: what can't be written is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO, cast

from textual.drivers.linux_driver import LinuxDriver

if TYPE_CHECKING:
    from textual.app import App


class TerminalDriver(LinuxDriver):
    """Ends the app when its terminal is gone."""

    def __init__(
        self, app: App[None], *, debug: bool = False, mouse: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        lasting = LastingTerminal(cast(TextIO, self._file), lambda: app.call_later(app.exit))
        self._file = lasting  # type: ignore[assignment]  # all that the thread asks of a file


class LastingTerminal:
    """`file`, but for its failures: after the first one `gone` is called, once, and writing does nothing."""

    def __init__(self, file: TextIO, gone: Callable[[], object]) -> None:
        self._file = file
        self._gone = gone
        self._is_there = True

    def write(self, text: str) -> None:
        self._try(lambda: self._file.write(text))

    def flush(self) -> None:
        self._try(self._file.flush)

    def fileno(self) -> int:
        return self._file.fileno()

    def _try(self, write: Callable[[], object]) -> None:
        if not self._is_there:
            return
        try:
            write()
        except OSError:
            self._is_there = False
            self._gone()
