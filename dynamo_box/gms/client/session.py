"""One connection to the server: a call, its answer, and what they cost. Its end gives back the lock.

A session is used by one thread at a time. After ServerGone it is of no further use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dynamo_box.gms.client.errors import GmsFailure, LockTimeout, ServerGone, refusal
from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.framing import FrameError, connect_unix
from dynamo_box.protocol.gms import (
    MAX_DESCRIPTORS,
    MAX_ENTRIES_A_PAGE,
    Acquire,
    Allocate,
    Allocated,
    Allocation,
    Commit,
    Describe,
    Done,
    EngineMessage,
    Entry,
    Export,
    Exported,
    GmsError,
    Granted,
    Lock,
    Manifest,
    Put,
    Queued,
    Release,
    ServerMessage,
    server_decoder,
)

ANSWER_TIMEOUT_S = 30.0
"""For what the server does at once."""
COMMIT_TIMEOUT_S = 120.0
"""It seals the epoch, gives up the one before, and has the supervisor keep the new one."""
ALLOCATE_TIMEOUT_S = 300.0
"""The kernel clears every page of it."""
MAX_ENTRIES = 1_000_000

A = TypeVar("A")


class GmsSession:
    """`round_trips`, `bytes_sent` and `bytes_received` count what went over the socket."""

    def __init__(self, channel: BlockingFdChannel[ServerMessage], owner: str) -> None:
        self._channel = channel
        self._owner = owner
        self.round_trips = 0

    @classmethod
    def connect(cls, path: Path, owner: str, timeout_s: float = 5.0) -> GmsSession:
        """Raises:
        ServerGone: nobody listens there.
        """
        try:
            return cls(BlockingFdChannel(connect_unix(path, timeout_s), server_decoder), owner)
        except OSError as error:
            raise ServerGone(f"no server of weight memory at {path}: {error}") from error

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received

    def acquire(
        self,
        layout: str,
        lock: Lock,
        *,
        timeout_s: float,
        content: str = "",
        expect_hash: str = "",
        make_room: bool = False,
        waiting: Callable[[Queued], None] | None = None,
    ) -> Granted:
        """Wait for the lock for at most `timeout_s`; `waiting` hears once a second what is in the way.

        Raises:
            LockTimeout: not in time.
            StaleLayout: with `expect_hash`, another layout is committed.
            Asleep: the layout's bytes are not on the device.
        """
        self._send(
            Acquire(
                version=PROTOCOL_VERSION,
                owner=self._owner,
                layout=layout,
                lock=lock,
                content=content,
                expect_hash=expect_hash,
                timeout_s=timeout_s,
                make_room=make_room,
            )
        )
        deadline = time.monotonic() + timeout_s + ANSWER_TIMEOUT_S
        while True:
            message, fds = self._receive(deadline)
            if not isinstance(message, Queued):
                return self._expect(Granted, message, fds)[0]
            if time.monotonic() > deadline:
                raise LockTimeout(f"{message.holder} holds {layout}, and {message.ahead} wait before us", "timeout")
            if waiting is not None:
                waiting(message)

    def allocate(self, sizes: Sequence[int]) -> list[tuple[Allocation, int]]:
        """Memory of the epoch under construction, with a descriptor each that is the caller's.

        Raises:
            OutOfMemory: not for all of them; none is left allocated once the session ends.
        """
        got: list[tuple[Allocation, int]] = []
        try:
            for start in range(0, len(sizes), MAX_DESCRIPTORS):
                part = tuple(sizes[start : start + MAX_DESCRIPTORS])
                answer, fds = self._call(Allocate(part), Allocated, ALLOCATE_TIMEOUT_S)
                if not len(answer.allocations) == len(fds) == len(part):
                    _close_all(fds)
                    raise self._nonsense(f"{len(answer.allocations)} allocations for {len(part)}")
                got += zip(answer.allocations, fds, strict=True)
        except BaseException:
            _close_all([fd for _, fd in got])
            raise
        return got

    def put(self, entries: Sequence[Entry]) -> None:
        for start in range(0, len(entries), MAX_ENTRIES_A_PAGE):
            self._call(Put(tuple(entries[start : start + MAX_ENTRIES_A_PAGE])), Done)

    def commit(self) -> Granted:
        """Everything must be unmapped. From here on the session holds a reader's lock on the new epoch."""
        return self._call(Commit(), Granted, COMMIT_TIMEOUT_S)[0]

    def describe(self) -> tuple[tuple[Allocation, ...], list[Entry]]:
        """The whole manifest."""
        entries: list[Entry] = []
        while True:
            page, _ = self._call(Describe(len(entries)), Manifest)
            entries += page.entries
            if not page.more:
                return page.allocations, entries
            if not page.entries or len(entries) > MAX_ENTRIES:
                raise self._nonsense(f"a manifest without an end after {len(entries)} entries")

    def export(self, ids: Sequence[int]) -> list[int]:
        """Descriptors for these allocations, which are the caller's."""
        got: list[int] = []
        try:
            for start in range(0, len(ids), MAX_DESCRIPTORS):
                part = tuple(ids[start : start + MAX_DESCRIPTORS])
                answer, fds = self._call(Export(part), Exported)
                got += fds
                if answer.ids != part or len(fds) != len(part):
                    raise self._nonsense(f"{len(fds)} descriptors for {len(part)} allocations")
        except BaseException:
            _close_all(got)
            raise
        return got

    def release(self) -> None:
        """Give back the lock; the session may acquire again."""
        self._call(Release(), Done)

    def fileno(self) -> int:
        """Readable at any moment between calls means that the server is gone: it speaks only when spoken to."""
        return self._channel.fileno()

    def interrupt(self) -> None:
        """From another thread: what waits for an answer raises ServerGone."""
        self._channel.interrupt()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> GmsSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, request: EngineMessage, kind: type[A], timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[A, list[int]]:
        self._send(request)
        return self._expect(kind, *self._receive(time.monotonic() + timeout_s))

    def _send(self, request: EngineMessage) -> None:
        try:
            self._channel.send(request)
        except OSError as error:
            raise ServerGone(f"the server of weight memory doesn't listen any more: {error}") from error

    def _receive(self, deadline: float) -> tuple[ServerMessage, list[int]]:
        try:
            came = self._channel.receive(max(deadline - time.monotonic(), 0.0))
        except (OSError, FrameError) as error:  # TimeoutError is an OSError
            raise ServerGone(f"the server of weight memory doesn't answer: {error}") from error
        if came is None:
            raise ServerGone("the server of weight memory has ended")
        return came

    def _expect(self, kind: type[A], message: ServerMessage, fds: list[int]) -> tuple[A, list[int]]:
        self.round_trips += 1
        if isinstance(message, kind):
            return message, fds
        _close_all(fds)
        if isinstance(message, GmsError):
            raise refusal(message)
        raise self._nonsense(f"{type(message).__name__} instead of {kind.__name__}")

    def _nonsense(self, text: str) -> GmsFailure:
        return ServerGone(f"the server of weight memory answers {text}")


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
