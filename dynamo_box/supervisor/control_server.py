"""control.sock: requests of CLI and TUI, answered from the box."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from typing import Protocol

import msgspec

from dynamo_box.errors import BoxError, ExitCode
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import Channel, serve_channels
from dynamo_box.supervisor.box import Box, StopReport

MAX_CLIENTS = 64
MAX_TASKS_PER_CLIENT = 16
MAX_WATCH_HZ = 4.0

ControlChannel = Channel[control.ControlRequest]


class Stopper(Protocol):
    """Whoever decides over the life of the supervisor."""

    def request_stop(self, reason: str, drain_s: float) -> asyncio.Future[StopReport]:
        """The future is done when everything has stopped; asking again gives the same one."""


class SnapshotFeed:
    """Snapshots to one channel: the first at once, then when something changed, at most `hz` a second."""

    def __init__(self, box: Box, channel: ControlChannel, request_id: int, hz: float) -> None:
        self._box = box
        self._channel = channel
        self._id = request_id
        self._interval_s = 1.0 / hz
        self._loop = asyncio.get_running_loop()
        self._sent_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        box.watchers.append(self._on_change)
        self._send()

    def _on_change(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_at(self._sent_at + self._interval_s, self._send)

    def _send(self) -> None:
        self._timer = None
        self._sent_at = self._loop.time()
        self._channel.send(snapshot_reply(self._id, self._box))

    def close(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._on_change in self._box.watchers:
            self._box.watchers.remove(self._on_change)


def snapshot_reply(request_id: int, box: Box) -> control.SnapshotReply:
    return control.SnapshotReply(request_id, msgspec.Raw(msgspec.msgpack.encode(box.snapshot())))


def error_reply(request_id: int, error: BoxError) -> control.Error:
    return control.Error(request_id, int(error.exit_code), error.what, error.remedy or "", error.details)


def stopped_reply(request_id: int, report: StopReport) -> control.Stopped:
    return control.Stopped(request_id, report.processes, report.killed, report.freed_bytes, report.survivors)


class ControlServer:
    """Serves until `close`, which lets the answers that are under way leave first."""

    def __init__(self, box: Box, stopper: Stopper) -> None:
        self._box = box
        self._stopper = stopper
        self._clients: dict[ControlChannel, _Client] = {}
        self._server: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Answer on a listening Unix socket."""
        self._server = await serve_channels(
            sock,
            lambda: Channel(control.request_decoder, self._on_request, self._on_close, on_open=self._on_open),
        )

    def _on_open(self, channel: ControlChannel) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            channel.send(control.Error(0, ExitCode.FAILED, f"{MAX_CLIENTS} clients are connected already"))
            channel.close()
            return
        self._clients[channel] = _Client(self._box, self._stopper, channel)

    def _on_request(self, channel: ControlChannel, request: control.ControlRequest) -> None:
        client = self._clients.get(channel)
        if client is not None:
            client.handle(request)

    def _on_close(self, channel: ControlChannel, _error: Exception | None) -> None:
        client = self._clients.pop(channel, None)
        if client is not None:
            client.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*(client.finish() for client in list(self._clients.values())))
        channels = list(self._clients)
        for channel in channels:
            channel.close()
        if channels:
            await asyncio.wait([channel.closed for channel in channels], timeout=1.0)


class _Client:
    """One connection: its subscriptions, and its requests that take time."""

    def __init__(self, box: Box, stopper: Stopper, channel: ControlChannel) -> None:
        self._box = box
        self._stopper = stopper
        self._channel = channel
        self._feed: SnapshotFeed | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, request: control.ControlRequest) -> None:
        match request:
            case control.GetSnapshot():
                self._channel.send(snapshot_reply(request.id, self._box))
            case control.Watch():
                if self._feed is not None:
                    self._feed.close()
                hz = min(max(request.hz, 0.1), MAX_WATCH_HZ)
                self._feed = SnapshotFeed(self._box, self._channel, request.id, hz)
            case control.Down():
                self._answer(request.id, self._down(request))
            case control.Restart():
                self._answer(request.id, self._restart(request))
            case control.SetOption():
                asked = self._box.set_option(request.process, request.key, request.value)
                self._answer(request.id, _done(request.id, asked))
            case control.CancelRequest():
                self._answer(request.id, _done(request.id, self._box.cancel(request.request_id)))
            case control.Launch():
                refusal = "a box runs here already; a plan is launched over an inherited socket"
                self._channel.send(control.Error(request.id, ExitCode.USAGE, refusal))

    def _answer(self, request_id: int, work: Coroutine[None, None, control.ControlReply]) -> None:
        """Answer later; an error of the box becomes an Error."""
        if len(self._tasks) >= MAX_TASKS_PER_CLIENT:
            work.close()
            self._channel.send(
                control.Error(request_id, ExitCode.FAILED, f"{MAX_TASKS_PER_CLIENT} requests are under way already")
            )
            return

        async def answer() -> None:
            try:
                self._channel.send(await work)
            except BoxError as error:
                self._channel.send(error_reply(request_id, error))

        task = asyncio.get_running_loop().create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _down(self, request: control.Down) -> control.ControlReply:
        report = await asyncio.shield(self._stopper.request_stop("dynbox down", request.drain_s))
        return stopped_reply(request.id, report)

    async def _restart(self, request: control.Restart) -> control.ControlReply:
        await self._box.restart(request.process, request.drain_s)
        return control.Done(request.id, f"{request.process} is ready")

    def close(self) -> None:
        """The peer has gone; what it asked for goes on."""
        if self._feed is not None:
            self._feed.close()

    async def finish(self) -> None:
        self.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)


async def _done(request_id: int, asked: Coroutine[None, None, str]) -> control.ControlReply:
    return control.Done(request_id, await asked)
