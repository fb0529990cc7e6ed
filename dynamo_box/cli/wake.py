"""`dynbox wake MODEL`: have it serve again, and say how long that took."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output
from dynamo_box.cli.model_acts import ModelName, act
from dynamo_box.errors import ExitCode

app = complete.verb()

WAKE_TIMEOUT_S = 900.0
"""Others may have to finish and go to sleep first, and the last resort is a cold start; the supervisor has the finer
deadlines.
"""


@app.command()
def wake(
    model: ModelName,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it is and how long each phase took, as JSON.")
    ] = False,
) -> ExitCode:
    """Wake a model; returns when it serves. If it can't go on from where it slept, it is started anew, and says why."""
    reply = act(
        model,
        lambda client: client.wake(model, WAKE_TIMEOUT_S),
        going_on="it goes on waking; `dynbox ps` shows how far it is",
    )
    if as_json:
        output.json({"model": model, "already": reply.already, "text": reply.text, "residency": reply.residency})
    else:
        output.text(wording.printable(reply.text))
    return ExitCode.OK
