"""A connection over which a process tells the router which KV blocks it holds.

It connects, says Hello, subscribes, and connects again with growing pauses until it is closed. Content that can't be
read leads to a new subscription; a connection that can't be read, to a new connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from dynamo_box.log import get_logger
from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.framing import Channel, connect_channel
from dynamo_box.protocol.request import (
    Hello,
    KvCleared,
    KvDump,
    KvRemoved,
    KvStored,
    Refused,
    Subscribe,
    worker_decoder,
)
from dynamo_box.router.feed import Feed
from dynamo_box.router.index import KvIndex
from dynamo_box.router.placement import Placement
from dynamo_box.router.slices import Slices

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
STABLE_S = 10.0

Notify = Callable[[str, str], None]
"""(level, text) for the box's event list"""

_frame_decoder = msgspec.msgpack.Decoder(msgspec.Raw)

log = get_logger()


class Pause:
    """Geometric back-off: none the first time, then from FIRST_PAUSE_S to LONGEST_PAUSE_S, and again none
    after STABLE_S without need.
    """

    def __init__(self) -> None:
        self._next_s = 0.0
        self._last_at = -STABLE_S

    def next(self, now: float) -> float:
        """Seconds to wait before trying again."""
        if now - self._last_at >= STABLE_S:
            self._next_s = 0.0
        pause = self._next_s
        self._next_s = min(max(2 * pause, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self._last_at = now + pause
        return pause


class Link:
    """The router's side of one holder's life; also the listener of its feed. `name` is who it is in the index."""

    def __init__(
        self,
        name: str,
        socket: Path,
        index: KvIndex,
        placement: Placement,
        slices: Slices,
        notify: Notify,
        *,
        chains: bool = True,
    ) -> None:
        """`chains`: a block whose parent isn't held contradicts the rest (see `Feed`)."""
        self.name = name
        self._socket = socket
        self._index = index
        self._placement = placement
        self._slices = slices
        self._notify = notify
        self._loop = asyncio.get_running_loop()
        self._feed = Feed(index, name, self, chains=chains)
        self._channel: Channel[msgspec.Raw] | None = None
        self._subscribe_timer: asyncio.TimerHandle | None = None
        self._subscribe_pause = Pause()
        self._told_refusal = False
        self._log = log.bind(holder=name)
        self._task = self._loop.create_task(self._stay_connected())

    def close(self) -> None:
        """The holder is gone."""
        self._task.cancel()
        self._cancel_subscription()
        self._feed.reset()
        if self._channel is not None:
            channel, self._channel = self._channel, None
            channel.close()

    # what the two kinds of holders do differently

    def on_connected(self) -> None:
        """Hello and Subscribe are on their way."""
        raise NotImplementedError

    def on_disconnected(self) -> None:
        """The connection was lost, and with it all that was known of the holder's blocks."""
        raise NotImplementedError

    def cleared(self) -> None:
        """The holder has emptied a tier."""
        self._slices.add(self._index.sweep)

    # connection

    async def _stay_connected(self) -> None:
        pause = Pause()
        while True:
            await asyncio.sleep(pause.next(self._loop.time()))
            try:
                channel = await connect_channel(
                    self._socket, lambda: Channel(_frame_decoder, self._on_frame, self._on_lost)
                )
            except OSError as error:
                self._log.debug("can't connect yet", error=str(error))
                continue
            if channel.closed.done():
                continue
            self._channel = channel
            channel.send(Hello("router", PROTOCOL_VERSION))
            channel.send(Subscribe())
            self.on_connected()
            self._log.info("connected")
            await channel.closed

    def _on_lost(self, channel: Channel[msgspec.Raw], reason: Exception | None) -> None:
        if channel is not self._channel:
            return
        self._channel = None
        self._cancel_subscription()
        self._feed.reset()
        self.on_disconnected()
        if isinstance(reason, msgspec.DecodeError):
            self._placement.resyncs += 1
        self._slices.add(self._index.sweep)
        self._log.info("connection lost", reason=str(reason or "closed by the other side"))

    # messages

    def _on_frame(self, channel: Channel[msgspec.Raw], frame: msgspec.Raw) -> None:
        if channel is not self._channel:
            return
        try:
            message = worker_decoder.decode(frame)
        except msgspec.DecodeError as error:
            self._feed.doubt(f"a message that can't be read: {error}")
            return
        if isinstance(message, KvDump | KvStored | KvRemoved | KvCleared):
            self._feed.receive(message)
            self._slices.add(self._feed.apply)
        elif isinstance(message, Refused) and not self._told_refusal:
            self._told_refusal = True
            self._notify("error", f"{self.name} refused the router: {message.reason}")
        # Step is for frontends. Load is older than what the router has placed, which is what the cost counts.

    # the feed's listener

    def doubt(self, reason: str) -> None:
        """Subscribe again: at once, or after a pause if that was needed a moment ago."""
        self._placement.resyncs += 1
        self._slices.add(self._index.sweep)
        if self._subscribe_timer is not None:
            return
        pause = self._subscribe_pause.next(self._loop.time())
        self._log.warning("resync", reason=reason, pause_s=pause)
        self._subscribe_timer = self._loop.call_later(pause, self._subscribe_again)

    def index_full(self) -> None:
        blocks = self._index.blocks(self.name)
        self._notify("warning", f"{self.name} holds more KV blocks than the {blocks} the router indexes")

    def _subscribe_again(self) -> None:
        self._subscribe_timer = None
        if self._channel is not None:
            self._channel.send(Subscribe())

    def _cancel_subscription(self) -> None:
        if self._subscribe_timer is not None:
            self._subscribe_timer.cancel()
            self._subscribe_timer = None
