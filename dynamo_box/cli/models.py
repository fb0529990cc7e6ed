"""`dynbox models`: what the store holds, and how to take something out of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, render, stderr
from dynamo_box.cli.names import did_you_mean
from dynamo_box.errors import BoxError, ExitCode, NotRunning, UsageError
from dynamo_box.paths import home, run_dir

app = complete.verb(help="List the models in the store, or remove one.", invoke_without_command=True)


@app.callback()
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> ExitCode:
    """List the models in the store, or remove one."""
    if context.invoked_subcommand is None:
        _list(as_json=as_json)
    return ExitCode.OK


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> ExitCode:
    """List the models in the store."""
    _list(as_json=as_json)
    return ExitCode.OK


@app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(help="A model in the store.", autocompletion=complete.stored_models)],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was freed as JSON.")] = False,
) -> ExitCode:
    """Remove a model from the store, unless the running box serves it."""
    from dynamo_box.profile.store import ModelStore

    store = ModelStore(home().models)
    if store.inspect(name) is None:
        known = [entry.name for entry in store.list()]
        raise UsageError(f"no model {name!r} in the store", remedy=did_you_mean(name, known, kind="models"))
    if str(store.path_of(name)) in _served_paths():
        raise BoxError(f"the running box serves {name}", remedy="`dynbox down` first")
    freed = store.remove(name)
    if as_json:
        output.json({"name": name, "freed_bytes": freed})
    else:
        output.text(f"removed {name}: {wording.size(freed)} freed")
    return ExitCode.OK


def _served_paths() -> set[str]:
    from dynamo_box.control.client import ControlClient

    try:
        with ControlClient.connect(run_dir()) as client:
            return {model.path for model in client.snapshot().models}
    except NotRunning:
        return set()


def _list(*, as_json: bool) -> None:
    from dynamo_box.profile.store import ModelStore, StoredModel

    entries = ModelStore(home().models).list()
    if as_json:
        output.json([_as_data(entry) for entry in entries])
        return
    rows = []
    for entry in entries:
        if isinstance(entry, StoredModel):
            facts = entry.facts
            rows.append(
                (
                    entry.name,
                    facts.architecture,
                    facts.dtype,
                    wording.size(facts.weights_bytes),
                    str(facts.context_length),
                    entry.source,
                )
            )
        else:
            rows.append((entry.name, "broken", "-", "-", "-", entry.reason))
    if rows:
        output.table(
            render.table(("NAME", "ARCHITECTURE", "DTYPE", "WEIGHTS", "CONTEXT", "SOURCE"), rows, right=(3, 4))
        )
    else:
        stderr.say(f"the store {home().models} is empty; `dynbox pull smollm2` fetches the embedded model")


def _as_data(entry: Any) -> dict[str, Any]:
    from dynamo_box.profile.store import StoredModel

    common: dict[str, Any] = {"name": entry.name, "path": str(entry.path)}
    if not isinstance(entry, StoredModel):
        return {**common, "state": "broken", "reason": entry.reason}
    return {
        **common,
        "state": "ready",
        "source": entry.source,
        "fingerprint": entry.fingerprint,
        "bytes": entry.bytes,
        "created": entry.created,
        "facts": entry.facts,
    }
