"""Numbered commands to a child, and the answers to them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TypeVar

from dynamo_box.errors import BoxError, NotRunning, TimedOut
from dynamo_box.protocol import status

MAX_PENDING = 64

Reply = status.Answer | status.Slept | status.Woken | status.Moved
R = TypeVar("R", status.Answer, status.Slept, status.Woken, status.Moved)


class Questions:
    """`name` is the child's, for errors."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}

    async def ask(
        self,
        send: Callable[[status.ParentMessage], None],
        make: Callable[[int], status.ParentMessage],
        kind: type[R],
        timeout_s: float,
    ) -> R:
        """Send what `make` makes of a number, and wait for its answer.

        Raises:
            NotRunning: the child ended before it answered.
            TimedOut: no answer in time.
            BoxError: too many wait already, or the answer is of another kind.
        """
        if len(self._waiting) >= MAX_PENDING:
            raise BoxError(f"{self._name} has {MAX_PENDING} unanswered commands already")
        number = next(self._numbers)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            send(make(number))
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError:
            raise TimedOut(f"{self._name} didn't answer within {timeout_s:g} s") from None
        finally:
            del self._waiting[number]
        if not isinstance(reply, kind):
            raise BoxError(f"{self._name} answered with {type(reply).__name__}, which doesn't fit the question")
        return reply

    def answered(self, reply: Reply) -> None:
        """One that nobody waits for any more is passed over."""
        waiting = self._waiting.get(reply.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def child_ended(self) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(NotRunning(f"{self._name} ended before it answered"))
