"""The service's end of the keeper socket: what it has committed is held by the supervisor too (`Keep`, acknowledged),
so that a successor gets it (`Adopt`) and nobody claims freed memory that somebody still holds (`Forget`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Sequence

import msgspec

from dynamo_box.protocol.descriptors import FdChannel
from dynamo_box.protocol.framing import FrameError
from dynamo_box.protocol.gms import (
    MAX_DESCRIPTORS,
    Adopt,
    EpochRecord,
    Forget,
    Keep,
    KeeperReply,
    Kept,
    keeper_reply_decoder,
)

ANSWER_DEADLINE_S = 30.0

Inheritance = list[tuple[EpochRecord, list[int]]]


class NotKept(Exception):
    """The supervisor could not hold, or let go of, what it was asked to; it has what it had."""


class Keeper:
    """Without a socket nothing outlives the service, and everything is answered at once."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._inherited: Inheritance = []
        self._parts: list[int] = []
        self._adopted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel: FdChannel[KeeperReply] | None = None
        if sock is None:
            self._adopted.set_result(None)
        else:
            self._channel = FdChannel(sock, keeper_reply_decoder, self._on_message, self._on_close)

    async def inherit(self) -> Inheritance:
        """What the predecessor had committed; the descriptors are the caller's.

        Raises:
            NotKept: the supervisor doesn't say.
        """
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                await self._adopted
        except TimeoutError as error:
            raise NotKept(f"the supervisor has not said within {ANSWER_DEADLINE_S:g} s what it keeps") from error
        inherited, self._inherited = self._inherited, []
        return inherited

    async def keep(self, record: EpochRecord, descriptors: Sequence[int]) -> None:
        """Returns once the supervisor holds duplicates, and has closed what it held of this layout before.

        Raises:
            NotKept
        """
        if self._channel is None:
            return
        number = next(self._numbers)
        # Only the last part's record counts, so the others go without the entries, which are the most of it.
        without = msgspec.structs.replace(record, entries=())
        step = MAX_DESCRIPTORS
        try:
            for start in range(0, max(len(descriptors), 1), step):
                part = descriptors[start : start + step]
                more = start + step < len(descriptors)
                self._channel.send(Keep(number, without if more else record, more, len(part)), part)
        except FrameError as error:
            raise NotKept(str(error)) from error
        await self._answer(number)

    async def forget(self, layout: str) -> None:
        """Returns once the supervisor has closed what it held of it.

        Raises:
            NotKept
        """
        if self._channel is None:
            return
        number = next(self._numbers)
        self._channel.send(Forget(number, layout))
        await self._answer(number)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._drop()

    async def _answer(self, number: int) -> None:
        assert self._channel is not None
        if not self._channel.is_open:
            raise NotKept("the supervisor has closed the keeper socket")
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                await answer
        except TimeoutError as error:
            raise NotKept(f"the supervisor has not answered within {ANSWER_DEADLINE_S:g} s") from error
        finally:
            del self._waiting[number]

    def _on_message(self, channel: FdChannel[KeeperReply], message: KeeperReply, descriptors: list[int]) -> None:
        if isinstance(message, Kept):
            answer = self._waiting.get(message.number)
            if answer is None or answer.done():
                return
            if message.error:
                answer.set_exception(NotKept(message.error))
            else:
                answer.set_result(None)
        elif self._adopted.done():
            _close_all(descriptors)
            channel.abort(FrameError("an epoch to adopt, after the last one"))
        elif isinstance(message, Adopt):
            self._parts += descriptors
            if not message.more:
                self._inherited.append((message.record, self._parts))
                self._parts = []
        else:
            self._adopted.set_result(None)

    def _on_close(self, _channel: FdChannel[KeeperReply], reason: Exception | None) -> None:
        gone = NotKept(f"the keeper socket has closed: {reason or 'its other end is gone'}")
        for answer in (self._adopted, *self._waiting.values()):
            if not answer.done():
                answer.set_exception(gone)
        if not self._adopted.cancelled():
            self._adopted.exception()  # nobody may be waiting for it any more

    def _drop(self) -> None:
        _close_all(self._parts)
        for _, descriptors in self._inherited:
            _close_all(descriptors)
        self._parts, self._inherited = [], []


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
