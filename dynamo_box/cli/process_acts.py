"""What verbs that do something to one process have in common: its name, the time to drain, and what is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from dynamo_box.cli import complete, output
from dynamo_box.cli.names import did_you_mean
from dynamo_box.cli.seconds import seconds
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode, NotRunning
from dynamo_box.paths import run_dir

ProcessName = Annotated[
    str, typer.Argument(help="A process, as `dynbox ps` names it.", autocompletion=complete.live_processes)
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        "--drain", metavar="SECONDS", help="How long its running requests may take to finish.", callback=seconds
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the process as it is afterwards, as JSON.")]


def act(name: str, do: Callable[[ControlClient], str], *, as_json: bool) -> ExitCode:
    """Do something to the process `name` of the running box, and print what the supervisor says of it.

    Raises:
        NotRunning: there is no box, or no such process.
    """
    with ControlClient.connect(run_dir()) as client:
        names = [process.name for process in client.snapshot().processes]
        if name not in names:
            raise NotRunning(f"no process is called {name!r}", remedy=did_you_mean(name, names, kind="processes"))
        words = do(client)
        if as_json:
            output.json(next((each for each in client.snapshot().processes if each.name == name), None))
        else:
            output.text(words)
    return ExitCode.OK
