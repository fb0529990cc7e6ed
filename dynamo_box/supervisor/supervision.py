"""From the first child to the last: start the box, tell whoever launched it, serve control.sock, and stop
once.

Everything that may end the box (a signal, `dynbox down`, the launcher's departure before the box is ready)
only makes a stop request; the first one counts, a second signal cuts the drain short, and `run` is the one
that carries it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass

import uvloop

from dynamo_box.errors import BoxError, ExitCode
from dynamo_box.paths import Home, RunDir
from dynamo_box.plan.types import Plan
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import Channel
from dynamo_box.supervisor.box import Box, StopReport
from dynamo_box.supervisor.control_server import ControlChannel, ControlServer, Encoded, SnapshotFeed, error_reply
from dynamo_box.supervisor.identity import RunId
from dynamo_box.supervisor.lock import RunDirLock
from dynamo_box.supervisor.logs import SUPERVISOR, OwnLog
from dynamo_box.supervisor.sdnotify import Notifier
from dynamo_box.supervisor.sweep import SweepReport
from dynamo_box.supervisor.waiting import done_within, first_of

LAUNCH_HZ = 10.0
TICK_S = 1.0
LAST_WORD_S = 1.0
"""For the launcher to read why the start failed."""


@dataclass(frozen=True)
class StopRequest:
    """`exit_code` is for a box that wasn't ready yet; one that was stops with 0, unless `is_failure`."""

    reason: str
    drain_s: float
    exit_code: ExitCode = ExitCode.FAILED
    is_failure: bool = False


