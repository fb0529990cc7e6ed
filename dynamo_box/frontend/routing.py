"""The router as the frontend sees it: a placement is a lease, and leases outlive the router's own restarts."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import msgspec

from dynamo_box.log import get_logger
from dynamo_box.protocol.framing import Channel, connect_channel
from dynamo_box.protocol.route import (
    Adopt,
    Place,
    Placed,
    PrefillDone,
    Release,
    Renew,
    RouteReply,
    Unplaced,
    reply_decoder,
)

FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.5
RENEW_S = 60.0

log = get_logger()


class RouterGone(Exception):
    """The router went away before it answered, or didn't come back in time."""


class Lease:
    """A place on a worker; `release` it in every ending of the request."""

    def __init__(self, router: RouterClient, place: Place, placed: Placed) -> None:
        self._router = router
        self.place = place
        self.worker = placed.worker
        self.placed = placed
        self.prefilled = False

    def prefill_done(self) -> None:
        if not self.prefilled:
            self.prefilled = True
            self._router.tell(PrefillDone(self.place.id))

    def release(self) -> None:
        self._router.forget(self)

    def adoption(self) -> Adopt:
        place = self.place
        return Adopt(
            place.id,
            place.request_id,
            place.model,
            self.worker,
            place.hashes,
            place.prompt_tokens,
            self.prefilled,
        )


class RouterClient:
    """Keeps one connection to the router, for ever; `connected` tells whether there is one now."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel: Channel[RouteReply] | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Placed | Unplaced]] = {}
        self._leases: dict[int, Lease] = {}
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Connect, renew leases, connect again; ends when cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                channel = await connect_channel(self._socket, self._make_channel)
            except OSError:
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, LONGEST_RETRY_S)
                continue
            retry_s = FIRST_RETRY_S
            for lease in self._leases.values():
                channel.send(lease.adoption())
            self._channel = channel
            self.connected.set()
            log.info("router connected", adopted=len(self._leases))
            try:
                await self._renew_until_closed(channel)
            finally:
                self._lost()
                channel.close()

    def _make_channel(self) -> Channel[RouteReply]:
        return Channel(reply_decoder, self._on_reply)

    async def _renew_until_closed(self, channel: Channel[RouteReply]) -> None:
        while not channel.closed.done():
            await asyncio.wait({channel.closed}, timeout=RENEW_S)
            if self._leases:
                channel.send(Renew(tuple(self._leases)))

    def _lost(self) -> None:
        self._channel = None
        self.connected.clear()
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(RouterGone("the router went away"))

    def _on_reply(self, _channel: Channel[RouteReply], reply: RouteReply) -> None:
        answer = self._waiting.pop(reply.id, None)
        if answer is not None and not answer.done():
            answer.set_result(reply)
        elif isinstance(reply, Placed):
            self.tell(Release(reply.id))  # whoever asked has left

    async def place(self, request: Place) -> Lease | Unplaced:
        """Ask where `request` should go; its id is replaced by one of this connection.

        Raises:
            RouterGone: there is no router now, or it went away before it answered.
        """
        if self._channel is None:
            raise RouterGone("there is no router")
        number = next(self._ids)
        request = msgspec.structs.replace(request, id=number)
        answer: asyncio.Future[Placed | Unplaced] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._channel.send(request)
        try:
            reply = await answer
        except asyncio.CancelledError:
            self._waiting.pop(number, None)
            if answer.done() and not answer.cancelled():
                self.tell(Release(number))
            raise
        if isinstance(reply, Unplaced):
            return reply
        lease = Lease(self, request, reply)
        self._leases[number] = lease
        return lease

    def tell(self, message: PrefillDone | Release) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def forget(self, lease: Lease) -> None:
        if self._leases.pop(lease.place.id, None) is not None:
            self.tell(Release(lease.place.id))

    @property
    def leases(self) -> int:
        return len(self._leases)
