"""`dynbox role WORKER ROLE`: have a worker serve in another role, without loading anything anew."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dynamo_box.cli import complete, stderr
from dynamo_box.cli.process_acts import AsJson, DrainSeconds, act
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode
from dynamo_box.wording import printable

app = complete.verb()

CHANGE_MARGIN_S = 30.0
"""On top of the drain: the supervisor has finer deadlines, and says which one passed."""


class Role(StrEnum):
    """`both` is how people may call `aggregated`."""

    prefill = "prefill"
    decode = "decode"
    both = "both"
    aggregated = "aggregated"

    @property
    def planned(self) -> str:
        """The word that the box has for it."""
        return Role.aggregated.value if self is Role.both else self.value


@app.command()
def role(
    worker: Annotated[
        str, typer.Argument(help="A worker, as `dynbox ps` names it.", autocompletion=complete.live_workers)
    ],
    role: Annotated[Role, typer.Argument(help="What it is to compute: prompts, answers, or both (aggregated).")],
    drain: DrainSeconds = 30.0,
    as_json: AsJson = False,
) -> ExitCode:
    """Give a worker another role: it finishes what it runs, and keeps its weights. It keeps the role when restarted.

    With requests left when the time is up it goes on as before, with exit code 1.
    """

    def changed(client: ControlClient) -> str:
        if drain:
            stderr.say(f"{printable(worker)} finishes its requests (they get {drain:g} s)")
        try:
            return client.set_role(worker, role.planned, drain, drain + CHANGE_MARGIN_S)
        except KeyboardInterrupt:
            stderr.say("the change goes on; `dynbox ps` shows how far it is")
            raise

    return act(worker, changed, as_json=as_json)
