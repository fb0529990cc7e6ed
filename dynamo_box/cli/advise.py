"""`dynbox advise`: which change of a role or of the policy would help, with reasons and the command for it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dynamo_box.advise.load import measure
from dynamo_box.advise.rules import Advice, advise
from dynamo_box.cli import complete, output, stderr
from dynamo_box.cli.names import did_you_mean
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode, NotRunning
from dynamo_box.paths import run_dir
from dynamo_box.wording import printable

app = complete.verb()


@app.command("advise")
def show(
    model: Annotated[
        str | None, typer.Argument(help="A model; without one, all.", autocompletion=complete.served_models)
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, max=3600, metavar="S", help="How long to measure.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> ExitCode:
    """Measure how busy the workers of each role are, and say what would help against late tokens.

    What late is says the profile: `targets` of a model.
    """
    with ControlClient.connect(run_dir()) as client:
        before = client.snapshot()
        names = [each.name for each in before.models]
        if model is not None and model not in names:
            raise NotRunning(f"no model is called {model!r}", remedy=did_you_mean(model, names, kind="models"))
        stderr.say(f"measuring for {seconds:g} s")
        time.sleep(seconds)  # the span that is measured
        after = client.snapshot()
    advice = [advise(measure(name, before, after)) for name in names if model in (None, name)]
    if as_json:
        output.json([_plain(each) for each in advice])
    else:
        for each in advice:
            output.text(_words(each))
    return ExitCode.OK


def _words(advice: Advice) -> str:
    lines = [f"{advice.model}: {advice.command or 'leave it as it is'}"]
    lines += [f"  {printable(reason)}" for reason in advice.reasons]
    return "\n".join(lines)


def _plain(advice: Advice) -> dict[str, object]:
    """`needed`: whether something is wrong, be there help or not."""
    return {
        "model": advice.model,
        "kind": advice.kind,
        "worker": advice.worker or None,
        "role": advice.role or None,
        "setting": advice.setting or None,
        "needed": advice.needed,
        "reasons": advice.reasons,
        "command": advice.command or None,
    }
