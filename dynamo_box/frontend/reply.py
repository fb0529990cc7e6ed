"""One HTTP answer over plain ASGI: an error becomes a status while nothing has been said, and an event after that."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from dynamo_box.frontend import errors, stream
from dynamo_box.frontend.errors import ApiError

JSON = (b"content-type", b"application/json")
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))

LAST_WORDS_S = 5.0

_SANE_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class Reply:
    """`sending` is true while the client is slow to read (and stays so when that wait was cut off)."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.started = False
        self.finished = False
        self.sending = False

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]], worker: str | None) -> None:
        self.started = True
        every = [*headers, (b"x-request-id", self.request_id.encode())]
        if worker is not None:
            every.append((b"x-dynbox-worker", worker.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": every})

    async def send(self, data: bytes, more: bool = True) -> None:
        self.sending = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.sending = False
        self.finished = not more

    async def comment(self, text: str) -> None:
        """One that a client of the stream passes over, as a sign of life; it begins the stream."""
        if not self.started:
            await self.start(200, EVENTS, None)
        await self.send(stream.comment(text))

    async def whole(self, body: bytes, worker: str | None) -> None:
        await self.start(200, (JSON, (b"content-length", b"%d" % len(body))), worker)
        await self.send(body, more=False)

    async def fail(self, error: ApiError) -> None:
        """The last words, unless some were said or the client does not even read these."""
        if self.finished or self.sending:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._fail(error)

    async def _fail(self, error: ApiError) -> None:
        if self.started:
            await self.send(stream.failure(error), more=False)
            return
        body = error.body()
        headers = [JSON, (b"content-length", b"%d" % len(body))]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after_s))
        if error.allow is not None:
            headers.append((b"allow", error.allow.encode()))
        if not error.again:
            headers.append((b"x-should-retry", b"false"))  # OpenAI's clients heed it
        if error.status in (413, 503):
            headers.append((b"connection", b"close"))
        await self.start(error.status, headers, None)
        await self.send(body, more=False)


def request_id_of(scope: Scope) -> str:
    """The client's own `x-request-id` if it is sane, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _SANE_REQUEST_ID.fullmatch(given):
                return given
    return uuid.uuid4().hex


async def read_body(receive: Receive, cap: int) -> bytes:
    """
    Raises:
        ApiError: more than `cap` bytes (413), or the client left.
    """
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.client_gone()
        piece = message.get("body", b"")
        size += len(piece)
        if size > cap:
            raise errors.body_too_large(cap)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)
