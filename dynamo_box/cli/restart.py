"""`dynbox restart NAME`: drain one process and start it again."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_box.cli import complete, output
from dynamo_box.cli.names import did_you_mean
from dynamo_box.cli.seconds import seconds
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode, NotRunning
from dynamo_box.paths import run_dir

app = complete.verb()

START_TIMEOUT_S = 600.0
"""A worker that loads a large model from a slow disk is still well; the supervisor has the finer deadline."""


@app.command()
def restart(
    name: Annotated[
        str,
        typer.Argument(help="A process, as `dynbox ps` names it.", autocompletion=complete.live_processes),
    ],
    drain: Annotated[
        float,
        typer.Option(
            "--drain", metavar="SECONDS", help="How long its running requests may take to finish.", callback=seconds
        ),
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the process as it is afterwards, as JSON.")] = False,
) -> ExitCode:
    """Drain and restart one process; returns when it is ready again."""
    with ControlClient.connect(run_dir()) as client:
        names = [process.name for process in client.snapshot().processes]
        if name not in names:
            raise NotRunning(f"no process is called {name!r}", remedy=did_you_mean(name, names, kind="processes"))
        words = client.restart(name, drain, drain + START_TIMEOUT_S)
        process = next((each for each in client.snapshot().processes if each.name == name), None)
    if as_json:
        output.json(process)
    elif process is not None:
        output.text(words or f"{name} is {process.state} again (pid {process.pid})")
    return ExitCode.OK
