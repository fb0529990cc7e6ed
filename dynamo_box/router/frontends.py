"""The router's listening side: frontends connect, and each connection holds its own leases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from dynamo_box.log import get_logger
from dynamo_box.protocol.framing import Channel, ChannelServer, FrameError, listen_unix, serve_channels
from dynamo_box.protocol.route import (
    Adopt,
    Place,
    Policy,
    PrefillDone,
    Release,
    Renew,
    RouteRequest,
    Unplaced,
    request_decoder,
)
from dynamo_box.router.placement import Placement
from dynamo_box.router.slices import Slices

MAX_CONNECTIONS = 64

FrontendChannel = Channel[RouteRequest]

log = get_logger()


class Frontends:
    """`on_release` is called whenever leases have ended, `on_nobody` when a request found no worker."""

    def __init__(
        self,
        placement: Placement,
        slices: Slices,
        on_release: Callable[[], None],
        on_nobody: Callable[[], None],
    ) -> None:
        self._placement = placement
        self._slices = slices
        self._on_release = on_release
        self._on_nobody = on_nobody
        self._numbers = itertools.count()
        self._open: dict[FrontendChannel, int] = {}
        self._server: ChannelServer | None = None
        self.draining = False

    async def listen(self, path: Path) -> None:
        self._server = await serve_channels(
            listen_unix(path),
            lambda: Channel(request_decoder, self._on_message, self._on_close, on_open=self._on_open),
        )

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for channel in list(self._open):
            channel.close()

    def _on_open(self, channel: FrontendChannel) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            log.warning("one frontend connection too many", connections=len(self._open))
            channel.abort(FrameError(f"there are {MAX_CONNECTIONS} connections already"))
            return
        self._open[channel] = next(self._numbers)
        channel.send(self._policy)

    @property
    def _policy(self) -> Policy:
        return Policy(self._placement.disagg.policy)

    def tell_policy(self) -> None:
        """It is another one."""
        for channel in self._open:
            channel.send(self._policy)

    def _on_close(self, channel: FrontendChannel, reason: Exception | None) -> None:
        connection = self._open.pop(channel, None)
        if connection is None:
            return
        self._placement.leases.abandon(connection)
        self._slices.add(self._placement.leases.settle_one)
        log.info("frontend gone", connection=connection, reason=str(reason or "closed"))
        self._on_release()

    def _on_message(self, channel: FrontendChannel, message: RouteRequest) -> None:
        connection = self._open.get(channel)
        if connection is None:
            return
        leases = self._placement.leases
        if isinstance(message, Place):
            self._place(channel, connection, message)
        elif isinstance(message, Release):
            leases.release((connection, message.id))
            self._on_release()
        elif isinstance(message, PrefillDone):
            leases.prefill_done((connection, message.id))
        elif isinstance(message, Renew):
            self._placement.renew(connection, message.ids)
        else:
            self._adopt(connection, message)

    def _place(self, channel: FrontendChannel, connection: int, place: Place) -> None:
        if self.draining:
            channel.send(Unplaced(place.id, "no_workers", "the router is stopping"))
            return
        reply = self._placement.place(connection, place)
        channel.send(reply)
        if isinstance(reply, Unplaced):
            log.info("not placed", request_id=place.request_id, code=reply.code, reason=reply.reason)
            if reply.code in ("no_workers", "pinned_worker_gone"):
                self._on_nobody()
        else:
            log.debug("placed", request_id=place.request_id, reason=reply.reason)

    def _adopt(self, connection: int, adopt: Adopt) -> None:
        problem = self._placement.adopt(connection, adopt)
        if problem:
            log.info("not adopted", request_id=adopt.request_id, reason=problem)
