"""Who may ask at all: programs on this machine, and pages that this machine serves.

The frontend listens on loopback only, but a browser can be led there: by a page whose host name was rebound to
127.0.0.1 (its Host header gives it away), or by a foreign page that posts without asking (its Origin header does).
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_box.frontend import errors
from dynamo_box.frontend.reply import Reply, request_id_of

_NAME = r"(localhost|127(\.\d{1,3}){3}|\[::1\]|[\w.-]+\.localhost)(:\d+)?"
_HOST = re.compile(_NAME, re.IGNORECASE)
_ORIGIN = re.compile(rf"https?://{_NAME}", re.IGNORECASE)


class LoopbackOnly:
    """Answers 403 to whoever came by another name; HTTP/1.0 clients may leave the Host header out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope.get("headers", ()):
            text = value.decode("latin-1")
            if name == b"host" and not _HOST.fullmatch(text):
                problem = f"host {text!r} is not this machine's loopback; use 127.0.0.1 or localhost"
            elif name == b"origin" and not _ORIGIN.fullmatch(text):
                problem = f"pages of {text!r} may not use this server; only those of this machine may"
            else:
                continue
            await Reply(send, request_id_of(scope)).fail(errors.forbidden(problem))
            return
        await self._app(scope, receive, send)
