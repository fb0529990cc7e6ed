"""The life of a child service under its supervisor: start, reports, drain, end.

It ends in one way only: `_over` gets the exit status. Stop, a Drain that is done, SIGTERM and the end of the status
socket give 0; a start that fails, and a service that breaks, give 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Coroutine
from typing import Any, Protocol

from dynamo_box.errors import BoxError
from dynamo_box.log import get_logger
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import Figures
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.spec import ChildSpec

STATUS_FLUSH_S = 1.0
LONGEST_DRAIN_S = 86_400.0
REPORT_AT_MOST_EVERY_S = 0.25
REPORT_AT_LEAST_EVERY_S = 2.0

StatusChannel = Channel[status.ParentMessage]

log = get_logger()


class Service(Protocol):
    """What lives such a life."""

    async def start(self) -> dict[str, str]:
        """Return once it serves, with what is shown to people.

        Raises:
            BoxError: it can't, and never will.
            OSError: it can't now.
        """

    def figures(self) -> Figures: ...

    async def command(self, message: status.ParentMessage) -> None:
        """Whatever is neither Start, Stop nor Drain."""

    async def drain(self, deadline_s: float, life: Life) -> None:
        """Return when nothing is left to do, telling `life.draining` of what is. It is cancelled at the deadline."""

    async def close(self) -> None: ...


class Life:
    """One life of the process. `make` gives the service for a spec, or raises BoxError."""

    def __init__(self, what: str, make: MakeService) -> None:
        self._what = what
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[int] = self._loop.create_future()
        # Made before it is connected: the first command may come before the connection call returns.
        self._status: StatusChannel = Channel(status.parent_decoder, self._on_command, self._on_supervisor_gone)
        self._service: Service | None = None
        self._serving = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported: Figures | None = None
        self._reported_at = -REPORT_AT_LEAST_EVERY_S
        self._report_due = float("inf")
        self._report_timer: asyncio.TimerHandle | None = None
        self._told_draining = -1

    # For the service

    def send(self, message: status.ChildMessage) -> None:
        self._status.send(message)

    def note(self, level: str, text: str) -> None:
        """For the event list."""
        self._status.send(status.Note(level, text))

    def changed(self) -> None:
        """Figures may be others than before: they are reported soon."""
        if self._over.done():
            return
        due = self._reported_at + REPORT_AT_MOST_EVERY_S
        if self._report_timer is None or self._report_due > due:
            self._report_at(due)

    def draining(self, in_flight: int) -> None:
        if in_flight != self._told_draining:
            self._told_draining = in_flight
            self._status.send(status.Draining(in_flight))

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it beside the rest until the end; if it breaks, so does the service."""
        task = self._loop.create_task(self._or_fail(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # For the program

    async def run(self, status_socket: socket.socket) -> int:
        """The exit status."""
        self._loop.add_signal_handler(signal.SIGTERM, self._end, 0)
        await self._loop.create_unix_connection(lambda: self._status, sock=status_socket)
        exit_status = await self._over
        log.info(f"{self._what} stops", exit_status=exit_status)
        if self._report_timer is not None:
            self._report_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._service is not None:
            await self._service.close()
        self._status.close()
        await asyncio.wait([self._status.closed], timeout=STATUS_FLUSH_S)
        return exit_status

    def _end(self, exit_status: int) -> None:
        if not self._over.done():
            self._over.set_result(exit_status)

    def _on_command(self, _channel: StatusChannel, message: status.ParentMessage) -> None:
        match message:
            case status.Start():
                if self._service is None and not self._over.done():
                    self._start(message.spec)
            case status.Stop():
                self._end(0)
            case status.Drain():
                self.keep(self._drain(message.deadline_s))
            case _ if self._service is not None:
                self.keep(self._service.command(message))
            case status.Set():
                self._status.send(status.Answer(message.id, error=f"{self._what} has not started yet"))

    def _on_supervisor_gone(self, _channel: StatusChannel, reason: Exception | None) -> None:
        log.info("the supervisor's socket has closed", reason=str(reason or "closed"))
        self._end(0)

    def _start(self, spec: ChildSpec) -> None:
        try:
            self._service = self._make(spec, self)
        except BoxError as error:
            self._fail(error.what, remedy=error.remedy or "", permanent=True)
            return
        except Exception as error:
            # Whatever is wrong, the supervisor must hear the cause.
            log.exception(f"{self._what} can't be made")
            self._fail(f"{type(error).__name__}: {error}", permanent=False)
            return
        self.keep(self._serve(self._service))

    async def _serve(self, service: Service) -> None:
        try:
            info = await service.start()
        except BoxError as error:
            self._fail(error.what, remedy=error.remedy or "", permanent=True)
        except OSError as error:
            self._fail(str(error), permanent=False)
        else:
            self._serving = True
            self._status.send(status.Ready(info))
            self._report()

    async def _drain(self, deadline_s: float) -> None:
        if self._service is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(deadline_s, 0.0), LONGEST_DRAIN_S)):
                    await self._service.drain(deadline_s, self)
        self._end(0)

    def _report_at(self, due: float) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
        self._report_due = due
        self._report_timer = self._loop.call_at(max(due, self._loop.time()), self._report)

    def _report(self) -> None:
        """Say how things are, if they are not as they were or that was long ago, and again later."""
        if self._service is None or not self._serving or self._over.done():
            return
        now = self._loop.time()
        figures = self._service.figures()
        if figures != self._reported or now - self._reported_at >= REPORT_AT_LEAST_EVERY_S:
            self._status.send(status.Report(figures))
            self._reported, self._reported_at = figures, now
        self._report_at(self._reported_at + REPORT_AT_LEAST_EVERY_S)

    def _fail(self, cause: str, *, remedy: str = "", permanent: bool) -> None:
        log.error(f"{self._what} can't serve", cause=cause)
        self._status.send(status.Failed(cause, remedy, permanent))
        self._end(1)

    async def _or_fail(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            # Whatever broke it, the supervisor must hear the cause.
            log.exception(f"{self._what} failed")
            self._fail(f"{type(error).__name__}: {error}", permanent=False)


class MakeService(Protocol):
    def __call__(self, spec: ChildSpec, life: Life) -> Service: ...
