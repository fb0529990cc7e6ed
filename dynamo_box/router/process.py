"""The life of the router process under its supervisor.

It ends in one way only: `_over` gets the exit status. Stop, a Drain that is done, SIGTERM and the end of the
status socket give 0; a start that fails, and a router that breaks, give 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket

from dynamo_box.errors import BoxError
from dynamo_box.log import get_logger
from dynamo_box.protocol import status
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.spec import ChildSpec, RouterSpec
from dynamo_box.router.service import Router

STATUS_FLUSH_S = 1.0
LONGEST_DRAIN_S = 86_400.0

StatusChannel = Channel[status.ParentMessage]

log = get_logger()


class RouterProcess:
    """One life of the process."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[int] = self._loop.create_future()
        # Made before it is connected: the first command may come before the connection call returns.
        self._status: StatusChannel = Channel(status.parent_decoder, self._on_command, self._on_supervisor_gone)
        self._router: Router | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, status_socket: socket.socket) -> int:
        """The exit status."""
        self._loop.add_signal_handler(signal.SIGTERM, self._end, 0)
        await self._loop.create_unix_connection(lambda: self._status, sock=status_socket)
        exit_status = await self._over
        log.info("router stops", exit_status=exit_status)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._router is not None:
            self._router.close()
        self._status.close()
        await asyncio.wait([self._status.closed], timeout=STATUS_FLUSH_S)
        return exit_status

    def _end(self, exit_status: int) -> None:
        if not self._over.done():
            self._over.set_result(exit_status)

    def _on_command(self, channel: StatusChannel, message: status.ParentMessage) -> None:
        if isinstance(message, status.Start):
            if self._router is None and not self._over.done():
                self._start(message.spec)
        elif isinstance(message, status.Stop):
            self._end(0)
        elif isinstance(message, status.Drain):
            self._keep(self._loop.create_task(self._drain(message.deadline_s)))
        elif isinstance(message, status.Set):
            channel.send(self._set(message))
        elif isinstance(message, status.CancelRequest):
            channel.send(status.Answer(message.id, error="the router runs no requests; the frontend does"))

    def _on_supervisor_gone(self, _channel: StatusChannel, reason: Exception | None) -> None:
        log.info("the supervisor's socket has closed", reason=str(reason or "closed"))
        self._end(0)

    def _start(self, spec: ChildSpec) -> None:
        if not isinstance(spec, RouterSpec):
            self._fail(f"a router was handed the spec of {spec.name}, which is no router", permanent=True)
            return
        try:
            self._router = Router(spec, self._status.send)
        except BoxError as error:
            self._fail(error.what, remedy=error.remedy or "", permanent=True)
            return
        self._keep(self._loop.create_task(self._serve(self._router)))

    async def _serve(self, router: Router) -> None:
        try:
            await router.serve()
        except Exception as error:
            # Whatever broke it, the supervisor must hear the cause.
            log.exception("the router failed")
            self._fail(f"{type(error).__name__}: {error}", permanent=False)

    async def _drain(self, deadline_s: float) -> None:
        if self._router is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(deadline_s, 0.0), LONGEST_DRAIN_S)):
                    await self._router.drain()
        self._end(0)

    def _set(self, message: status.Set) -> status.Answer:
        if self._router is None:
            return status.Answer(message.id, error="the router has not started yet")
        try:
            return status.Answer(message.id, text=self._router.set_option(message.key, message.value))
        except ValueError as error:
            return status.Answer(message.id, error=str(error))

    def _fail(self, cause: str, *, remedy: str = "", permanent: bool) -> None:
        log.error("the router can't serve", cause=cause)
        self._status.send(status.Failed(cause, remedy, permanent))
        self._end(1)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
