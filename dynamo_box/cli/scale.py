"""`dynbox scale MODEL ROLE N`: more or fewer workers, while the box runs."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_box.cli import complete, output, stderr
from dynamo_box.cli.model_acts import ModelName, act
from dynamo_box.cli.process_acts import DrainSeconds
from dynamo_box.cli.role import Role
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode
from dynamo_box.paths import run_dir

app = complete.verb()

START_TIMEOUT_S = 600.0
"""On top of the drain: a worker that loads a large model from a slow disk is still well."""


@app.command()
def scale(
    model: ModelName,
    role: Annotated[Role, typer.Argument(help="Workers for prompts, for answers, or for both (aggregated).")],
    count: Annotated[int, typer.Argument(metavar="N", min=0, max=256, help="How many there are to be; 0 is none.")],
    drain: DrainSeconds = 30.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the workers of the model afterwards, as JSON.")
    ] = False,
) -> ExitCode:
    """Have N workers of a model in a role; returns when new ones are ready, or nothing is left of those that go.

    New ones are like those that were planned, and start only if there is memory for all of them.
    """
    words = act(
        model,
        lambda client: client.scale(model, role.planned, count, drain, drain + START_TIMEOUT_S),
        going_on="the change goes on; `dynbox ps` shows how far it is",
    )
    if as_json:
        stderr.say(words)
        with ControlClient.connect(run_dir()) as client:
            output.json([each for each in client.snapshot().processes if each.kind == "worker" and each.model == model])
    else:
        output.text(words)
    return ExitCode.OK