class Supervision:
    def __init__(
        self,
        plan: Plan,
        run_dir: RunDir,
        home: Home,
        run_id: RunId,
        *,
        link: socket.socket | None,
        request_id: int,
        own_log: OwnLog | None,
        lock: RunDirLock,
    ) -> None:
        self._notifier = Notifier()
        self._box = Box(plan, run_dir, home, run_id, os.environ)
        self._link_socket = link
        self._link: ControlChannel | None = None
        self._feed: SnapshotFeed | None = None
        self._request_id = request_id
        self._own_log = own_log
        self._lock = lock
        self._run_dir = run_dir
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[StopRequest] = self._loop.create_future()
        self._stopped: asyncio.Future[StopReport] = self._loop.create_future()

    async def run(self, control_socket: socket.socket, swept: SweepReport) -> int:
        """The whole life; returns the exit status."""
        self._install_signals()
        if swept.pids:
            self._box.events.add("warning", None, f"killed {swept.killed} processes that a dead box had left")
        starting = self._loop.create_task(self._box.start())
        await asyncio.sleep(0)  # the children are spawned now; what follows runs while they import
        await self._open_link()
        server = ControlServer(self._box, self)
        await server.start(control_socket)
        self._log_events()
        beating = self._loop.create_task(self._beat())
        try:
            exit_code, failure = await self._until_stop(starting)
            drain_s = self._stop.result().drain_s if self._stop.done() else 0.0
            self._notifier.send("STOPPING=1", "STATUS=stopping")
            report = await self._box.stop(drain_s)
            self._box.events.add(
                "info",
                None,
                f"stopped {report.processes} processes ({report.killed} killed), "
                f"{report.freed_bytes} bytes freed, {len(report.survivors)} survivors",
            )
            self._stopped.set_result(report)
            await self._close_link(failure)
            await server.close()
        finally:
            beating.cancel()
            self._box.close()
        return exit_code

    async def _until_stop(self, starting: asyncio.Task[None]) -> tuple[ExitCode, BoxError | None]:
        """Return when the box has to be stopped: its exit code, and the error if it didn't come up."""
        await first_of(starting, self._stop)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, BoxError):
                await starting
            request = self._stop.result()
            return request.exit_code, BoxError(f"the start was called off: {request.reason}")
        try:
            starting.result()
        except BoxError as error:
            return error.exit_code, error
        self._notifier.send("READY=1", f"STATUS={self._box.plan.profile} answers at {self._box.plan.endpoint}")
        await self._close_link(None)
        request = await self._stop
        self._box.events.add("info", None, f"stopping: {request.reason}")
        return request.exit_code if request.is_failure else ExitCode.OK, None

    # why it ends

    def request_stop(
        self, reason: str, drain_s: float, exit_code: ExitCode = ExitCode.FAILED, *, is_failure: bool = False
    ) -> asyncio.Future[StopReport]:
        """Ask for the end; the future is done when everything has stopped. Asking again gives the same
        one.
        """
        if not self._stop.done():
            self._stop.set_result(StopRequest(reason, drain_s, exit_code, is_failure))
        return self._stopped

    def _stop_unreachable(self) -> None:
        """Without its run dir no command reaches a box, nor its processes one another: it would hold its devices for
        nobody. A service of systemd's is started again.
        """
        what = f"run dir {self._run_dir.root} was removed: nobody can reach this box any more"
        self._box.events.add("error", None, what)
        self.request_stop(what, 0.0, is_failure=True)

    def _install_signals(self) -> None:
        for number, code in (
            (signal.SIGINT, ExitCode.INTERRUPTED),
            (signal.SIGTERM, ExitCode.FAILED),
            (signal.SIGHUP, ExitCode.FAILED),
        ):
            self._loop.add_signal_handler(number, self._on_signal, number, code)

    def _on_signal(self, number: signal.Signals, exit_code: ExitCode) -> None:
        if self._stop.done():
            self._box.hurry()
        else:
            self.request_stop(number.name, self._box.plan.drain_s, exit_code)

    # whoever launched it

    async def _open_link(self) -> None:
        if self._link_socket is None:
            return
        self._link_socket.setblocking(False)
        _, self._link = await self._loop.create_unix_connection(
            lambda: Channel(control.request_decoder, lambda *_: None, self._on_link_closed),
            sock=self._link_socket,
        )
        self._feed = SnapshotFeed(Encoded(self._box), self._link, self._request_id, LAUNCH_HZ)

    def _on_link_closed(self, _channel: ControlChannel, _error: Exception | None) -> None:
        if self._link is not None:
            self._drop_link()
            self.request_stop("`dynbox up` went away before the box was ready", 0.0)

    async def _close_link(self, failure: BoxError | None) -> None:
        """The last word to the launcher: Done, or why not. Once."""
        link = self._link
        if link is None:
            if failure is not None and self._link_socket is None:
                print_error(failure)
            return
        if self._feed is not None:
            self._feed.flush()
        self._drop_link()
        link.send(error_reply(self._request_id, failure) if failure else control.Done(self._request_id, "ready"))
        link.close()
        await done_within(link.closed, LAST_WORD_S)

    def _drop_link(self) -> None:
        self._link = None
        if self._feed is not None:
            self._feed.close()

    # the rest

    def _log_events(self) -> None:
        from dynamo_box import log

        log.configure(SUPERVISOR)
        self._box.events.log_to(log.get_logger())

    async def _beat(self) -> None:
        """Once a second (or as often as the watchdog wants): sample, reap, rotate, tell systemd."""
        period_s = min(TICK_S, self._notifier.watchdog_s or TICK_S)
        said = ""
        while True:
            try:
                self._box.tick()
                if not self._lock.is_in_place and not self._stop.done():
                    self._stop_unreachable()
                if self._own_log is not None:
                    self._own_log.rotate_if_large()
            except Exception as error:  # noqa: BLE001 - whatever it is, the box must go on being looked after
                if (what := f"the supervisor can't look after everything: {error!r}") != said:
                    said = what
                    self._box.events.add("error", None, what)
            if self._notifier.watchdog_s is not None:
                self._notifier.send("WATCHDOG=1")
            await asyncio.sleep(period_s)


def run_on_uvloop(main: Coroutine[None, None, int]) -> int:
    """Run the supervisor's loop on this, the main, thread."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def print_error(error: BoxError) -> None:
    """What, details and remedy on stderr, for the foreground."""
    lines = [f"error: {error.what}", *(f"  {line}" for line in error.details)]
    if error.remedy:
        lines.append(f"  → {error.remedy}")
    sys.stderr.write("\n".join(lines) + "\n")
