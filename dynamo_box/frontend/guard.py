"""Who may ask at all: programs on this machine, and pages that this machine serves.

The frontend listens on loopback only, but a browser can be led there: by a page whose host name was rebound to
127.0.0.1 (its Host header gives it away), or by a foreign page that posts without asking (its Origin header does).
"""

from __future__ import annotations

import ipaddress
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_box.frontend import errors
from dynamo_box.frontend.reply import Reply, request_id_of

_AUTHORITY = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<name>[a-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?", re.IGNORECASE)
_LOOPBACK_V6 = ipaddress.IPv6Address("::1")
_ORIGIN = re.compile(r"https?://(?P<authority>.*)", re.IGNORECASE)


class LoopbackOnly:
    """Answers 403 to whoever came by another name; HTTP/1.0 clients may leave the Host header out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope.get("headers", ()):
            text = value.decode("latin-1")
            if name == b"host" and not is_loopback(text):
                problem = f"host {text!r} is not this machine's loopback; use 127.0.0.1 or localhost"
            elif name == b"origin" and not _is_loopback_origin(text):
                problem = f"pages of {text!r} may not use this server; only those of this machine may"
            else:
                continue
            await Reply(send, request_id_of(scope)).fail(errors.forbidden(problem))
            return
        await self._app(scope, receive, send)


def is_loopback(authority: str) -> bool:
    """Does `authority` (a name or address, perhaps with a port) mean this machine's loopback, whoever resolves it?"""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or int(match["port"] or 0) > 0xFFFF:
        return False
    try:
        if match["v6"] is not None:
            return ipaddress.IPv6Address(match["v6"]) == _LOOPBACK_V6
        name = match["name"].lower()
        if name in ("localhost", "localhost.") or name.endswith(".localhost"):
            return True
        return ipaddress.IPv4Address(name).is_loopback
    except ValueError:
        return False


def _is_loopback_origin(origin: str) -> bool:
    match = _ORIGIN.fullmatch(origin)
    return match is not None and is_loopback(match["authority"])
