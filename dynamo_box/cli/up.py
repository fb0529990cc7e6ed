"""`dynbox up`: from a profile to a box that answers.

Everything that can be refused is refused before anything is fetched or started: the profile, the plan, the port. Then
what the store lacks is pulled, a supervisor is launched, and its snapshots are shown until it says that the box is
ready. From there on the box lives by itself; before that it lives only as long as this command does.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, stderr
from dynamo_box.cli.model_words import SIMULATED, resting
from dynamo_box.cli.planning import Planning, is_known, pull_all
from dynamo_box.cli.port import require_free
from dynamo_box.cli.progress import BoxProgress, Display, make_display
from dynamo_box.cli.seconds import seconds
from dynamo_box.cli.start import join, launch_and_follow, neighbour
from dynamo_box.control.launch import run_in_foreground
from dynamo_box.errors import BoxError, ExitCode, UsageError
from dynamo_box.log import LEVEL_VARIABLE
from dynamo_box.service.systemctl import ends_with_session
from dynamo_box.snapshot import BoxSnapshot

if TYPE_CHECKING:
    from dynamo_box.plan.types import Plan

app = complete.verb()

DEFAULT_PROFILE = "smollm2"
LEVELS = ("debug", "info", "warning", "error")


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
    simulate: Annotated[
        list[str] | None,
        typer.Option(
            "--simulate",
            metavar="gpu=NxSIZE",
            help="Rehearse: mock engines on GPUs that aren't there, such as gpu=8x80GiB.",
            autocompletion=complete.simulated,
        ),
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
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="Give up, leaving nothing, when the start takes longer.",
            callback=seconds,
        ),
    ] = None,
) -> ExitCode:
    """Start a box and return when it answers: a real completion has come back from every model."""
    if profile is not None and model is not None:
        raise UsageError("--profile and --model exclude each other", remedy="put the model into the profile")
    if model is not None and simulate:
        raise UsageError(
            "--model writes a profile for this machine", remedy="rehearse a profile: --profile, --simulate"
        )
    if log_level is not None:
        if log_level.lower() not in LEVELS:
            raise UsageError(f"--log-level {log_level!r} is no level", remedy=f"levels: {', '.join(LEVELS)}")
        os.environ[LEVEL_VARIABLE] = log_level.lower()
    display = make_display(as_json=as_json)
    try:
        with contextlib.closing(display):
            planning = _planning(profile, model, port, simulate or (), display, pull=not (no_pull or dry_run))
            plan = planning.plan()
            if dry_run:
                show_plan(plan, as_json=as_json)
            else:
                _start(planning, plan, display, foreground, not no_pull, timeout, as_json=as_json)
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


def _planning(
    profile: str | None, model: str | None, port: int | None, simulate: Sequence[str], display: Display, *, pull: bool
) -> Planning:
    """What to plan. Models of which nothing is known are pulled first, where that is allowed: only then can it be said
    whether they fit.
    """
    if model is not None:
        if pull and not is_known(model):
            pull_all([model], display, allowed=True)
        return Planning.of_model(model, port)
    planning = Planning.of_profile(profile or DEFAULT_PROFILE, port, simulate)
    if pull:
        pull_all(planning.unknown_origins(), display, allowed=True)
    return planning


def show_plan(plan: Plan, *, as_json: bool) -> None:
    from dynamo_box.plan.render import plan_json, plan_text

    if as_json:
        output.json(plan_json(plan))
    else:
        output.table(wording.printable(plan_text(plan)).rstrip())


def _start(
    planning: Planning,
    plan: Plan,
    display: Display,
    foreground: bool,
    pull: bool,
    timeout_s: float | None,
    *,
    as_json: bool,
) -> None:
    progress = BoxProgress(display)
    other = neighbour()
    if other is None:
        try:
            require_free(plan.host, plan.port)
            if missing := planning.missing_origins(plan):
                pull_all(missing, display, allowed=pull)
                plan = planning.plan()
            for warning in plan.warnings:
                stderr.warn(warning)
            if foreground:
                run_in_foreground(msgspec.msgpack.encode(plan))
            announce(launch_and_follow(plan, progress, _deadline(timeout_s)), already=False, as_json=as_json)
        except BoxError:
            # Whatever failed: if another command has been quicker, its box is the reason.
            other = neighbour()
            if other is None:
                raise
    if other is not None:
        with other:
            announce(join(other, plan, progress, _deadline(timeout_s)), already=True, as_json=as_json)


def announce(snapshot: BoxSnapshot, *, already: bool, as_json: bool) -> None:
    """The endpoint, the models, and what to do with them."""
    box = snapshot.box
    names = [model.name for model in snapshot.models]
    if as_json:
        output.json_line({"event": "ready", "already": already, "box": box, "models": snapshot.models})
        return
    if already:
        uptime = wording.duration(box.uptime_s)
        stderr.say(f"profile {box.profile} is already up, for {uptime} (supervisor pid {box.pid})")
    if box.state == "degraded":
        stderr.warn(f"the box is degraded: {box.cause}")
    if ends_with_session(Path(box.run_dir)):
        stderr.say("it ends with your last session on this machine; `loginctl enable-linger` has it outlive that")
    if snapshot.simulated:
        output.text(SIMULATED)
    output.text(f"{box.endpoint} serves {', '.join(names)} (profile {box.profile})")
    asleep = [f"{model.name} ({place})" for model in snapshot.models if (place := resting(model))]
    if asleep:
        output.text(f"asleep until a request wakes them: {', '.join(asleep)}")
    awake = [model.name for model in snapshot.models if not resting(model)]
    output.text("")
    output.text(f"  {_curl(box.endpoint, (awake or names)[0])}" if names else "  no model")
    output.text("  dynbox chat")


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _curl(endpoint: str, model: str) -> str:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    text = msgspec.json.encode(body).decode()
    return f"curl {endpoint}/v1/chat/completions -H 'Content-Type: application/json' -d '{text}'"
