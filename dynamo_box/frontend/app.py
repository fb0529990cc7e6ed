"""The routes. Generation is plain ASGI (`generation.py`), since the token path is where a frontend spends its time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dynamo_box.frontend import errors
from dynamo_box.frontend.acts import Act
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.generation import Generation
from dynamo_box.frontend.guard import LoopbackOnly
from dynamo_box.frontend.intake import read_chat, read_completion
from dynamo_box.frontend.serving import Serving
from dynamo_box.protocol.residency import Residency


def make_app(serving: Serving) -> ASGIApp:
    def models(_: Request) -> Response:
        return _json({"object": "list", "data": [described(name) for name in serving.listed]})

    def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in serving.listed:
            raise errors.unknown_model(name, serving.listed)
        return _json(described(name))

    def described(name: str) -> dict[str, Any]:
        return _model(name, serving.sleepers.residency(name))

    def health(_: Request) -> Response:
        found = serving.health()
        return _json(found.body(), 503 if found.reasons else 200)

    def live(_: Request) -> Response:
        return _json({"status": "live"})

    def metrics(_: Request) -> Response:
        known = [(name, worker) for name in serving.tokenizers for worker in serving.workers.names_of(name)]
        serving.stats.refresh_gauges(serving.tokenizers, known, serving.sleepers.residencies)
        return Response(generate_latest(serving.stats.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/v1/chat/completions", Generation(serving, "chat_completions", read_chat), methods=["POST"]),
        Route("/v1/completions", Generation(serving, "completions", read_completion), methods=["POST"]),
        Route("/v1/models", _on_loop(models, first=serving.workers.settle)),
        Route("/v1/models/{name}/sleep", Act(serving, "sleep")),
        Route("/v1/models/{name}/wake", Act(serving, "wake")),
        Route("/v1/models/{name:path}", _on_loop(model, first=serving.workers.settle)),
        Route("/health", _on_loop(health, first=serving.workers.settle)),
        Route("/live", _on_loop(live)),
        Route("/metrics", _on_loop(metrics)),
    ]
    handlers: Any = {HTTPException: _on_http_error, ApiError: _on_api_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a path that is almost right gets our 404, not a redirect
    return LoopbackOnly(app)


def _on_loop(
    handler: Callable[[Request], Response], first: Callable[[], Awaitable[None]] | None = None
) -> Callable[[Request], Awaitable[Response]]:
    """Starlette runs plain functions in threads; these are too short for that. `first` is waited for before."""

    async def handle(request: Request) -> Response:
        if first is not None:
            await first()
        return handler(request)

    return handle


async def _on_http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return _failed(errors.wrong_method(request.method, request.url.path, allowed), {"Allow": allowed})
    return _failed(errors.unknown_path(request.method, request.url.path))


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _failed(error)


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _failed(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return Response(error.body(), error.status, headers, media_type="application/json")


def _model(name: str, residency: Residency | None) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": 0, "owned_by": "dynamo_box"}
    if residency is not None:
        model |= {"state": residency.state, "place": residency.place}
    return model
