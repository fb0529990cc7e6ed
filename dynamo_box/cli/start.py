"""The two ways to a ready box: start one and follow it, or join the one that is there already.

A start belongs to this command until the box is ready: whatever ends the command ends the start, and a command that is
interrupted waits until nothing is left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from dynamo_box.cli import stderr
from dynamo_box.cli.progress import BoxProgress
from dynamo_box.control.client import ControlClient
from dynamo_box.control.launch import Launching, is_held, launch
from dynamo_box.errors import BoxError, NotRunning, TimedOut
from dynamo_box.paths import run_dir
from dynamo_box.snapshot import BoxSnapshot

if TYPE_CHECKING:
    from dynamo_box.plan.types import Plan

NEIGHBOUR_TIMEOUT_S = 10.0
"""How long a box that another command is just starting may take until its control socket is there."""

STOP_PATIENCE_S = 60.0


def launch_and_follow(plan: Plan, progress: BoxProgress, deadline: float | None) -> BoxSnapshot:
    """Start a supervisor and show what it does until the box is ready. Leaves nothing otherwise.

    Raises:
        BoxError: the start failed.
        TimedOut: the deadline passed.
        KeyboardInterrupt: Ctrl-C.
    """
    snapshot: BoxSnapshot | None = None
    with launch(msgspec.msgpack.encode(plan)) as launching:
        try:
            while True:
                latest = launching.next(_left(deadline))
                if latest is None:
                    break
                snapshot = latest
                progress.show(snapshot)
        except TimeoutError as error:
            _stop(launching, "out of time")
            raise TimedOut(
                "the box was not ready in time; nothing of it is left",
                remedy="give it longer with --timeout, or see `dynbox logs`",
                details=_unfinished(snapshot),
            ) from error
        except KeyboardInterrupt:
            _stop(launching, "interrupted")
            raise
        except BoxError:
            launching.wait_gone(STOP_PATIENCE_S)
            raise
    if snapshot is None:
        raise BoxError("the supervisor called the box ready without showing it", remedy="see `dynbox ps`")
    return snapshot


def _stop(launching: Launching, why: str) -> None:
    """Have everything taken down that was started, and see it gone; Ctrl-C again only says that it is on its way."""
    stderr.say(f"{why}: stopping what was started")
    launching.abort()
    end = time.monotonic() + STOP_PATIENCE_S
    while (left := end - time.monotonic()) > 0:
        try:
            if launching.wait_gone(left):
                return
        except KeyboardInterrupt:
            stderr.say("still stopping; the supervisor finishes that even if this command is killed")
    raise BoxError(
        f"the supervisor (pid {launching.pid}) is still stopping after {STOP_PATIENCE_S:.0f} s",
        remedy=f"kill -9 {launching.pid}, then `dynbox down`",
    )


def neighbour() -> ControlClient | None:
    """The box in this run dir, waited for if another command is just starting it; None if nobody holds the run dir."""
    end = time.monotonic() + NEIGHBOUR_TIMEOUT_S
    while True:
        try:
            return ControlClient.connect(run_dir())
        except NotRunning:
            if not is_held(run_dir()) or time.monotonic() > end:
                return None
        time.sleep(0.05)  # a lock has no event that one who doesn't want it could wait for


def join(client: ControlClient, plan: Plan, progress: BoxProgress, deadline: float | None) -> BoxSnapshot:
    """The box that is there already, once it is ready.

    Raises:
        BoxError: it is another one than was asked for, or it failed.
    """
    snapshot = client.snapshot()
    box = snapshot.box
    simulated = snapshot.simulated
    if (box.profile, box.endpoint, simulated) != (plan.profile, plan.endpoint, plan.simulated):
        how = " (simulated)" if simulated else ""
        raise BoxError(
            f"another box is running: profile {box.profile}{how} on {box.endpoint}, supervisor pid {box.pid}",
            remedy="`dynbox down` stops it; another DYNBOX_RUN_DIR and --port run a second box beside it",
        )
    if box.state == "starting":
        stderr.say(f"profile {box.profile} is already being started (supervisor pid {box.pid})")
        for snapshot in _until(client.watch(), deadline):
            progress.show(snapshot)
            if snapshot.box.state != "starting":
                break
    if snapshot.box.state not in ("ready", "degraded"):
        raise BoxError(
            f"the box (profile {box.profile}, supervisor pid {box.pid}) is {snapshot.box.state}, not ready",
            remedy="wait until it is gone, then `dynbox up` again",
            details=(snapshot.box.cause,) if snapshot.box.cause else (),
        )
    return snapshot


def _until(snapshots: Iterator[BoxSnapshot], deadline: float | None) -> Iterator[BoxSnapshot]:
    """Raises:
    TimedOut: the deadline passed.
    """
    for snapshot in snapshots:
        if deadline is not None and time.monotonic() > deadline:
            raise TimedOut("the box that another command is starting was not ready in time", remedy="see `dynbox ps`")
        yield snapshot


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.001)


def _unfinished(snapshot: BoxSnapshot | None) -> tuple[str, ...]:
    if snapshot is None:
        return ()
    return tuple(
        f"{process.name}: {process.state} {process.phase}".rstrip()
        for process in snapshot.processes
        if process.state not in ("ready", "asleep")
    )
