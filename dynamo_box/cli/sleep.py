"""`dynbox sleep MODEL`: let it finish, free its memory, and say what that freed."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output
from dynamo_box.cli.model_acts import ModelName, act
from dynamo_box.cli.seconds import seconds
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError, ExitCode
from dynamo_box.protocol.control import Freed, ModelSlept
from dynamo_box.protocol.gms import Place

app = complete.verb()

MOVE_MARGIN_S = 600.0
"""On top of the drain: large weights on their way to a slow disk are still well; the supervisor has finer deadlines."""


class Where(StrEnum):
    device = "device"
    host = "host"
    disk = "disk"


PLACES: dict[Where, Place] = {Where.device: "device", Where.host: "host", Where.disk: "disk"}


@app.command()
def sleep(
    model: ModelName,
    to: Annotated[
        Where | None, typer.Option("--to", help="Where its weights go (default: what the profile keeps them in).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Cancel its running requests.")] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Requests don't wake it, only `dynbox wake` does.")] = False,
    drain: Annotated[
        float,
        typer.Option(
            "--drain", metavar="SECONDS", help="How long its running requests may take to finish.", callback=seconds
        ),
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it is and what was freed, as JSON.")] = False,
) -> ExitCode:
    """Put a model to sleep. Its workers stay, its KV cache is given back, and its weights go where --to says.

    Exit code 1 if less was freed than it held, with the processes that hold the rest.
    """

    def slept(client: ControlClient) -> ModelSlept:
        place = None if to is None else PLACES[to]
        timeout_s = drain + MOVE_MARGIN_S
        return client.sleep(model, to=place, force=force, hold=hold, drain_s=drain, timeout_s=timeout_s)

    reply = act(model, slept, going_on="it goes on falling asleep; `dynbox ps` shows how far it is")
    if as_json:
        output.json(
            {
                "model": model,
                "already": reply.already,
                "text": reply.text,
                "freed": [{**_plain(freed), "fell_short": freed.fell_short} for freed in reply.freed],
                "residency": reply.residency,
            }
        )
    else:
        output.text(wording.printable(reply.text))
    if short := [freed for freed in reply.freed if freed.fell_short]:
        raise BoxError(
            f"{model} sleeps, but some of its memory is still held",
            remedy="restart or end those who hold it: `dynbox restart NAME`, or kill the pid",
            details=tuple(_held(freed) for freed in short),
        )
    return ExitCode.OK


def _held(freed: Freed) -> str:
    left = max(0, freed.expected_bytes - freed.freed_bytes)
    return (
        f"{freed.device}: {wording.size(left)} of {wording.size(freed.expected_bytes)}, by {', '.join(freed.holders)}"
    )


def _plain(freed: Freed) -> dict[str, object]:
    return {name: getattr(freed, name) for name in freed.__struct_fields__}
