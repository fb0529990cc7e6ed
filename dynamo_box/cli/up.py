"""`dynbox up`: from a profile to a box that answers.

Everything that can be refused is refused before anything is fetched or started: the profile, the plan, the port. Then
what the store lacks is pulled, a supervisor is launched, and its snapshots are shown until it says that the box is
ready. From there on the box lives by itself; before that it lives only as long as this command does.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from dynamo_box.cli import complete, output, stderr, terminal
from dynamo_box.cli.planning import Planning, is_known, pull_all
from dynamo_box.cli.port import require_free
from dynamo_box.cli.progress import BoxProgress, Display, make_display
from dynamo_box.control.client import ControlClient
from dynamo_box.control.launch import Launching, is_held, launch, run_in_foreground
from dynamo_box.errors import BoxError, ExitCode, NotRunning, TimedOut, UsageError
from dynamo_box.log import LEVEL_VARIABLE
from dynamo_box.paths import run_dir
from dynamo_box.snapshot import BoxSnapshot

if TYPE_CHECKING:
    from dynamo_box.plan.types import Plan

app = complete.verb()

DEFAULT_PROFILE = "smollm2"
LEVELS = ("debug", "info", "warning", "error")
NEIGHBOUR_TIMEOUT_S = 10.0
"""How long a box that another command is just starting may take until its control socket is there."""

STOP_PATIENCE_S = 60.0


@app.command()
def up(
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            "-p",
            metavar="NAME|PATH",
            help=f"What to run (default: {DEFAULT_PROFILE}).",
            autocompletion=complete.profiles,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Serve this model, with a profile made for it and this machine.",
            autocompletion=complete.stored_models,
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, metavar="N", help="In place of the profile's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and start nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan, or progress and result, as JSON.")] = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay and be the supervisor (systemd, containers).")
    ] = False,
    log_level: Annotated[
        str | None, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
    ] = None,
    no_pull: Annotated[bool, typer.Option("--no-pull", help="Fail if a model is not in the store.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0.0, metavar="SECONDS", help="Give up, leaving nothing, when it takes longer."),
    ] = None,
) -> ExitCode:
    """Start a box and return when it answers: a real completion has come back from every model."""
    if profile is not None and model is not None:
        raise UsageError("--profile and --model exclude each other", remedy="put the model into the profile")
    if log_level is not None:
        if log_level.lower() not in LEVELS:
            raise UsageError(f"--log-level {log_level!r} is no level", remedy=f"levels: {', '.join(LEVELS)}")
        os.environ[LEVEL_VARIABLE] = log_level.lower()
    deadline = None if timeout is None else time.monotonic() + timeout
    display = make_display(as_json=as_json)
    try:
        with contextlib.closing(display):
            planning = _planning(profile, model, port, display, pull=not (no_pull or dry_run))
            plan = planning.plan()
            if dry_run:
                show_plan(plan, as_json=as_json)
            else:
                _start(planning, plan, display, foreground, not no_pull, deadline, as_json=as_json)
    except BoxError as error:
        if as_json:
            output.json_line(
                {
                    "event": "error",
                    "what": error.what,
                    "details": error.details,
                    "remedy": error.remedy,
                    "exit_code": int(error.exit_code),
                }
            )
        raise
    return ExitCode.OK


def _planning(profile: str | None, model: str | None, port: int | None, display: Display, *, pull: bool) -> Planning:
    """What to plan. Models of which nothing is known are pulled first, where that is allowed: only then can it be said
    whether they fit.
    """
    if model is not None:
        if pull and not is_known(model):
            pull_all([model], display, allowed=True)
        return Planning.of_model(model, port)
    planning = Planning.of_profile(profile or DEFAULT_PROFILE, port)
    if pull:
        pull_all(planning.unknown_origins(), display, allowed=True)
    return planning


def show_plan(plan: Plan, *, as_json: bool) -> None:
    from dynamo_box.plan.render import plan_json, plan_text

    if as_json:
        output.json(plan_json(plan))
    else:
        output.table(terminal.printable(plan_text(plan)).rstrip())


def _start(
    planning: Planning,
    plan: Plan,
    display: Display,
    foreground: bool,
    pull: bool,
    deadline: float | None,
    *,
    as_json: bool,
) -> None:
    progress = BoxProgress(display)
    neighbour = _neighbour()
    if neighbour is None:
        try:
            require_free(plan.host, plan.port)
            if missing := planning.missing_origins(plan):
                pull_all(missing, display, allowed=pull)
                plan = planning.plan()
            for warning in plan.warnings:
                stderr.warn(warning)
            if foreground:
                run_in_foreground(msgspec.msgpack.encode(plan))
            announce(_launch_and_follow(plan, progress, deadline), already=False, as_json=as_json)
        except BoxError:
            # Whatever failed: if another command has been quicker, its box is the reason.
            neighbour = _neighbour()
            if neighbour is None:
                raise
    if neighbour is not None:
        with neighbour:
            announce(_join(neighbour, plan, progress, deadline), already=True, as_json=as_json)


def _launch_and_follow(plan: Plan, progress: BoxProgress, deadline: float | None) -> BoxSnapshot:
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


def _neighbour() -> ControlClient | None:
    """The box in this run dir, waited for if another command is just starting it; None if nobody holds the run dir."""
    end = time.monotonic() + NEIGHBOUR_TIMEOUT_S
    while True:
        try:
            return ControlClient.connect(run_dir())
        except NotRunning:
            if not is_held(run_dir()) or time.monotonic() > end:
                return None
        time.sleep(0.05)  # a lock has no event that one who doesn't want it could wait for


def _join(client: ControlClient, plan: Plan, progress: BoxProgress, deadline: float | None) -> BoxSnapshot:
    """The box that is there already, once it is ready.

    Raises:
        BoxError: it is another one than was asked for, or it failed.
    """
    snapshot = client.snapshot()
    box = snapshot.box
    if (box.profile, box.endpoint) != (plan.profile, plan.endpoint):
        raise BoxError(
            f"another box is running: profile {box.profile} on {box.endpoint}, supervisor pid {box.pid}",
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


def announce(snapshot: BoxSnapshot, *, already: bool, as_json: bool) -> None:
    """The endpoint, the models, and what to do with them."""
    box = snapshot.box
    names = [model.name for model in snapshot.models]
    if as_json:
        output.json_line({"event": "ready", "already": already, "box": box, "models": snapshot.models})
        return
    if already:
        stderr.say(f"profile {box.profile} is already up since {box.uptime_s:.0f} s (supervisor pid {box.pid})")
        if box.state == "degraded":
            stderr.warn(f"the box is degraded: {box.cause}")
    output.text(f"{box.endpoint} serves {', '.join(names)} (profile {box.profile})")
    output.text("")
    output.text(f"  {_curl(box.endpoint, names[0])}" if names else "  no model")
    output.text("  dynbox chat")


def _curl(endpoint: str, model: str) -> str:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    text = msgspec.json.encode(body).decode()
    return f"curl {endpoint}/v1/chat/completions -H 'Content-Type: application/json' -d '{text}'"


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.001)


def _unfinished(snapshot: BoxSnapshot | None) -> tuple[str, ...]:
    if snapshot is None:
        return ()
    return tuple(
        f"{process.name}: {process.state} {process.phase}".rstrip()
        for process in snapshot.processes
        if process.state != "ready"
    )
