"""The life of the service's process under its supervisor.

It ends in one way only: `_over` gets the exit status. Stop, a Drain that is done, SIGTERM and the end of the status
socket give 0; a start that fails, and a service that breaks, give 1. What is committed stays with the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable
from pathlib import Path

from dynamo_box.child_main import allow_all_descriptors
from dynamo_box.gms.copying import MoveFailed
from dynamo_box.gms.keeping import Keeper, NotKept
from dynamo_box.gms.places import Places
from dynamo_box.gms.server import GmsServer, Moved
from dynamo_box.gms.vmm import HostVmm
from dynamo_box.log import get_logger
from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import GmsFigures
from dynamo_box.protocol.framing import Channel, listen_unix
from dynamo_box.protocol.gms import KEEPER_FD_VARIABLE
from dynamo_box.protocol.spec import ChildSpec, GmsSpec

STATUS_FLUSH_S = 1.0
LONGEST_DRAIN_S = 86_400.0
DRAIN_LOOK_S = 0.1
REPORT_AT_MOST_EVERY_S = 0.25
REPORT_AT_LEAST_EVERY_S = 2.0

StatusChannel = Channel[status.ParentMessage]

log = get_logger()


def keeper_socket_from_environment() -> socket.socket | None:
    """The inherited end of the keeper socket, if there is one; the variable is taken out."""
    value = os.environ.pop(KEEPER_FD_VARIABLE, None)
    if value is None:
        return None
    sock = socket.socket(fileno=int(value))
    os.set_inheritable(sock.fileno(), False)
    return sock


class GmsProcess:
    """One life of the process."""

    def __init__(self, keeper_socket: socket.socket | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[int] = self._loop.create_future()
        # Made before it is connected: the first command may come before the connection call returns.
        self._status: StatusChannel = Channel(status.parent_decoder, self._on_command, self._on_supervisor_gone)
        self._keeper = Keeper(keeper_socket)
        self._places: Places | None = None
        self._server: GmsServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported: GmsFigures | None = None
        self._reported_at = -REPORT_AT_LEAST_EVERY_S
        self._report_due = float("inf")
        self._report_timer: asyncio.TimerHandle | None = None

    async def run(self, status_socket: socket.socket) -> int:
        """The exit status."""
        self._loop.add_signal_handler(signal.SIGTERM, self._end, 0)
        await self._loop.create_unix_connection(lambda: self._status, sock=status_socket)
        exit_status = await self._over
        log.info("weight memory service stops", exit_status=exit_status)
        if self._report_timer is not None:
            self._report_timer.cancel()
        if self._places is not None:
            self._places.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.close()
        if self._places is not None:
            self._places.close()
        self._keeper.close()
        self._status.close()
        await asyncio.wait([self._status.closed], timeout=STATUS_FLUSH_S)
        return exit_status

    def _end(self, exit_status: int) -> None:
        if not self._over.done():
            self._over.set_result(exit_status)

    def _on_command(self, channel: StatusChannel, message: status.ParentMessage) -> None:
        match message:
            case status.Start():
                if self._server is None and not self._over.done():
                    self._start(message.spec)
            case status.Stop():
                self._end(0)
            case status.Drain():
                self._keep(self._drain(message.deadline_s))
            case status.Move():
                self._keep(self._move(message))
            case status.Set():
                channel.send(status.Answer(message.id, error=f"weight memory has no setting {message.key!r}"))
            case status.CancelRequest():
                channel.send(status.Answer(message.id, error="weight memory runs no requests; the frontend does"))
            case status.Sleep():
                channel.send(status.Slept(message.id, error="weight memory doesn't sleep; its layouts are moved"))
            case status.Wake():
                channel.send(status.Woken(message.id, error="weight memory doesn't sleep; its layouts are moved"))
            case _:
                log.warning("a message that is for another kind of process", message=type(message).__name__)

    def _on_supervisor_gone(self, _channel: StatusChannel, reason: Exception | None) -> None:
        log.info("the supervisor's socket has closed", reason=str(reason or "closed"))
        self._end(0)

    def _start(self, spec: ChildSpec) -> None:
        if not isinstance(spec, GmsSpec):
            self._fail(f"weight memory was handed the spec of {spec.name}, which is another kind", permanent=True)
            return
        vmm = HostVmm()
        self._places = Places(spec, vmm, self._keeper)
        self._server = GmsServer(spec, vmm, self._places, self._keeper, self._changed)
        self._keep(self._serve(spec, self._places, self._server))

    async def _serve(self, spec: GmsSpec, places: Places, server: GmsServer) -> None:
        """Take over, tidy up, listen."""
        allow_all_descriptors()
        try:
            self._status.send(status.Starting("adopting"))
            for problem in await server.adopt():
                self._status.send(status.Note("warning", problem))
            if spec.layouts:
                self._status.send(status.Starting("looking through snapshots"))
                await self._tidy(places, spec)
            server.listen(listen_unix(RunDir(Path(spec.run_dir)).worker_socket(spec.name)))
        except (OSError, NotKept) as error:
            self._fail(str(error), permanent=False)
            return
        adopted = sum(layout.state == "committed" for layout in server.figures().layouts)
        self._status.send(status.Ready({"device": spec.device, "layouts adopted": str(adopted)}))
        self._report()

    async def _tidy(self, places: Places, spec: GmsSpec) -> None:
        try:
            for path in await places.clean(spec.layouts):
                self._status.send(status.Note("info", f"removed {path}: a snapshot that nobody will load"))
        except MoveFailed as error:
            self._status.send(status.Note("warning", str(error)))

    async def _move(self, message: status.Move) -> None:
        moved = Moved("weight memory has not started yet")
        if self._server is not None:
            moved = await self._server.move(message.layout, message.place)
        self._answer(message.id, moved)

    def _answer(self, id_: int, moved: Moved) -> None:
        self._changed()
        self._status.send(status.Moved(id_, moved.error, moved.lost, moved.bytes, moved.phases, moved.holders))

    async def _drain(self, deadline_s: float) -> None:
        """Those who write, and layouts on their way, may finish. Readers need nobody to finish for."""
        if self._server is not None:
            self._server.stop_listening()
            told = -1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(deadline_s, 0.0), LONGEST_DRAIN_S)):
                    while told != 0:
                        if self._server.in_flight != told:
                            told = self._server.in_flight
                            self._status.send(status.Draining(told))
                        if told:
                            await asyncio.sleep(DRAIN_LOOK_S)
        self._end(0)

    def _changed(self) -> None:
        if self._over.done():
            return
        due = self._reported_at + REPORT_AT_MOST_EVERY_S
        if self._report_timer is None or self._report_due > due:
            self._report_at(due)

    def _report_at(self, due: float) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
        self._report_due = due
        self._report_timer = self._loop.call_at(max(due, self._loop.time()), self._report)

    def _report(self) -> None:
        """Say how things are, if they are not as they were or that was long ago, and again later."""
        if self._server is None or self._over.done():
            return
        now = self._loop.time()
        figures = self._server.figures()
        if figures != self._reported or now - self._reported_at >= REPORT_AT_LEAST_EVERY_S:
            self._status.send(status.Report(figures))
            self._reported, self._reported_at = figures, now
        self._report_at(self._reported_at + REPORT_AT_LEAST_EVERY_S)

    def _fail(self, cause: str, *, remedy: str = "", permanent: bool) -> None:
        log.error("weight memory can't serve", cause=cause)
        self._status.send(status.Failed(cause, remedy, permanent))
        self._end(1)

    def _keep(self, work: Awaitable[None]) -> None:
        task = self._loop.create_task(self._or_fail(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _or_fail(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            # Whatever broke it, the supervisor must hear the cause.
            log.exception("weight memory failed")
            self._fail(f"{type(error).__name__}: {error}", permanent=False)
