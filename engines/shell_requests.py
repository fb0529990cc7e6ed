"""The request plane of a worker: peers' connections and the sequences in flight.

A sequence is here from its Generate until the engine says `finish`, even when its connection is long gone: it
still occupies the engine, so it counts against the cap and a drain waits for it. So does one that nobody wants any
more and that the engine can't let go of yet (`LATE_CANCEL`): it is cancelled with its first token. The token path is
one dictionary look-up and one Delta an output, and one frame a connection and step; there is no task a sequence.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.request import (
    Cancel,
    Delta,
    Generate,
    GiveUp,
    Hello,
    PeerMessage,
    Refused,
    Step,
    peer_decoder,
    unpack_tokens,
)
from engines.contract import DISAGG, LATE_CANCEL, Engine, HandsOver, Output, RequestRejected, SequenceRequest
from engines.log import get_logger
from engines.shell_events import EventFeed

MAX_SEQUENCES = 4096
"""More than any engine here batches; what is above it is better queued at the frontend or served
elsewhere.
"""

ISOLATION_BYTES = 32
PEERS = ("frontend", "router")

log = get_logger()


class PeerConnection:
    """One peer and its streams: `streams` maps the peer's stream ids to the keys of its live sequences."""

    def __init__(self, requests: Requests, feed: EventFeed) -> None:
        self._requests = requests
        self._feed = feed
        self._welcome = False
        self._refused = False
        self.streams: dict[int, int] = {}
        self.deltas: list[Delta] = []
        self.channel: Channel[PeerMessage] = Channel(
            peer_decoder, self._on_message, self._on_close, on_open=requests.opened(self)
        )

    def _on_message(self, channel: Channel[PeerMessage], message: PeerMessage) -> None:
        if not self._welcome:
            self._greet(message)
        elif isinstance(message, Generate):
            self._requests.generate(self, message)
        elif isinstance(message, Cancel):
            self._requests.cancel(self, message.id)
        elif isinstance(message, GiveUp):
            self._requests.give_up(message.key)
        elif isinstance(message, Hello):
            self._refuse("a second hello")
        else:
            self._feed.subscribe(channel)

    def _greet(self, message: PeerMessage) -> None:
        if self._refused:
            return
        if not isinstance(message, Hello):
            self._refuse("the first message must be a hello")
        elif message.version != PROTOCOL_VERSION:
            self._refuse(f"this worker speaks protocol version {PROTOCOL_VERSION}, not {message.version}")
        elif message.peer not in PEERS:
            self._refuse(f"a peer is one of {', '.join(PEERS)}, not {message.peer[:40]!r}")
        else:
            self._welcome = True

    def _refuse(self, reason: str) -> None:
        log.warning("peer refused", reason=reason)
        self._welcome, self._refused = False, True
        self.channel.send(Refused(reason))
        self.channel.close()

    def _on_close(self, channel: Channel[PeerMessage], reason: Exception | None) -> None:
        if reason is not None:
            log.warning("peer lost", reason=str(reason), sequences=len(self.streams))
        self._feed.forget(channel)
        self._requests.closed(self)


class _Sequence:
    """`uncancellable` until its first token; `unwanted`: it is to be cancelled then."""

    __slots__ = ("connection", "request_id", "stream", "uncancellable", "unwanted")

    def __init__(self, connection: PeerConnection, message: Generate, *, late_cancel: bool) -> None:
        self.connection: PeerConnection | None = connection
        self.stream = message.id
        self.request_id = message.request_id
        self.uncancellable = late_cancel and message.leg == "decode"
        self.unwanted = False


