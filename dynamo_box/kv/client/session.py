"""One connection to the kvstore: requests with ids, answers in any order, a limit for each. Used by one thread.

StoreFailure
├─ StoreGone     it ended, doesn't answer in time, or talks nonsense; another connection may do better
└─ StoreRefused  it said no; `permanent` if it always will
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.framing import FrameError, connect_unix, peer_uid
from dynamo_box.protocol.kv import (
    Attach,
    Attached,
    Committed,
    Found,
    Held,
    KvLayout,
    Loaded,
    Refused,
    Reserved,
    StoreReply,
    WorkerRequest,
    reply_decoder,
)

SEND_TIMEOUT_S = 1.0
"""What we send is small: a socket that takes none of it for so long has nobody behind it."""

Answer = Reserved | Committed | Found | Held | Loaded
A = TypeVar("A", Reserved, Committed, Found, Held, Loaded)


class StoreFailure(Exception):
    pass


class StoreGone(StoreFailure):
    pass


class StoreRefused(StoreFailure):
    def __init__(self, text: str, permanent: bool) -> None:
        super().__init__(text)
        self.permanent = permanent


class StoreSession:
    """After a StoreFailure it is of no further use but `close`."""

    def __init__(self, channel: BlockingFdChannel[StoreReply]) -> None:
        self._channel = channel
        self._last_id = 0
        self._awaited: set[int] = set()
        self._unwanted: set[int] = set()
        self._answers: dict[int, Answer] = {}

    @classmethod
    def connect(cls, path: Path, owner: str, layout: KvLayout) -> StoreSession:
        """Connected, with the Attach sent. Doesn't wait for the store.

        Raises:
            StoreGone: nobody of ours listens there, or too many wait to be heard.
        """
        try:
            sock = connect_unix(path, SEND_TIMEOUT_S)
            uid = peer_uid(sock)
        except OSError as error:
            raise StoreGone(f"no kvstore at {path}: {error}") from error
        session = cls(BlockingFdChannel(sock, reply_decoder))
        try:
            if uid != os.getuid():
                raise StoreGone(f"{path} belongs to uid {uid}: not a kvstore of ours")
            session.tell(Attach(PROTOCOL_VERSION, owner, layout))
        except BaseException:
            session.close()
            raise
        return session

    def attached(self) -> tuple[Attached, int] | None:
        """The answer to the Attach and the arena's descriptor, which is the caller's; None if it isn't here yet."""
        came = self._receive(0.0)
        if came is None:
            return None
        message, fds = came
        if isinstance(message, Attached) and len(fds) == 1:
            return message, fds[0]
        for fd in fds:
            os.close(fd)
        raise self._nonsense(message, "Attached")

    def post(self, request: Callable[[int], WorkerRequest]) -> int:
        """Send what will be answered; `request` makes it from its id, which is returned."""
        self._last_id += 1
        self._awaited.add(self._last_id)
        self.tell(request(self._last_id))
        return self._last_id

    def tell(self, message: WorkerRequest) -> None:
        """Send it.

        Raises:
            StoreGone
        """
        try:
            self._channel.send(message, timeout_s=SEND_TIMEOUT_S)
        except (OSError, FrameError) as error:
            raise StoreGone(f"the kvstore doesn't listen any more: {error}") from error

    @property
    def unanswered(self) -> int:
        """Questions that the store still works on, as far as we know."""
        return len(self._awaited) + len(self._unwanted)

    def pump(self) -> None:
        """Take in what has come.

        Raises:
            StoreFailure
        """
        while (came := self._receive(0.0)) is not None:
            self._sort(*came)

    def awaits(self, number: int) -> bool:
        """Whether the answer to request `number` hasn't been taken in."""
        return number in self._awaited

    def taken(self, number: int, kind: type[A]) -> A | None:
        """The answer to request `number`, once; None while it isn't here."""
        answer = self._answers.pop(number, None)
        if answer is None or isinstance(answer, kind):
            return answer
        raise self._nonsense(answer, kind.__name__)

    def call(self, request: Callable[[int], WorkerRequest], kind: type[A], limit_s: float) -> A:
        """The answer.

        Raises:
            StoreGone: not within `limit_s`.
            StoreRefused
        """
        number = self.post(request)
        deadline = time.monotonic() + limit_s
        while (answer := self.taken(number, kind)) is None:
            came = self._receive(max(deadline - time.monotonic(), 0.0))
            if came is None:
                raise StoreGone(f"the kvstore has not answered for {limit_s:g} s")
            self._sort(*came)
        return answer

    def forget(self, number: int) -> None:
        """The answer to this request is not wanted any more."""
        if number in self._awaited:
            self._awaited.discard(number)
            self._unwanted.add(number)
        self._answers.pop(number, None)

    def fileno(self) -> int:
        return self._channel.fileno()

    def interrupt(self) -> None:
        """From another thread: what waits here raises StoreGone."""
        self._channel.interrupt()

    def close(self) -> None:
        self._channel.close()

    def _receive(self, timeout_s: float) -> tuple[StoreReply, list[int]] | None:
        try:
            came = self._channel.receive(timeout_s)
        except TimeoutError:
            return None
        except (OSError, FrameError) as error:
            raise StoreGone(f"the connection to the kvstore broke: {error}") from error
        if came is None:
            raise StoreGone("the kvstore has ended")
        if isinstance(came[0], Refused):
            raise StoreRefused(f"the kvstore refuses: {came[0].reason}", came[0].permanent)
        return came

    def _sort(self, message: StoreReply, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        if isinstance(message, Attached | Refused):
            raise self._nonsense(message, "an answer")
        if message.id in self._unwanted:
            self._unwanted.discard(message.id)
        elif message.id in self._awaited:
            self._awaited.discard(message.id)
            self._answers[message.id] = message
        else:
            raise StoreGone(f"the kvstore answers a question {message.id} that was not asked")

    def _nonsense(self, message: object, expected: str) -> StoreGone:
        return StoreGone(f"the kvstore answers {type(message).__name__} instead of {expected}")
