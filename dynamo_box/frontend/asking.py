"""What this frontend asks of the supervisor, over the one status socket: each Asked has a number, and its Told carries
that back. A Told that nobody waits for any more is dropped.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import msgspec

from dynamo_box.frontend import errors
from dynamo_box.protocol.status import Asked, ChildMessage, Told

MAX_ACTS = 64
"""Sleeps and wakes of clients under way at once; one more gets a 503."""


class Asking:
    def __init__(self, tell: Callable[[ChildMessage], None]) -> None:
        self._tell = tell
        self._numbers = itertools.count(1)
        self._open: dict[int, Callable[[Told], None]] = {}
        self._acts: set[asyncio.Future[Told]] = set()
        self._closed = False

    def ask(self, asked: Asked, on_told: Callable[[Told], None]) -> int:
        """Send it, with a number of its own; `on_told` is called at most once, unless `forget` comes first."""
        number = next(self._numbers)
        self._open[number] = on_told
        self._tell(msgspec.structs.replace(asked, id=number))
        return number

    def forget(self, number: int) -> None:
        self._open.pop(number, None)

    def told(self, told: Told) -> None:
        on_told = self._open.pop(told.id, None)
        if on_told is not None:
            on_told(told)

    async def act(self, asked: Asked, timeout_s: float) -> Told:
        """Ask, and wait for the answer.

        Raises:
            ApiError: too many are under way, or the process stops (503), or no answer came in time (504).
        """
        if self._closed:
            raise errors.draining()
        if len(self._acts) >= MAX_ACTS:
            raise errors.too_many_acts(MAX_ACTS)
        answer: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._acts.add(answer)
        number = self.ask(asked, lambda told: None if answer.done() else answer.set_result(told))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise errors.act_timed_out(asked.act, asked.model, timeout_s) from error
        finally:
            self.forget(number)
            self._acts.discard(answer)

    def close(self) -> None:
        """The process stops: nobody is told anything any more."""
        self._closed = True
        self._open.clear()
        for answer in self._acts:
            if not answer.done():
                answer.set_exception(errors.draining())
