"""The life of the frontend's process: told by the supervisor what to serve, and when to stop.

It ends in one way only: `_over` gets the exit status. Stop, a Drain that is done, SIGTERM and the end of the status
socket give 0; a start that fails, and a frontend that breaks, give 1. SIGINT is left to the supervisor.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvicorn

from dynamo_box.frontend import errors
from dynamo_box.frontend.server import LAST_WORDS_S, Server, listening_socket
from dynamo_box.frontend.serving import Serving
from dynamo_box.frontend.tokenizer import ModelTokenizer
from dynamo_box.log import get_logger
from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.spec import ChildSpec, FrontendSpec

REPORT_S = 0.25
SIGN_OF_LIFE_S = 2.0
"""A report is due after this long even if nothing has changed."""

StatusChannel = Channel[status.ParentMessage]

log = get_logger()


class FrontendProcess:
    """One life of the process."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[int] = self._loop.create_future()
        # Made before it is connected: the first order may come before the connecting call returns.
        self._status: StatusChannel = Channel(status.parent_decoder, self._on_order, self._on_supervisor_gone)
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: Serving | None = None
        self._server: Server | None = None
        self._started = False
        self._residencies: status.Residencies | None = None
        self._tiers: status.Tiers | None = None
        """News that came before there was somebody to tell."""

    async def run(self, status_socket: socket.socket) -> int:
        """The exit status."""
        self._loop.add_signal_handler(signal.SIGTERM, self._end, 0)
        await self._loop.create_unix_connection(lambda: self._status, sock=status_socket)
        exit_status = await self._over
        log.info("frontend stops", exit_status=exit_status)
        if self._server is not None and self._serving is not None:
            self._serving.requests.draining = True
            self._serving.requests.interrupt_all(errors.draining())
            self._serving.asking.close()
            await self._server.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._status.close()
        await asyncio.wait([self._status.closed], timeout=LAST_WORDS_S)
        return exit_status

    def _end(self, exit_status: int) -> None:
        if not self._over.done():
            self._over.set_result(exit_status)

    def _on_order(self, channel: StatusChannel, order: status.ParentMessage) -> None:
        match order:
            case status.Start(spec=spec):
                if not self._started:
                    self._started = True
                    self._spawn(self._start(spec))
            case status.Drain(deadline_s=deadline_s):
                self._spawn(self._drain(deadline_s))
            case status.Stop():
                self._end(0)
            case status.Set(id=number, key=key):
                channel.send(status.Answer(number, f"the frontend has no setting {key!r}"))
            case status.CancelRequest(id=number, request_id=request_id):
                channel.send(self._cancel(number, request_id))
            case status.Residencies():
                self._residencies = order
                if self._serving is not None:
                    self._serving.sleepers.update(order.models)
            case status.Tiers():
                self._tiers = order
                if self._serving is not None:
                    self._serving.tier_metrics.update(order)
            case status.Told():
                if self._serving is not None:
                    if order.residency is not None:  # at once, since newer news may follow in the same read
                        self._serving.sleepers.update([order.residency])
                    self._serving.asking.told(order)

    def _on_supervisor_gone(self, _channel: StatusChannel, _reason: Exception | None) -> None:
        self._end(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside everything else; if it breaks, so does the process."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("the frontend is broken", exc_info=error)
        self._status.send(status.Failed(f"{type(error).__name__}: {error}"))
        self._end(1)

    async def _start(self, spec: ChildSpec) -> None:
        try:
            if not isinstance(spec, FrontendSpec):
                raise ValueError(f"this is the frontend, not the {type(spec).__name__}'s program")
            await self._serve(spec)
        except (OSError, ValueError) as error:
            log.error("can't serve", cause=str(error))
            self._status.send(status.Failed(str(error), "see `dynbox models` and the profile", permanent=True))
            self._end(1)

    async def _serve(self, spec: FrontendSpec) -> None:
        """
        Raises:
            OSError, ValueError: the address can't be had or is not loopback, or a model has no usable tokenizer.
        """
        sock = listening_socket(spec)
        tokenizers = {}
        for model in spec.models:
            self._status.send(status.Starting(f"tokenizer of {model.name}"))
            tokenizers[model.name] = await asyncio.to_thread(ModelTokenizer, Path(model.path))
        serving = self._serving = Serving(spec, RunDir(Path(spec.run_dir)), tokenizers, self._status.send)
        if self._residencies is not None:
            serving.sleepers.update(self._residencies.models)
        if self._tiers is not None:
            serving.tier_metrics.update(self._tiers)
        self._spawn(serving.router.run())
        self._spawn(serving.workers.run())
        self._spawn(serving.requests.watch_the_time())
        self._server = Server(serving)
        await self._server.start(sock)
        host, port = sock.getsockname()[:2]
        self._status.send(status.Ready({"address": f"{host}:{port}", "uvicorn": uvicorn.__version__}))
        log.info("ready", host=host, port=port, models=", ".join(tokenizers))
        await self._report(serving)

    async def _report(self, serving: Serving) -> None:
        told, told_at = None, 0.0
        while True:
            figures = serving.stats.figures(serving.models, serving.workers.names, serving.sleepers.waiting)
            now = self._loop.time()
            if figures != told or now + REPORT_S >= told_at + SIGN_OF_LIFE_S:
                self._status.send(status.Report(figures))
                told, told_at = figures, now
            await asyncio.sleep(REPORT_S)

    async def _drain(self, deadline_s: float) -> None:
        """Leave new connections to the next life of this process; end with the last request, or at the deadline."""
        if self._server is not None:
            self._server.stop_accepting()
        if self._serving is not None:
            requests = self._serving.requests
            try:
                async with asyncio.timeout(deadline_s):
                    await requests.drain(lambda left: self._status.send(status.Draining(left)))
            except TimeoutError:
                log.warning("the drain's deadline has passed", requests=requests.active)
        self._end(0)

    def _cancel(self, number: int, request_id: str) -> status.Answer:
        cancelled = self._serving.requests.interrupt(request_id, errors.cancelled()) if self._serving else 0
        if cancelled == 0:
            return status.Answer(number, f"no live request {request_id!r}")
        return status.Answer(number, text=f"cancelled {request_id}")
