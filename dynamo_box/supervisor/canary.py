"""The proof that a model answers: one real completion of one token, through the endpoint, as a client would
ask.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

from dynamo_box.errors import BoxError, TimedOut

DEADLINE_S = 60.0
_NOT_YET = (404, 503)
"""The frontend learns of a worker from its instance file, a moment after the worker is ready."""
_RETRY_S = 0.03


async def one_token(endpoint: str, model: str, deadline_s: float = DEADLINE_S) -> float:
    """Ask until the model answers; return the seconds that it took.

    Raises:
        TimedOut: it didn't within the deadline.
        BoxError: the answer was an error, or no completion.
    """
    began = time.monotonic()
    last = "no answer"
    while (left_s := deadline_s - (time.monotonic() - began)) > 0:
        try:
            status, body = await asyncio.to_thread(_post, endpoint, model, left_s)
        except TimeoutError:
            break
        except (OSError, http.client.HTTPException) as error:
            status, body = 503, str(error) or type(error).__name__
        if status == http.client.OK and isinstance(body, dict) and body.get("choices"):
            return time.monotonic() - began
        last = f"HTTP {status}: {_message(body)}"
        if status not in _NOT_YET:
            raise BoxError(f"model {model} doesn't answer: {last}", remedy="see `dynbox logs`")
        await asyncio.sleep(_RETRY_S)
    raise TimedOut(f"model {model} gave no token within {deadline_s:g} s (last: {last})", remedy="see `dynbox logs`")


def _post(endpoint: str, model: str, timeout_s: float) -> tuple[int, Any]:
    """In a thread. When the start is called off, the frontend ends and with it this connection."""
    where = urlsplit(endpoint)
    connection = http.client.HTTPConnection(where.hostname or "127.0.0.1", where.port, timeout=timeout_s)
    try:
        body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0})
        headers = {"Content-Type": "application/json", "X-Request-Id": f"canary-{model}"}
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    try:
        return response.status, json.loads(data)
    except ValueError:
        return response.status, data[:200].decode("utf-8", "replace")


def _message(body: Any) -> str:
    """The text in an OpenAI-shaped error, else the body as it is."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])
    return str(body)[:300]
