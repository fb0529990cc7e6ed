"""The routes. Generation is plain ASGI, since the token path is where the frontend spends its time."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_box.frontend import errors, stream
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.intake import Task, read_chat, read_completion
from dynamo_box.frontend.output import Output
from dynamo_box.frontend.preprocess import prepare
from dynamo_box.frontend.requests import Requests
from dynamo_box.frontend.routing import RouterClient
from dynamo_box.frontend.stats import RequestStats
from dynamo_box.frontend.tokenizer import ModelTokenizer
from dynamo_box.frontend.workers import Mailbox, Workers
from dynamo_box.log import get_logger
from dynamo_box.protocol.spec import FrontendSpec

_SANE_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\]|[\w.-]+\.localhost)(:\d+)?", re.IGNORECASE)
_JSON = (b"content-type", b"application/json")
_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))

log = get_logger()


class Service:
    """What the routes share. `draining` turns new requests away."""

    def __init__(
        self,
        spec: FrontendSpec,
        tokenizers: dict[str, ModelTokenizer],
        requests: Requests,
        router: RouterClient,
        workers: Workers,
    ) -> None:
        self.spec = spec
        self.tokenizers = tokenizers
        self.requests = requests
        self.router = router
        self.workers = workers
        self.draining = False

    @property
    def models(self) -> tuple[str, ...]:
        """Those that can answer now, in the profile's order."""
        served = self.workers.served_models if self.router.connected.is_set() else set()
        return tuple(model.name for model in self.spec.models if model.name in served)

    def unhealthy(self) -> list[str]:
        reasons = [
            f"no worker serves {model.name}"
            for model in self.spec.models
            if model.name not in self.workers.served_models
        ]
        if not self.router.connected.is_set():
            reasons.append("the router is not connected")
        if self.draining:
            reasons.append("this server is shutting down")
        return reasons


