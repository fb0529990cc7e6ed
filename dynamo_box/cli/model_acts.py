"""What verbs that do something to one model have in common: its name, and that it is looked up first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from dynamo_box.cli import complete, stderr
from dynamo_box.cli.names import did_you_mean
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import NotRunning
from dynamo_box.paths import run_dir

ModelName = Annotated[
    str, typer.Argument(help="A model, as `dynbox ps` names it.", autocompletion=complete.served_models)
]

Reply = TypeVar("Reply")


def act(name: str, do: Callable[[ControlClient], Reply], *, going_on: str) -> Reply:
    """Do something to a model of the running box; `going_on` is said when Ctrl-C ends the waiting for it.

    Raises:
        NotRunning: there is no box, or no such model.
    """
    with ControlClient.connect(run_dir()) as client:
        names = [model.name for model in client.snapshot().models]
        if name not in names:
            raise NotRunning(f"no model is called {name!r}", remedy=did_you_mean(name, names, kind="models"))
        try:
            return do(client)
        except KeyboardInterrupt:
            stderr.say(going_on)
            raise
