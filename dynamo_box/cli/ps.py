"""`dynbox ps`: the box, its models and its processes."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, render, terminal
from dynamo_box.cli.model_words import SIMULATED, model_words, wake_words
from dynamo_box.cli.tier_words import tier_troubles
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode, NotRunning
from dynamo_box.paths import run_dir
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo

app = complete.verb()

NO_BOX: dict[str, Any] = {
    "box": {"state": "stopped", "profile": None, "endpoint": None, "pid": None, "uptime_s": None},
    "models": [],
    "processes": [],
}
"""What `--json` prints without a box: the same shape, so that a script needs one way to read it."""

_STATE_STYLES = {
    "ready": "green",
    "asleep": "blue",
    "falling_asleep": "yellow",
    "waking": "yellow",
    "starting": "yellow",
    "backoff": "yellow",
    "draining": "yellow",
    "stopping": "yellow",
    "fatal": "red",
    "failed": "red",
    "unavailable": "red",
    "degraded": "yellow",
}


@app.command()
def ps(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole snapshot as JSON.")] = False,
) -> ExitCode:
    """Show the box, its models and its processes. Exit code 3 if no box is running."""
    try:
        with ControlClient.connect(run_dir()) as client:
            snapshot = client.snapshot()
    except NotRunning:
        if as_json:
            output.json(NO_BOX)
        raise
    if as_json:
        output.json(snapshot)
    else:
        show(snapshot)
    return ExitCode.OK


def show(snapshot: BoxSnapshot) -> None:
    box = snapshot.box
    output.text(
        f"box {_coloured(box.state)}  profile {box.profile}  {box.endpoint}  "
        f"pid {box.pid}  up {wording.duration(box.uptime_s)}"
    )
    if snapshot.simulated:
        output.text(terminal.style(SIMULATED, "yellow", sys.stdout))
    if box.cause:
        output.text(f"  {wording.printable(box.cause)}")
    for model in snapshot.models:
        state, rest = model_words(model, snapshot.at or time.time())
        output.text(f"model {model.name}  {_coloured(state, model.state)}  {rest}".rstrip())
        if line := wake_words(model):
            output.text(f"  {line}")
    output.text("")
    output.table(process_table(snapshot.processes))
    for process in snapshot.processes:
        if process.cause and process.state not in ("ready", "asleep"):
            output.text(f"{process.name}: {wording.printable(process.cause)}")
    for device in snapshot.devices:
        if device.note:
            output.text(f"{device.id}: {device.note}")
    for trouble in tier_troubles(snapshot):
        output.text(trouble)


def process_table(processes: tuple[ProcessInfo, ...]) -> str:
    header = ("NAME", "KIND", "MODEL", "ROLE", "STATE", "PHASE", "PID", "RESTARTS", "DEVICE", "MEMORY")
    rows = [
        (
            process.name,
            process.kind,
            process.model or "-",
            process.role or "-",
            process.state,
            _phase(process),
            str(process.pid or "-"),
            str(process.restarts),
            process.device or "-",
            wording.size(process.rss_bytes),
        )
        for process in processes
    ]
    return render.table(header, rows, right=(6, 7, 9))


def _phase(process: ProcessInfo) -> str:
    if process.progress is None:
        return process.phase or "-"
    extent = wording.amount(process.progress.done, process.progress.total, process.progress.unit)
    return f"{process.phase} {extent}".strip() or "-"


def _coloured(words: str, state: str = "") -> str:
    return terminal.style(words, _STATE_STYLES.get(state or words, "bold"), sys.stdout)
