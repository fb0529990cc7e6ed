"""One streamed chat completion over HTTP with the standard library alone, for the start time it saves.

The reader is strict about the end: a stream that closes before `[DONE]` is an answer that broke off, not a short one.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from dynamo_box.errors import BoxError, NotRunning, TimedOut

READ_TIMEOUT_S = 120.0
MAX_EVENT = 1024 * 1024
_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class _ApiError(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Nvext(msgspec.Struct):
    worker_id: str | int | dict[str, object] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _ApiError | None = None
    nvext: _Nvext | None = None


class _ErrorBody(msgspec.Struct):
    error: _ApiError


_chunks = msgspec.json.Decoder(_Chunk)


@dataclass
class Answer:
    """Grows while it is streamed. Times are seconds since the request left."""

    text: str = ""
    worker: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    first_at: float | None = None
    last_at: float | None = None
    pieces: int = field(default=0, repr=False)

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed: tokens after the first, over the time since the first."""
        tokens = self.usage.completion_tokens if self.usage else self.pieces
        if self.first_at is None or self.last_at is None or tokens < 2 or self.last_at <= self.first_at:
            return None
        return (tokens - 1) / (self.last_at - self.first_at)


def stream_chat(endpoint: str, body: dict[str, object], answer: Answer) -> Generator[str, None, None]:
    """Send `body` and yield the text as it comes, filling `answer`. Closing the iterator cancels the request.

    Raises:
        BoxError: the server refused, failed, or broke off; TimedOut when it fell silent.
    """
    address = urlsplit(endpoint)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=READ_TIMEOUT_S)
    began = time.monotonic()
    try:
        request = {
            **body,
            "stream": True,
            "stream_options": {"include_usage": True},
            "nvext": {"extra_fields": ["worker_id"]},
        }
        connection.request(
            "POST", "/v1/chat/completions", msgspec.json.encode(request), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise _refusal(response)
        answer.worker = response.getheader("x-dynbox-worker")
        for data in _events(response):
            if data == _DONE:
                return
            text = _take(_chunks.decode(data), answer)
            if text:
                answer.last_at = time.monotonic() - began
                answer.first_at = answer.last_at if answer.first_at is None else answer.first_at
                yield text
        raise BoxError("the answer broke off: the connection closed before it was complete", remedy=_LOGS)
    except TimeoutError as error:
        raise TimedOut(f"nothing came for {READ_TIMEOUT_S:.0f} s", remedy=_LOGS) from error
    except ConnectionRefusedError as error:
        raise NotRunning(f"nobody answers at {endpoint}", remedy="see `dynbox ps`") from error
    except (http.client.HTTPException, OSError, msgspec.DecodeError) as error:
        raise BoxError(f"the answer broke off: {error or type(error).__name__}", remedy=_LOGS) from error
    finally:
        connection.close()


_LOGS = "see `dynbox ps` and `dynbox logs frontend`"


def _take(chunk: _Chunk, answer: Answer) -> str:
    """Put a chunk into the answer; returns its text."""
    if chunk.error is not None:
        raise BoxError(chunk.error.message or "the server reported an error", remedy=_LOGS)
    if chunk.usage is not None:
        answer.usage = chunk.usage
    if chunk.nvext is not None and chunk.nvext.worker_id is not None and answer.worker is None:
        answer.worker = str(chunk.nvext.worker_id)
    if not chunk.choices:
        return ""
    choice = chunk.choices[0]
    answer.finish_reason = choice.finish_reason or answer.finish_reason
    text = choice.delta.content or ""
    answer.text += text
    answer.pieces += bool(text)
    return text


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of server-sent events; comments and other fields are passed over."""
    while line := response.readline(MAX_EVENT + 1):
        if len(line) > MAX_EVENT:
            raise BoxError(f"the server sent a line of more than {MAX_EVENT} bytes")
        if line.startswith(b"data:"):
            yield line[5:].strip()


def _refusal(response: http.client.HTTPResponse) -> BoxError:
    text = response.read(64 * 1024)
    try:
        message = msgspec.json.decode(text, type=_ErrorBody).error.message
    except msgspec.DecodeError:
        message = text.decode("utf-8", "replace").strip()
    return BoxError(f"the server answered {response.status}: {message or response.reason}")
