"""The shell around an engine: the process `python -m engines.NAME` from its first message to its exit status.

    shell_status.py    progress and figures for the supervisor
    shell_requests.py  peers' connections and the sequences in flight
    shell_events.py    numbered KV events, dumps and load for the router
    shell_announce.py  the instance file by which router and frontend find the worker
    shell_canary.py    a prompt whose answer must not change
    shell_sleep.py     giving memory back and taking it again, with the process alive
    shell_role.py      serving as something else, with the process alive

A worker ends in one way only: somebody resolves its `Ending` (the first one counts), and `_shut_down` carries
it out. Those who may: the supervisor (Stop, Drain, or its end of the socket closing), SIGTERM, and the engine
when it fails. Nothing on the way out waits without a limit, and a watchdog outside the interpreter's reach
ends the process if the loop itself is stuck. SIGINT is ignored: a Ctrl-C in the terminal reaches every
process of the box at once, and it is the supervisor's to say what becomes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dynamo_box.paths import RunDir
from dynamo_box.protocol import framing, status
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.request import Load
from dynamo_box.protocol.spec import WorkerSpec
from engines import log as engine_log
from engines.contract import BlockEvent, Engine, EngineError, EngineInfo, Output
from engines.shell_announce import Announcement, describe
from engines.shell_canary import Canary
from engines.shell_events import EventFeed, TampersWithEvents
from engines.shell_requests import PeerConnection, Requests
from engines.shell_role import CHANGING, Role
from engines.shell_sleep import SleepCycle
from engines.shell_status import FIGURES_INTERVAL_S, FiguresReport, StartProgress

CLIENTS_FLUSH_S = 1.0
ENGINE_CLOSE_S = 5.0
STATUS_FLUSH_S = 1.0
EXIT_WATCHDOG_S = CLIENTS_FLUSH_S + ENGINE_CLOSE_S + STATUS_FLUSH_S + 3.0
LONGEST_DRAIN_S = 86_400.0

log = engine_log.get_logger()


@dataclass(frozen=True)
class Ending:
    """Why and how the process ends; `told` is what clients with a sequence in flight get to read."""

    exit_code: int
    told: str
    failed: status.Failed | None = None


def main(engine_class: type[Engine]) -> None:
    """Serve until told otherwise, then exit."""
    engine_log.configure()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status_socket = framing.status_socket_from_environment()
    except RuntimeError as error:
        sys.exit(str(error))
    loop = _new_event_loop()
    asyncio.set_event_loop(loop)
    code = loop.run_until_complete(Worker(engine_class()).run(status_socket))
    logging.shutdown()
    # An engine's thread that never ends must not keep the process; an ordinary exit would wait for it.
    os._exit(code)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where the engine's venv has it."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Worker:
    """One life of a worker process. It is also the engine's sink."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._engine_started = False
        self._canary = Canary(engine)
        self._sleep: SleepCycle | None = None
        self._role: Role | None = None
        self._serving = False
        self._draining = False
        self._drain_timer: asyncio.TimerHandle | None = None
        self._socket_path: Path | None = None
        self._announcement: Announcement | None = None
        self._server: framing.ChannelServer | None = None

    async def run(self, status_socket: socket.socket) -> int:
        """The exit status."""
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[Ending] = self._loop.create_future()
        self._spec: asyncio.Future[WorkerSpec] = self._loop.create_future()
        self._loop.add_signal_handler(signal.SIGTERM, self._end, Ending(0, "worker is stopping"))
        self._feed = EventFeed(self._engine.cached_blocks, self._load)
        self._requests = Requests(self._engine, self._on_fall)
        self._status = Channel(status.parent_decoder, self._on_command, self._on_supervisor_gone)
        await self._loop.create_unix_connection(lambda: self._status, sock=status_socket)
        start = self._loop.create_task(self._start())
        ending = await self._over
        start.cancel()
        await self._shut_down(ending)
        return ending.exit_code

    # the engine's sink

    def step(self, outputs: Sequence[Output], events: Sequence[BlockEvent] = ()) -> None:
        if events:
            self._feed.publish(events)
        outputs = self._canary.take(outputs)
        if outputs:
            self._requests.deliver(outputs)
        self._feed.load_may_have_changed()

    def fatal(self, cause: str) -> None:
        self._end(Ending(1, f"the engine failed: {cause}", status.Failed(cause)))

    # what it lends to sleep and wake

    def send(self, message: status.ChildMessage) -> None:
        self._status.send(message)

    @property
    def ending(self) -> bool:
        """Whether the process is on its way out."""
        return self._draining or self._over.done()

    # start

    async def _start(self) -> None:
        try:
            spec = await self._spec
            progress = StartProgress(self._status)
            info = await self._engine.start(spec, self, progress)
            self._engine_started = True
            progress.flush()
            await self._serve(spec, info)
        except EngineError as error:
            log.error("the engine can't start", cause=error.cause, permanent=error.permanent)
            failed = status.Failed(error.cause, error.remedy, error.permanent)
            self._end(Ending(1, error.cause, failed))
        except Exception as error:
            log.exception("the start failed")
            cause = f"{type(error).__name__}: {error}"
            self._end(Ending(1, cause, status.Failed(cause)))

    async def _serve(self, spec: WorkerSpec, info: EngineInfo) -> None:
        """Open the socket; announce the worker once it can answer."""
        if info.block_size != spec.model.block_size:
            raise EngineError(
                f"the engine's KV blocks hold {info.block_size} tokens, the plan's {spec.model.block_size}",
                remedy="set the model's block size to one that this engine supports",
                permanent=True,
            )
        if isinstance(self._engine, TampersWithEvents):
            self._feed.tamper = self._engine.tamper
        sleep = SleepCycle(self, self._engine, info, self._requests, self._canary, offload_s=spec.sleep_offload_s)
        await sleep.remember()
        run_dir = RunDir(Path(spec.run_dir))
        self._socket_path = run_dir.worker_socket(spec.name)
        self._requests.capabilities = info.capabilities
        instance = describe(spec, info, self._socket_path)
        listening = framing.listen_unix(self._socket_path)
        self._server = await framing.serve_channels(
            listening, lambda: PeerConnection(self._requests, self._feed).channel
        )
        self._announcement = Announcement(run_dir.instances, instance)
        sleep.announcement = self._announcement
        self._sleep = sleep
        self._role = Role(self, info, self._requests, self._announcement)
        self._serving = True
        self._report = FiguresReport(self._status, self._figures)
        self._status.send(status.Ready(_shown(info)))
        self._tick()
        log.info("ready", engine=spec.engine, kv_blocks=info.kv_blocks_total)

    def _tick(self) -> None:
        if not self._over.done():
            self._loop.call_later(FIGURES_INTERVAL_S, self._tick)
            self._report.tick(self._loop.time())

    def _figures(self) -> WorkerFigures:
        role = self._role.now if self._role is not None else ""
        return msgspec.structs.replace(self._canary.figures(), role=role)

    def _load(self) -> Load:
        figures = self._canary.figures()
        return Load(figures.running, figures.waiting, figures.kv_blocks_used, figures.kv_blocks_total)

    # the supervisor's commands

    def _on_command(self, _channel: Channel[status.ParentMessage], message: status.ParentMessage) -> None:
        if self._over.done():
            return
        if isinstance(message, status.Start):
            self._take_spec(message)
        elif isinstance(message, status.Stop):
            self._end(Ending(0, "worker is stopping"))
        elif isinstance(message, status.Drain):
            self._drain(message.deadline_s)
        elif isinstance(message, status.Set):
            self._status.send(self._set_option(message))
        elif isinstance(message, status.Sleep | status.Wake):
            self._sleep_or_wake(message)
        elif isinstance(message, status.SetRole):
            self._set_role(message)
        elif isinstance(message, status.CancelRequest):
            self._status.send(self._cancel_request(message))
        else:
            log.warning("a message that is not for a worker was ignored", kind=type(message).__name__)

    def _sleep_or_wake(self, message: status.Sleep | status.Wake) -> None:
        answer = status.Slept if isinstance(message, status.Sleep) else status.Woken
        if self._draining:
            self._status.send(answer(message.id, error="the worker is draining"))
        elif self._sleep is None or self._role is None:
            self._status.send(answer(message.id, error="the worker is not ready yet"))
        elif self._role.changing:
            self._status.send(answer(message.id, error=f"the {CHANGING}"))
        elif isinstance(message, status.Sleep):
            self._sleep.sleep(message)
        else:
            self._sleep.wake(message)

    def _set_role(self, message: status.SetRole) -> None:
        if self._draining:
            self._status.send(status.Answer(message.id, error="the worker is draining"))
        elif self._sleep is None or self._role is None:
            self._status.send(status.Answer(message.id, error="the worker is not ready yet"))
        elif self._sleep.doing:
            self._status.send(status.Answer(message.id, error=f"the worker is {self._sleep.doing}"))
        else:
            self._role.set(message, asleep=self._sleep.asleep)

    def _take_spec(self, message: status.Start) -> None:
        if self._spec.done():
            log.warning("a second start was ignored")
        elif isinstance(message.spec, WorkerSpec):
            self._spec.set_result(message.spec)
        else:
            cause = f"this program is a worker and can't be a {type(message.spec).__name__}"
            self._end(Ending(1, cause, status.Failed(cause, permanent=True)))

    def _set_option(self, message: status.Set) -> status.Answer:
        if not self._serving:
            return status.Answer(message.id, error="the worker is not ready yet")
        try:
            return status.Answer(message.id, text=self._engine.set_option(message.key, message.value))
        except ValueError as error:
            return status.Answer(message.id, error=str(error))
        except Exception as error:
            log.exception("the engine failed to set an option", key=message.key)
            return status.Answer(message.id, error=f"{type(error).__name__}: {error}")

    def _cancel_request(self, message: status.CancelRequest) -> status.Answer:
        found = self._requests.cancel_request(message.request_id)
        if not found:
            return status.Answer(message.id, error=f"no request {message.request_id!r} in flight here")
        return status.Answer(message.id, text=f"cancelled {found}")

    def _on_supervisor_gone(self, _channel: Channel[status.ParentMessage], reason: Exception | None) -> None:
        if not self._over.done():
            log.warning("the supervisor is gone", reason=str(reason) if reason else "end of stream")
        self._end(Ending(0, "worker is stopping"))

    # the end

    def _drain(self, deadline_s: float) -> None:
        """Take nothing new; exit when nothing is in flight, or at the deadline (a later Drain moves it)."""
        deadline_s = min(max(0.0, deadline_s), LONGEST_DRAIN_S)
        ending = Ending(0, "worker is draining")
        self._draining = True
        self._abandon_changes()
        if self._announcement is not None:
            self._announcement.withdraw()
        self._requests.refuse_new(ending.told)
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._drain_timer = self._loop.call_later(deadline_s, self._end, ending)
        faulthandler.dump_traceback_later(deadline_s + EXIT_WATCHDOG_S, exit=True)
        self._on_fall(self._requests.in_flight)

    def _abandon_changes(self) -> None:
        """What it is becoming: the process ends."""
        if self._sleep is not None:
            self._sleep.abandon()
        if self._role is not None:
            self._role.abandon()

    def _on_fall(self, in_flight: int) -> None:
        if self._draining:
            self._status.send(status.Draining(in_flight))
            if in_flight == 0:
                self._end(Ending(0, "worker is draining"))

    def _end(self, ending: Ending) -> None:
        if not self._over.done():
            self._over.set_result(ending)

    async def _shut_down(self, ending: Ending) -> None:
        faulthandler.dump_traceback_later(EXIT_WATCHDOG_S, exit=True)
        self._draining = False
        self._abandon_changes()
        if ending.failed is not None:
            self._status.send(ending.failed)
        if self._announcement is not None:
            self._announcement.withdraw()
        if self._server is not None:
            self._server.close()
        self._requests.fail_all(ending.told)
        self._feed.close()
        peers = [connection.channel for connection in self._requests.connections]
        for channel in peers:
            channel.close()
        await _within(CLIENTS_FLUSH_S, "clients", _all_closed(peers))
        if self._engine_started:
            await _within(ENGINE_CLOSE_S, "engine", self._engine.close())
        self._status.close()
        await _within(STATUS_FLUSH_S, "supervisor", _all_closed([self._status]))
        if self._socket_path is not None:
            with contextlib.suppress(OSError):
                self._socket_path.unlink()
        log.info("stopped", exit_code=ending.exit_code)


async def _all_closed(channels: Sequence[Channel[Any]]) -> None:
    for channel in channels:
        await channel.closed


async def _within(seconds: float, who: str, waiting: Coroutine[Any, Any, None]) -> None:
    """Wait for something that can't be relied upon; the exit goes on without it."""
    try:
        await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        log.warning("gave up waiting at the exit", who=who, seconds=seconds)
    except Exception:
        log.exception("an error at the exit", who=who)


def _shown(info: EngineInfo) -> dict[str, str]:
    """What people see of a worker that is ready."""
    return {
        **info.versions,
        "kv_blocks": str(info.kv_blocks_total),
        "block_size": str(info.block_size),
        "context_length": str(info.context_length),
    }
