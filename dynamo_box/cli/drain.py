"""`dynbox drain NAME`: let one worker finish what it runs, and stop it until it is restarted."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_box.cli import complete, output, stderr
from dynamo_box.cli.names import did_you_mean
from dynamo_box.cli.seconds import seconds
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode, NotRunning
from dynamo_box.paths import run_dir
from dynamo_box.wording import printable

app = complete.verb()

STOP_MARGIN_S = 30.0
"""On top of the drain: a worker that doesn't go needs TERM, then KILL."""


@app.command()
def drain(
    name: Annotated[
        str,
        typer.Argument(help="A worker, as `dynbox ps` names it.", autocompletion=complete.live_processes),
    ],
    drain: Annotated[
        float,
        typer.Option(
            "--drain", metavar="SECONDS", help="How long its running requests may take to finish.", callback=seconds
        ),
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the process as it is afterwards, as JSON.")] = False,
) -> ExitCode:
    """Drain one worker and leave it stopped; new requests go to the others. `dynbox restart` brings it back."""
    with ControlClient.connect(run_dir()) as client:
        names = [process.name for process in client.snapshot().processes]
        if name not in names:
            raise NotRunning(f"no process is called {name!r}", remedy=did_you_mean(name, names, kind="processes"))
        if drain:
            stderr.say(f"draining {printable(name)} (running requests get {drain:g} s)")
        try:
            words = client.drain(name, drain, drain + STOP_MARGIN_S)
        except KeyboardInterrupt:
            stderr.say("the drain goes on; `dynbox ps` shows how far it is, --drain 0 cuts it short")
            raise
        process = next((each for each in client.snapshot().processes if each.name == name), None)
    if as_json:
        output.json(process)
    else:
        output.text(words)
    return ExitCode.OK