class Requests:
    """Every sequence in flight. `on_fall` hears the new number whenever one or more have ended. `capabilities` are
    those of the engine, once it has started.
    """

    def __init__(self, engine: Engine, on_fall: Callable[[int], None]) -> None:
        self._engine = engine
        self._on_fall = on_fall
        self._keys = itertools.count(1)
        self._live: dict[int, _Sequence] = {}
        self._connections: set[PeerConnection] = set()
        self._refusal = ""
        self._idle = asyncio.Event()
        self.capabilities: tuple[str, ...] = ()

    @property
    def in_flight(self) -> int:
        return len(self._live)

    @property
    def connections(self) -> frozenset[PeerConnection]:
        return frozenset(self._connections)

    def refuse_new(self, why: str) -> None:
        """From now on answer every Generate with an error that another worker may do better with."""
        self._refusal = why

    def accept(self) -> None:
        """The opposite of `refuse_new`."""
        self._refusal = ""

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if that takes longer."""
        self._idle.clear()
        if not self._live:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return not self._live
        return True

    def opened(self, connection: PeerConnection) -> Callable[[Channel[PeerMessage]], None]:
        return lambda _channel: self._connections.add(connection)

    def closed(self, connection: PeerConnection) -> None:
        """Cancel what the peer had running; the engine's `finish` ends the bookkeeping."""
        self._connections.discard(connection)
        keys = list(connection.streams.values())
        connection.streams.clear()
        for key in keys:
            self._live[key].connection = None
        for key in keys:
            self._cancel(key)

    def generate(self, connection: PeerConnection, message: Generate) -> None:
        """Hand a request to the engine, or answer it with an error."""
        if self._refusal:
            self._answer_error(connection, message, self._refusal, rejected=False)
            return
        if len(self._live) >= MAX_SEQUENCES:
            text = f"the worker has {MAX_SEQUENCES} sequences in flight, its limit"
            self._answer_error(connection, message, text, rejected=False)
            return
        key = next(self._keys)
        try:
            sequence = _checked(connection, message, key, self.capabilities)
            self._live[key] = _Sequence(connection, message, late_cancel=LATE_CANCEL in self.capabilities)
            connection.streams[message.id] = key
            self._engine.submit(sequence)
        except RequestRejected as error:
            self._take_back(connection, message.id, key)
            self._answer_error(connection, message, str(error), rejected=True)
        except Exception as error:
            log.exception("the engine failed to take a request", request_id=message.request_id)
            self._take_back(connection, message.id, key)
            text = f"the engine failed to take the request: {type(error).__name__}: {error}"
            self._answer_error(connection, message, text, rejected=False)

    def cancel(self, connection: PeerConnection, stream: int) -> None:
        key = connection.streams.get(stream)
        if key is not None:
            self._cancel(key)

    def give_up(self, key: bytes) -> None:
        """Nobody will go on from this transfer."""
        if isinstance(self._engine, HandsOver):
            self._engine.give_up(key)

    def cancel_request(self, request_id: str) -> int:
        """Cancel every sequence of a request; how many there were."""
        keys = [key for key, sequence in self._live.items() if sequence.request_id == request_id]
        for key in keys:
            self._cancel(key)
        return len(keys)

    def _cancel(self, key: int) -> None:
        """Now, or as soon as the engine can."""
        sequence = self._live.get(key)
        if sequence is None or not sequence.uncancellable:
            self._engine.cancel(key)
        elif not sequence.unwanted:
            sequence.unwanted = True
            log.info("cancelled with its first token", request_id=sequence.request_id)

    def deliver(self, outputs: Sequence[Output]) -> None:
        """Pass one engine step on: one frame to each connection that has a sequence in it."""
        live = self._live
        moved: list[PeerConnection] = []
        unwanted: list[int] = []
        ended = False
        for output in outputs:
            sequence = live.get(output.key)
            if sequence is None:
                continue
            connection = sequence.connection
            if output.finish is not None:
                ended = True
                self._end(output, sequence)
            elif sequence.uncancellable and output.tokens:
                sequence.uncancellable = False
                if sequence.unwanted:
                    unwanted.append(output.key)
            if connection is None:
                if output.transfer is not None:  # its peer left while this was on its way here
                    self.give_up(output.transfer.key)
                continue
            if not connection.deltas:
                moved.append(connection)
            connection.deltas.append(
                Delta(
                    sequence.stream,
                    output.tokens,
                    output.finish,
                    output.cached_tokens,
                    output.error,
                    transfer=output.transfer,
                )
            )
        for connection in moved:
            connection.channel.send(Step(connection.deltas))
            connection.deltas = []
        for key in unwanted:
            self._engine.cancel(key)
        if ended:
            if not live:
                self._idle.set()
            self._on_fall(len(live))

    def cancel_all(self, why: str) -> None:
        """Tell every client now that its sequence ends with the error `why`, and have the engine end them: they
        count as in flight until it has.
        """
        for connection in self._connections:
            streams, connection.streams = connection.streams, {}
            if streams:
                deltas = [Delta(stream, finish="error", error=why) for stream in streams]
                connection.channel.send(Step(deltas))
            for key in streams.values():
                log.warning("request cut short", request_id=self._live[key].request_id, error=why)
                self._live[key].connection = None
        for key in list(self._live):
            self._cancel(key)

    def fail_all(self, error: str) -> None:
        """Tell every client that its sequence ends here, and forget them all: the process is about to
        exit.
        """
        self.refuse_new(error)
        self.deliver([Output(key, finish="error", error=error) for key in list(self._live)])

    def _end(self, output: Output, sequence: _Sequence) -> None:
        del self._live[output.key]
        if sequence.connection is not None:
            del sequence.connection.streams[sequence.stream]
        if output.finish == "error":
            log.warning("request failed", request_id=sequence.request_id, error=output.error)
        else:
            log.info("request done", request_id=sequence.request_id, finish=output.finish)

    def _take_back(self, connection: PeerConnection, stream: int, key: int) -> None:
        if self._live.pop(key, None) is not None:
            del connection.streams[stream]

    def _answer_error(self, connection: PeerConnection, message: Generate, text: str, *, rejected: bool) -> None:
        log.warning("request refused", request_id=message.request_id, reason=text, rejected=rejected)
        delta = Delta(message.id, finish="error", error=text, rejected=rejected)
        connection.channel.send(Step([delta]))


def _checked(connection: PeerConnection, message: Generate, key: int, capabilities: tuple[str, ...]) -> SequenceRequest:
    """The request as the engine wants it.

    Raises:
        RequestRejected: something in it no engine could serve.
    """
    if message.id in connection.streams:
        raise RequestRejected(f"stream id {message.id} is already in use on this connection")
    if message.sampling.max_tokens < 1:
        raise RequestRejected(f"max_tokens must be at least 1, not {message.sampling.max_tokens}")
    if len(message.isolation) != ISOLATION_BYTES:
        raise RequestRejected(f"the isolation key has {len(message.isolation)} bytes instead of {ISOLATION_BYTES}")
    if message.leg != "whole" and DISAGG not in capabilities:
        raise RequestRejected(f"this worker's engine does not serve {message.leg} legs: it lacks {DISAGG!r}")
    if not message.tokens:
        raise RequestRejected("the prompt is empty")
    try:
        tokens = unpack_tokens(message.tokens)
    except ValueError as error:
        raise RequestRejected(f"malformed token ids: {len(message.tokens)} bytes are no whole number of u32") from error
    return SequenceRequest(
        key=key,
        request_id=message.request_id,
        tokens=tokens,
        sampling=message.sampling,
        isolation=message.isolation,
        priority=message.priority,
        annotations=message.annotations,
        kv_priority=message.kv_priority,
        kv_priorities=message.kv_priorities,
        leg=message.leg,
        transfer=message.transfer,
        transfer_ttl_s=message.transfer_ttl_s,
        must_transfer=message.must_transfer,
    )
