"""`POST /v1/models/{model}/sleep` and `/wake`: relayed to the supervisor, which carries them out and has the last word.

An act that was begun goes on when its client leaves, and when the time of this answer is up.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.types import Receive, Scope, Send

from dynamo_box.errors import ExitCode
from dynamo_box.frontend import errors
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.reply import Reply, read_body, request_id_of
from dynamo_box.frontend.serving import Serving
from dynamo_box.log import get_logger
from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.residency import Act as ActName
from dynamo_box.protocol.status import Asked, Told

MAX_DRAIN_S = 3600.0

_SLEEP_FIELDS = (
    "the fields are 'to' (device, host or disk), 'force' and 'hold' (true or false), "
    f"and 'drain_s' (seconds, at most {MAX_DRAIN_S:g})"
)
_WAKE_FIELDS = "a wake takes no options, so leave the body out"

_FIELD = re.compile(r"\$\.(\w+)|field `(\w+)`")

log = get_logger()


class SleepBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As `dynbox sleep`; `drain_s` seconds are what running requests get to finish."""

    to: Place | None = None
    force: bool = False
    hold: bool = False
    drain_s: Annotated[float, Meta(ge=0.0, le=MAX_DRAIN_S)] = 30.0


class WakeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wake takes no options."""


class Act:
    """The ASGI endpoint of one of the two."""

    def __init__(self, serving: Serving, act: ActName) -> None:
        self._serving = serving
        self._act: ActName = act

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, request_id_of(scope))
        try:
            if scope["method"] != "POST":
                raise errors.wrong_method(scope["method"], scope["path"], "POST")
            await reply.whole(await self._answer(scope["path_params"]["name"], receive), None)
        except ApiError as error:
            log.info("act refused", act=self._act, request_id=reply.request_id, status=error.status, why=error.message)
            await reply.fail(error)

    async def _answer(self, model: str, receive: Receive) -> bytes:
        """
        Raises:
            ApiError: it can't be asked for, or wasn't done.
        """
        serving = self._serving
        if serving.requests.draining:
            raise errors.draining()
        body = await read_body(receive, serving.spec.max_body_bytes)
        serving.require_model(model)
        asked = self._read(model, body)
        log.info("act", act=self._act, model=model, to=asked.to, force=asked.force, hold=asked.hold)
        told = await serving.asking.act(asked, serving.spec.wake_timeout_s + asked.drain_s)
        if told.code != ExitCode.OK:
            raise self._failure(model, told)
        return _done(model, told)

    def _read(self, model: str, body: bytes) -> Asked:
        """
        Raises:
            ApiError: the body is none of this act (400).
        """
        if self._act == "wake":
            _decode(WakeBody, body, _WAKE_FIELDS)
            return Asked(0, "wake", model, drain_s=0.0)
        wanted: SleepBody = _decode(SleepBody, body, _SLEEP_FIELDS)
        return Asked(0, "sleep", model, wanted.to, wanted.force, wanted.hold, wanted.drain_s)

    def _failure(self, model: str, told: Told) -> ApiError:
        """A conflict is what the client can do something about; the rest went wrong here."""
        residency = self._serving.sleepers.residency(model)
        serves_on = residency is not None and residency.state != "asleep"
        match told.code:
            case ExitCode.TIMED_OUT:
                status = 504
            case ExitCode.NOT_RUNNING:
                status = 503
            case ExitCode.USAGE:
                status = 409
            case _:
                status = 409 if self._act == "sleep" and serves_on else 500
        return errors.act_failed(status, f"{told.text}; {told.remedy}" if told.remedy else told.text)


def _decode(kind: type[Any], body: bytes, remedy: str) -> Any:
    try:
        return msgspec.json.decode(body.strip() or b"{}", type=kind)
    except msgspec.ValidationError as error:
        found = _FIELD.search(str(error))
        field = (found[1] or found[2]) if found else None
        raise errors.invalid_request(f"{error}; {remedy}", field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.invalid_request(f"the body is not valid JSON: {error}") from error


def _done(model: str, told: Told) -> bytes:
    where: dict[str, Any] = msgspec.to_builtins(told.residency) if told.residency is not None else {}
    return msgspec.json.encode({**where, "model": model, "text": told.text})
