"""`dynbox down`: drain, stop, verify, and say what was freed."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, stderr
from dynamo_box.cli.seconds import seconds
from dynamo_box.control.client import ControlClient
from dynamo_box.control.launch import Swept, sweep
from dynamo_box.errors import BoxError, ExitCode, NotRunning, TimedOut
from dynamo_box.paths import run_dir
from dynamo_box.protocol.control import Stopped

app = complete.verb()

STOP_MARGIN_S = 60.0
"""On top of the drain: every process may need TERM, then KILL, one after the other in reverse order."""

EXIT_TIMEOUT_S = 15.0


@app.command()
def down(
    drain: Annotated[
        float,
        typer.Option(
            "--drain", metavar="SECONDS", help="How long running requests may take to finish.", callback=seconds
        ),
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was freed as JSON.")] = False,
) -> ExitCode:
    """Stop the box: finish running requests, stop every process in reverse order, verify that nothing is left.

    Without a running box it clears up what a dead one left; exit code 3 if there was nothing at all.
    """
    try:
        client = ControlClient.connect(run_dir())
    except NotRunning:
        return _clear_up(sweep(), as_json=as_json)
    with client:
        snapshot = client.snapshot()
        with _end_of(snapshot.box.pid) as wait_for_exit:
            if drain:
                stderr.say(f"stopping {snapshot.box.profile} (running requests get {drain:g} s)")
            stopped = client.down(drain, drain + STOP_MARGIN_S)
            wait_for_exit()
    if as_json:
        output.json(
            {
                "processes": stopped.processes,
                "killed": stopped.killed,
                "freed_bytes": stopped.freed_bytes,
                "survivors": stopped.survivors,
            }
        )
    else:
        output.text(summary(stopped))
    _require_none(stopped.survivors)
    return ExitCode.OK


def _require_none(survivors: tuple[int, ...]) -> None:
    """Raises:
    BoxError: some processes are left.
    """
    if survivors:
        raise BoxError(
            f"these processes are still there: {', '.join(map(str, survivors))}",
            remedy="a process that survives KILL waits for a device or a file system; look at its state with ps",
        )


def summary(stopped: Stopped) -> str:
    """One line: what went, how, and what came back."""
    killed = f", {stopped.killed} of them by KILL" if stopped.killed else ""
    left = "nothing is left running" if not stopped.survivors else f"{len(stopped.survivors)} are left running"
    noun = "process" if stopped.processes == 1 else "processes"
    return f"stopped {stopped.processes} {noun}{killed}; {wording.size(stopped.freed_bytes)} freed; {left}"


def _clear_up(swept: Swept, *, as_json: bool) -> ExitCode:
    if as_json:
        output.json(
            {
                "processes": 0,
                "killed": swept.killed,
                "freed_bytes": 0,
                "survivors": swept.survivors,
                "swept": swept.pids,
            }
        )
    if not swept.pids:
        raise NotRunning("no box is running, and none has left anything", remedy="start one with `dynbox up`")
    stderr.say("no box is running")
    if not as_json:
        pids = ", ".join(map(str, swept.pids))
        output.text(f"cleared up {swept.killed} of {len(swept.pids)} leftover processes of a dead box (pids {pids})")
    _require_none(swept.survivors)
    return ExitCode.OK


@contextlib.contextmanager
def _end_of(pid: int) -> Iterator[Callable[[], None]]:
    """Hold on to a process before it ends; yields a function that waits until it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield lambda: None
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(EXIT_TIMEOUT_S * 1000):
            raise TimedOut(f"the box has stopped, but its supervisor (pid {pid}) doesn't exit", remedy=f"kill -9 {pid}")

    try:
        yield wait
    finally:
        os.close(descriptor)
