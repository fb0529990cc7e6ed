"""control.sock: requests of CLI and TUI, answered from the box."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Coroutine
from typing import Protocol

import msgspec

from dynamo_box.errors import BoxError, ExitCode
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import Channel, ChannelServer, serve_channels
from dynamo_box.supervisor.box import Box, StopReport

MAX_CLIENTS = 64
MAX_TASKS_PER_CLIENT = 16
MIN_WATCH_HZ, MAX_WATCH_HZ = 0.1, 4.0

ControlChannel = Channel[control.ControlRequest]


class Stopper(Protocol):
    """Whoever decides over the life of the supervisor."""

    def request_stop(self, reason: str, drain_s: float) -> asyncio.Future[StopReport]:
        """The future is done when everything has stopped; asking again gives the same one."""


class SnapshotFeed:
    """Snapshots to one channel: the first at once, then when something changed, at most `hz` a second.

    While changes keep coming, feeds send at the multiples of their interval, so that watchers of one rate share the
    snapshots that `Encoded` makes.
    """

    def __init__(self, snapshots: Encoded, channel: ControlChannel, request_id: int, hz: float) -> None:
        self._snapshots = snapshots
        self._channel = channel
        self._id = request_id
        self._hz = hz
        self._loop = asyncio.get_running_loop()
        self._sent_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        snapshots.box.watchers.append(self._on_change)
        self._send()

    def _on_change(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_at(send_time(self._sent_at, self._loop.time(), self._hz), self._send)

    def _send(self) -> None:
        self._timer = None
        self._sent_at = self._loop.time()
        self._channel.send(self._snapshots.reply(self._id))

    def flush(self) -> None:
        """Send what has changed and isn't due yet: nothing else is going to tell it."""
        if self._timer is not None:
            self._timer.cancel()
            self._send()

    def close(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._on_change in self._snapshots.box.watchers:
            self._snapshots.box.watchers.remove(self._on_change)


def watch_rate(hz: float) -> float:
    """What a watcher that asks for `hz` gets: no program's nan may end up in the clock."""
    return max(MIN_WATCH_HZ, min(MAX_WATCH_HZ, hz))  # in this order nan, which is less than nothing, gives the most


EARLY = 0.15
"""Of an interval: how much too early a snapshot may come, to be in step with the others."""


def send_time(sent_at: float, now: float, hz: float) -> float:
    """When to send what has just changed: at once if the last one was an interval ago, else at the first multiple of
    the interval after that.
    """
    due = sent_at + 1.0 / hz
    return now if due <= now else math.ceil(due * hz - EARLY) / hz


class Encoded:
    """The box's snapshot as bytes, made once in a turn of the loop, however many ask for it."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._latest: msgspec.Raw | None = None

    def reply(self, request_id: int) -> control.SnapshotReply:
        if self._latest is None:
            self._latest = msgspec.Raw(msgspec.msgpack.encode(self.box.snapshot()))
            asyncio.get_running_loop().call_soon(self._forget)
        return control.SnapshotReply(request_id, self._latest)

    def _forget(self) -> None:
        self._latest = None


def error_reply(request_id: int, error: BoxError) -> control.Error:
    return control.Error(request_id, int(error.exit_code), error.what, error.remedy or "", error.details)


def stopped_reply(request_id: int, report: StopReport) -> control.Stopped:
    return control.Stopped(request_id, report.processes, report.killed, report.freed_bytes, report.survivors)


class ControlServer:
    """Serves until `close`, which lets the answers that are under way leave first."""

    def __init__(self, box: Box, stopper: Stopper) -> None:
        self._box = box
        self._stopper = stopper
        self._snapshots = Encoded(box)
        self._clients: dict[ControlChannel, _Client] = {}
        self._server: ChannelServer | None = None

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
        self._clients[channel] = _Client(self._box, self._snapshots, self._stopper, channel)

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

    def __init__(self, box: Box, snapshots: Encoded, stopper: Stopper, channel: ControlChannel) -> None:
        self._box = box
        self._snapshots = snapshots
        self._stopper = stopper
        self._channel = channel
        self._feed: SnapshotFeed | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, request: control.ControlRequest) -> None:
        acts, models = self._box.acts, self._box.models
        match request:
            case control.GetSnapshot():
                self._channel.send(self._snapshots.reply(request.id))
            case control.Watch():
                if self._feed is not None:
                    self._feed.close()
                self._feed = SnapshotFeed(self._snapshots, self._channel, request.id, watch_rate(request.hz))
            case control.Down():
                self._answer(request.id, self._down(request))
            case control.Restart():
                self._answer(request.id, _done(request.id, acts.restart(request.process, request.drain_s)))
            case control.Drain():
                self._answer(request.id, _done(request.id, acts.drain(request.process, request.drain_s)))
            case control.SetRole():
                asked = acts.set_role(request.process, request.role, request.drain_s)
                self._answer(request.id, _done(request.id, asked))
            case control.Scale():
                asked = self._box.scaling.scale(request.model, request.role, request.count, request.drain_s)
                self._answer(request.id, _done(request.id, asked))
            case control.SetOption():
                asked = acts.set_option(request.process, request.key, request.value)
                self._answer(request.id, _done(request.id, asked))
            case control.CancelRequest():
                self._answer(request.id, _done(request.id, acts.cancel(request.request_id)))
            case control.SleepModel():
                slept = models.sleep(
                    request.model, to=request.to, force=request.force, hold=request.hold, drain_s=request.drain_s
                )
                self._answer(request.id, _with_id(request.id, slept))
            case control.WakeModel():
                self._answer(request.id, _with_id(request.id, models.wake(request.model)))
            case control.Launch():
                refusal = "a box runs here already; a plan is launched over an inherited socket"
                self._channel.send(control.Error(request.id, ExitCode.USAGE, refusal))

    def _answer(self, request_id: int, work: Coroutine[None, None, control.ControlReply]) -> None:
        """Answer later; an error of the box becomes an Error, and so does a defect."""
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
            except Exception as error:  # noqa: BLE001 - a defect: the client must not wait for ever, and people must see it
                what = f"a defect of the supervisor: {error!r}"
                self._box.events.add("error", None, what)
                self._channel.send(control.Error(request_id, ExitCode.FAILED, what))

        task = asyncio.get_running_loop().create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _down(self, request: control.Down) -> control.ControlReply:
        report = await asyncio.shield(self._stopper.request_stop("dynbox down", request.drain_s))
        return stopped_reply(request.id, report)

    def close(self) -> None:
        """The peer has gone; what it asked for goes on."""
        if self._feed is not None:
            self._feed.close()

    async def finish(self) -> None:
        """The box has stopped: watchers are told so."""
        if self._feed is not None:
            self._feed.flush()
        self.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)


async def _with_id(
    request_id: int, asked: Coroutine[None, None, control.ModelSlept] | Coroutine[None, None, control.ModelWoken]
) -> control.ControlReply:
    return msgspec.structs.replace(await asked, id=request_id)


async def _done(request_id: int, asked: Coroutine[None, None, str]) -> control.ControlReply:
    return control.Done(request_id, await asked)