def make_app(service: Service) -> ASGIApp:
    def models(_: Request) -> Response:
        return _json({"object": "list", "data": [_model(name) for name in service.models]})

    def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.models:
            raise errors.unknown_model(name, service.models)
        return _json(_model(name))

    def health(_: Request) -> Response:
        reasons = service.unhealthy()
        body = {"status": "unhealthy" if reasons else "healthy", "reasons": reasons, "models": service.models}
        return _json(body, 503 if reasons else 200)

    def live(_: Request) -> Response:
        return _json({"status": "live"})

    def metrics(_: Request) -> Response:
        stats = service.requests.stats
        stats.refresh_gauges(tuple(model.name for model in service.spec.models))
        return Response(generate_latest(stats.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def on_http_error(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            return _failed(errors.wrong_method(request.method, request.url.path, allowed))
        return _failed(errors.unknown_path(request.method, request.url.path))

    async def on_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return _failed(error)

    routes = [
        Route("/v1/chat/completions", _Generation(service, "chat_completions", read_chat), methods=["POST"]),
        Route("/v1/completions", _Generation(service, "completions", read_completion), methods=["POST"]),
        Route("/v1/models", _async(models)),
        Route("/v1/models/{name:path}", _async(model)),
        Route("/health", _async(health)),
        Route("/live", _async(live)),
        Route("/metrics", _async(metrics)),
    ]
    handlers: Any = {HTTPException: on_http_error, ApiError: on_api_error}
    return _LoopbackOnly(Starlette(routes=routes, exception_handlers=handlers))


def _async(handler: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Starlette runs plain functions in threads; these are too short for that."""

    async def handle(request: Request) -> Response:
        return handler(request)

    return handle


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _failed(error: ApiError) -> Response:
    return Response(error.body(), error.status, media_type="application/json")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "dynamo_box"}


class _LoopbackOnly:
    """Turns away requests for other host names: a page that rebinds its name to 127.0.0.1 must not get through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not _LOOPBACK_NAMES.fullmatch(host):
                error = errors.forbidden(f"host {host!r} is not this machine's loopback; use 127.0.0.1 or localhost")
                await _failed(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Generation:
    """The ASGI endpoint of one kind of completion."""

    def __init__(self, service: Service, endpoint: str, read: Callable[[bytes], Task]) -> None:
        self._service = service
        self._endpoint = endpoint
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope)
        reply = _Reply(send, request_id)
        try:
            if self._service.draining:
                raise errors.draining()
            body = await _read_body(receive, self._service.spec.max_body_bytes)
            task = self._read(body)
            if task.model not in self._service.tokenizers:
                raise errors.unknown_model(task.model, self._service.models)
            await self._admitted(task, request_id, receive, reply)
        except ApiError as error:
            log.info("request refused", request_id=request_id, status=error.status, reason=error.message)
            await reply.fail(error)

    async def _admitted(self, task: Task, request_id: str, receive: Receive, reply: _Reply) -> None:
        requests = self._service.requests
        if requests.active >= self._service.spec.max_queue:
            raise errors.overloaded(self._service.spec.max_queue)
        if request_id in requests.stats.live:
            raise errors.invalid_request(f"request id {request_id} is in use by a live request")
        request = requests.stats.begin(request_id, task.model, self._endpoint, task.stream)
        mailbox = requests.open(request_id)
        watcher = asyncio.create_task(_watch_for_disconnect(receive, mailbox))
        status = 500
        try:
            try:
                await self._generate(task, request, mailbox, reply)
                status = 200
            except ApiError as error:
                status = error.status
                await reply.fail(error)
            except Exception:
                log.exception("a request failed in the frontend", request_id=request_id)
                await reply.fail(errors.internal(request_id))
        except OSError:
            status = 499
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            watcher.cancel()
            requests.close(request_id)
            requests.stats.end(request, status)
            _log_end(request, status)

    async def _generate(self, task: Task, request: RequestStats, mailbox: Mailbox, reply: _Reply) -> None:
        requests = self._service.requests
        instance = await requests.wait_for_instance(task.model)
        tokenizer = self._service.tokenizers[task.model]
        prompt = await prepare(task, tokenizer, instance)
        request.prompt_tokens = prompt.count
        writer = stream.Writer(request.request_id, task.model, task.chat)
        output = Output(tokenizer.vocabulary.detokenizer(), task.stops)
        pieces: list[str] = []
        async with aclosing(requests.deltas(task, prompt, request, mailbox)) as deltas:
            async for delta in deltas:
                text = output.feed(delta)
                if not task.stream:
                    pieces.append(text)
                else:
                    if not reply.started:
                        await reply.start(200, _EVENTS, request.worker)
                        await reply.send(writer.opening())
                    if text:
                        await reply.send(writer.text(text))
                if output.finish is not None:
                    break
        if output.finish == "cancelled":
            raise errors.cancelled()
        usage = stream.Usage(prompt.count, output.tokens, request.cached_tokens)
        extension = _extension(task, request)
        finish = output.finish or "length"
        if not task.stream:
            await reply.whole(writer.whole("".join(pieces), finish, usage, extension), request.worker)
            return
        last = writer.ending(finish, extension) + (writer.usage(usage) if task.include_usage else b"")
        await reply.send(last + stream.DONE, more=False)


class _Reply:
    """What has been said to the client: an error becomes a status while nothing was, and an event after that."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.started = False

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]], worker: str | None) -> None:
        self.started = True
        every = [*headers, (b"x-request-id", self._request_id.encode())]
        if worker is not None:
            every.append((b"x-dynbox-worker", worker.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": every})

    async def send(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(self, body: bytes, worker: str | None) -> None:
        await self.start(200, (_JSON, (b"content-length", b"%d" % len(body))), worker)
        await self.send(body, more=False)

    async def fail(self, error: ApiError) -> None:
        if self.started:
            await self.send(stream.failure(error), more=False)
            return
        body = error.body()
        headers = [_JSON, (b"content-length", b"%d" % len(body))]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after_s))
        if error.status in (413, 503):
            headers.append((b"connection", b"close"))
        await self.start(error.status, headers, None)
        await self.send(body, more=False)


def _request_id(scope: Scope) -> str:
    given: str = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def _read_body(receive: Receive, cap: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.client_gone()
        piece = message.get("body", b"")
        size += len(piece)
        if size > cap:
            raise errors.body_too_large(cap)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _watch_for_disconnect(receive: Receive, mailbox: Mailbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    mailbox.interrupt(errors.client_gone())


def _extension(task: Task, request: RequestStats) -> dict[str, Any] | None:
    extension: dict[str, Any] = {}
    if "worker_id" in task.extra_fields:
        extension["worker_id"] = request.worker
    if "timing" in task.extra_fields and request.ttft_s is not None and request.last_token is not None:
        extension["timing"] = {
            "ttft_s": round(request.ttft_s, 6),
            "total_s": round(request.last_token - request.began, 6),
        }
    return extension or None


def _log_end(request: RequestStats, status: int) -> None:
    log.info(
        "request ended",
        request_id=request.request_id,
        model=request.model,
        worker=request.worker,
        status=status,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=request.cached_tokens,
        output_tokens=request.output_tokens,
        ttft_s=None if request.ttft_s is None else round(request.ttft_s, 4),
    )
