"""The JSON and the server-sent events of an answer. What never changes within a stream is encoded once."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from dynamo_box.frontend.errors import ApiError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Writer:
    """One answer's frames: events of a stream, or the whole body."""

    def __init__(self, request_id: str, model: str, chat: bool) -> None:
        self._chat = chat
        self._head: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + request_id,
            "created": int(time.time()),
            "model": model,
        }
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = _encode({**self._head, "object": kind})[:-1]
        if chat:
            self._before = b"data: " + head + b',"choices":[{"index":0,"delta":{"content":'
            self._after = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        else:
            self._before = b"data: " + head + b',"choices":[{"index":0,"text":'
            self._after = b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._opening = (
            b"data: "
            + head
            + (
                b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
            )
        )
        self._chunk_head = {**self._head, "object": kind}

    def opening(self) -> bytes:
        """The event that names the role; completions have none."""
        return self._opening if self._chat else b""

    def text(self, text: str) -> bytes:
        return self._before + _encode(text) + self._after

    def ending(self, finish: str, extension: dict[str, Any] | None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice["delta" if self._chat else "text"] = {} if self._chat else ""
        return self._event({"choices": [choice]}, extension)

    def usage(self, usage: Usage) -> bytes:
        return self._event({"choices": [], "usage": usage.body()}, None)

    def _event(self, content: dict[str, Any], extension: dict[str, Any] | None) -> bytes:
        content = {**self._chunk_head, **content}
        if extension:
            content["nvext"] = extension
        return b"data: " + _encode(content) + b"\n\n"

    def whole(self, text: str, finish: str, usage: Usage, extension: dict[str, Any] | None) -> bytes:
        """The body of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        body: dict[str, Any] = {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [choice],
            "usage": usage.body(),
        }
        if extension:
            body["nvext"] = extension
        return _encode(body)


def comment(text: str) -> bytes:
    """Not an event: clients pass over it."""
    return b": " + " ".join(text.split()).encode() + b"\n\n"


def failure(error: ApiError) -> bytes:
    """An error in mid-stream; the stream ends after it, without [DONE]."""
    return b"data: " + error.body() + b"\n\n"
