"""Readings that may block, off the event loop: of a driver, of /proc, of a network mount.

Each kind has a thread of its own, so that a stalled driver leaves the others alone, and never two readings at once.
The threads are daemons and nobody waits long for them: one that hangs in the kernel must not keep the box from
stopping, which is what the loop's own executor would do.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dynamo_box.supervisor.waiting import done_within

STALLED_S = 5.0
CLOSE_S = 0.5
"""How long the end may wait for a reading that is under way."""

Value = TypeVar("Value")


class Background(Generic[Value]):
    """Calls `read` in a thread when asked to; `changed` is called on the loop after each reading, `failed` for one that
    raised. `finish` is called in the thread at the end.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Value],
        *,
        changed: Callable[[], None],
        failed: Callable[[str, Exception], None],
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._name = name
        self._read = read
        self._changed = changed
        self._failed = failed
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """True to read, False to end."""
        self._latest: Value | None = None
        self._asked_at: float | None = None
        self._ended: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def latest(self) -> Value | None:
        """What was read last; None before, after a failure, and once the next reading has stalled: it says "now"."""
        return None if self.is_stalled else self._latest

    @property
    def is_stalled(self) -> bool:
        return self._asked_at is not None and self._loop.time() - self._asked_at > STALLED_S

    def ask(self) -> None:
        """Read soon, unless a reading is under way or it is closed."""
        if self._closed:
            return
        if self._ended is None:
            self._ended = self._loop.create_future()
            threading.Thread(target=self._run, args=(self._ended,), name=self._name, daemon=True).start()
        if self._asked_at is None:
            self._asked_at = self._loop.time()
            self._orders.put(True)

    async def close(self) -> None:
        """No more readings; one that hangs is left to itself."""
        self._closed = True
        if self._ended is not None:
            self._orders.put(False)
            await done_within(self._ended, CLOSE_S)

    def _done(self, value: Value) -> None:
        self._asked_at, self._latest = None, value
        self._changed()

    def _broke(self, error: Exception) -> None:
        self._asked_at, self._latest = None, None
        self._failed(self._name, error)

    def _run(self, ended: asyncio.Future[None]) -> None:
        """The thread."""
        while self._orders.get():
            try:
                value = self._read()
            except Exception as error:  # noqa: BLE001 - told to whoever asked, on the loop
                self._on_loop(self._broke, error)
            else:
                self._on_loop(self._done, value)
        try:
            if self._finish is not None:
                self._finish()
        finally:
            self._on_loop(ended.set_result, None)

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: we hung, and the box has stopped without us
            self._loop.call_soon_threadsafe(function, *arguments)
