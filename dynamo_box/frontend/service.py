"""The life of the frontend's process: told by the supervisor what to serve, and when to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from dynamo_box.frontend import errors
from dynamo_box.frontend.app import Service, make_app
from dynamo_box.frontend.requests import Requests
from dynamo_box.frontend.routing import RouterClient
from dynamo_box.frontend.stats import Stats
from dynamo_box.frontend.tokenizer import ModelTokenizer
from dynamo_box.frontend.workers import Workers
from dynamo_box.log import get_logger
from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.framing import Channel, status_socket_from_environment
from dynamo_box.protocol.spec import FrontendSpec

LISTEN_FD_VARIABLE = "DYNBOX_LISTEN_FD"
REPORT_S = 0.25
KEEP_ALIVE_S = 75
CLOSE_S = 2.0

log = get_logger()

SupervisorChannel = Channel[status.ParentMessage]


class _Server(uvicorn.Server):
    """Leaves signals to this process, which takes its orders from the supervisor."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Frontend:
    """`run` returns when the process should exit 0."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spec: asyncio.Future[FrontendSpec] = self._loop.create_future()
        self._stopping = asyncio.Event()
        self._service: Service | None = None
        self._draining: asyncio.Task[None] | None = None
        self._channel: SupervisorChannel | None = None

    async def run(self) -> None:
        _, self._channel = await self._loop.create_unix_connection(
            lambda: Channel(status.parent_decoder, self._on_order, self._on_supervisor_gone),
            sock=status_socket_from_environment(),
        )
        self._loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stopping = self._loop.create_task(self._stopping.wait())
        await asyncio.wait([self._spec, stopping], return_when=asyncio.FIRST_COMPLETED)
        if self._spec.done():
            try:
                await self._serve(self._spec.result(), stopping)
            except (OSError, ValueError) as error:
                log.error("can't serve", cause=str(error))
                self._channel.send(status.Failed(str(error), "see `dynbox models`", permanent=True))
                self._channel.close()
                raise SystemExit(1) from error
        stopping.cancel()
        self._channel.close()

    async def _serve(self, spec: FrontendSpec, stopping: asyncio.Task[bool]) -> None:
        assert self._channel is not None
        sock = _listening_socket(spec)
        tokenizers = {}
        for model in spec.models:
            self._channel.send(status.Starting(f"tokenizer of {model.name}"))
            tokenizers[model.name] = await asyncio.to_thread(ModelTokenizer, Path(model.path))
        run_dir = RunDir(Path(spec.run_dir))
        router, workers = RouterClient(run_dir.router_socket), Workers(run_dir.instances)
        requests = Requests(router, workers, Stats(), spec.discovery_timeout_s)
        self._service = Service(spec, tokenizers, requests, router, workers)
        server = _Server(
            uvicorn.Config(
                make_app(self._service),
                http="httptools",
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        background = [
            self._loop.create_task(work)
            for work in (
                router.run(),
                workers.run(),
                requests.watch_for_stalls(),
                self._report(self._service),
            )
        ]
        serving = self._loop.create_task(server.serve(sockets=[sock]))
        self._loop.create_task(self._tell_when_ready(server))  # ends by itself, at once
        try:
            await asyncio.wait({stopping, serving, *background}, return_when=asyncio.FIRST_COMPLETED)
            for task in background:
                if task.done():
                    task.result()
        finally:
            requests.interrupt_all(errors.draining())
            server.should_exit = True
            await asyncio.wait({serving}, timeout=CLOSE_S)
            for task in (*background, serving):
                task.cancel()
            await asyncio.gather(*background, serving, return_exceptions=True)

    async def _tell_when_ready(self, server: uvicorn.Server) -> None:
        while not server.started:
            await asyncio.sleep(0.001)
        assert self._channel is not None
        self._channel.send(status.Ready({"uvicorn": uvicorn.__version__}))

    async def _report(self, service: Service) -> None:
        assert self._channel is not None
        last = None
        while True:
            figures = service.requests.stats.figures(service.models)
            if figures != last:
                self._channel.send(status.Report(figures))
                last = figures
            await asyncio.sleep(REPORT_S)

    def _on_order(self, channel: SupervisorChannel, order: status.ParentMessage) -> None:
        match order:
            case status.Start(spec=spec):
                if isinstance(spec, FrontendSpec) and not self._spec.done():
                    self._spec.set_result(spec)
            case status.Drain(deadline_s=deadline_s):
                if self._draining is None:
                    self._draining = self._loop.create_task(self._drain(deadline_s))
            case status.Stop():
                self._stopping.set()
            case status.Set(id=number, key=key):
                channel.send(status.Answer(number, f"the frontend has no setting {key!r}"))
            case status.CancelRequest(id=number, request_id=request_id):
                known = self._service is not None and self._service.requests.interrupt(request_id, errors.cancelled())
                problem = "" if known else f"no live request {request_id!r}"
                channel.send(status.Answer(number, problem, f"cancelled {request_id}" if known else ""))

    async def _drain(self, deadline_s: float) -> None:
        """Turn new requests away; stop when the last one has ended, or at the deadline."""
        assert self._channel is not None
        if self._service is not None:
            self._service.draining = True
            deadline = self._loop.time() + deadline_s
            reported = -1
            while (active := self._service.requests.active) and self._loop.time() < deadline:
                if active != reported:
                    self._channel.send(status.Draining(active))
                    reported = active
                await asyncio.sleep(0.02)
            self._channel.send(status.Draining(self._service.requests.active))
        self._stopping.set()

    def _on_supervisor_gone(self, _channel: SupervisorChannel, _error: Exception | None) -> None:
        self._stopping.set()


def _listening_socket(spec: FrontendSpec) -> socket.socket:
    inherited = os.environ.pop(LISTEN_FD_VARIABLE, None)
    if inherited is not None:
        sock = socket.socket(fileno=int(inherited))
        os.set_inheritable(sock.fileno(), False)
    else:
        sock = socket.create_server((spec.host, spec.port), backlog=1024)
    address = sock.getsockname()[0]
    if address != "::1" and not address.startswith("127."):
        raise ValueError(f"address {address} is not loopback; the frontend serves this machine only")
    sock.setblocking(False)
    return sock
