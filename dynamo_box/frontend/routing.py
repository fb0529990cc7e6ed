"""The router as the frontend sees it: a placement is a lease, and leases outlive the router's own restarts."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import msgspec

from dynamo_box.frontend.reconnect import keep_connected
from dynamo_box.log import get_logger
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.route import (
    Adopt,
    Place,
    Placed,
    Policy,
    PrefillDone,
    Release,
    Renew,
    RouteReply,
    RouterMessage,
    Unplaced,
    router_decoder,
)

RENEW_S = 15.0
"""Well within a lease's time to live, which is minutes."""

RouterChannel = Channel[RouterMessage]

log = get_logger()


class RouterGone(Exception):
    """The router is not there, or went away before it answered."""


class Lease:
    """A place on a worker; `release` it in every ending of the request."""

    def __init__(self, router: RouterClient, place: Place, placed: Placed) -> None:
        self._router = router
        self.place = place
        self.placed = placed
        self.prefilled = False

    @property
    def worker(self) -> str:
        return self.placed.worker

    def prefill_done(self) -> None:
        if not self.prefilled:
            self.prefilled = True
            self._router.tell(PrefillDone(self.place.id))

    def release(self) -> None:
        self._router.forget(self)

    def adoption(self) -> Adopt:
        """What a new router is told."""
        place = self.place
        computing = self.placed.prefill if not self.prefilled else None
        return Adopt(
            id=place.id,
            request_id=place.request_id,
            model=place.model,
            worker=self.worker,
            hashes=place.hashes,
            prompt_tokens=place.prompt_tokens,
            prefill_done=self.prefilled,
            prefill=computing.worker if computing is not None else "",
        )


class RouterClient:
    """Keeps one connection to the router, for ever; `connected` tells whether there is one now. `policy` is the
    disaggregation policy, as the router last said: "" until it has.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel: RouterChannel | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[RouteReply]] = {}
        self._leases: dict[int, Lease] = {}
        self.policy = ""
        self.connected = asyncio.Event()

    @property
    def leases(self) -> int:
        return len(self._leases)

    async def run(self) -> None:
        """Connect, renew leases, connect again; ends when cancelled."""
        await keep_connected(self._socket, lambda: Channel(router_decoder, self._on_message), self._use)

    async def _use(self, channel: RouterChannel) -> None:
        for lease in self._leases.values():
            channel.send(lease.adoption())
        self._channel = channel
        self.connected.set()
        log.info("router connected", adopted=len(self._leases))
        try:
            while not channel.closed.done():
                if self._leases:
                    channel.send(Renew(tuple(self._leases)))
                await asyncio.wait({channel.closed}, timeout=RENEW_S)
        finally:
            self._channel = None
            self.connected.clear()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(RouterGone("the router went away"))

    async def wait_until_connected(self, timeout_s: float) -> None:
        """Return when there is a router, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.connected.wait()
        except TimeoutError:
            return

    def _on_message(self, channel: RouterChannel, message: RouterMessage) -> None:
        if isinstance(message, Policy):
            self.policy = message.name
        else:
            self._on_reply(channel, message)

    def _on_reply(self, channel: RouterChannel, reply: RouteReply) -> None:
        answer = self._waiting.get(reply.id)
        if answer is not None and not answer.done():
            answer.set_result(reply)
        elif isinstance(reply, Placed):
            channel.send(Release(reply.id))  # whoever asked has left

    async def place(self, request: Place) -> Lease | Unplaced:
        """Ask where `request` should go; its id is set here.

        Raises:
            RouterGone: there is no router now, or it went away before it answered.
        """
        if self._channel is None:
            raise RouterGone("there is no router")
        number = next(self._ids)
        request = msgspec.structs.replace(request, id=number)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._channel.send(request)
        try:
            reply = await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled():
                self.tell(Release(number))  # the answer came in the same turn as the cancellation
            raise
        finally:
            del self._waiting[number]
        if isinstance(reply, Unplaced):
            return reply
        lease = self._leases[number] = Lease(self, request, reply)
        return lease

    def tell(self, message: PrefillDone | Release) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def forget(self, lease: Lease) -> None:
        if self._leases.pop(lease.place.id, None) is not None:
            self.tell(Release(lease.place.id))
