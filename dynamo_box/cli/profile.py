"""`dynbox profile`: list, show, check and write profiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dynamo_box.cli import complete, output, render, stderr
from dynamo_box.cli.planning import Planning, stored_facts
from dynamo_box.errors import ExitCode, PlanRefused, UsageError

app = complete.verb(help="List, show, check and write profiles.", no_args_is_help=True)


@app.command("list")
def list_all(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> ExitCode:
    """List the profiles: those shipped, and your own."""
    from dynamo_box.profile.load import list_profiles

    profiles = list_profiles()
    if as_json:
        output.json(
            [
                {
                    "name": each.name,
                    "path": str(each.path),
                    "shipped": each.shipped,
                    "description": each.description,
                    "problem": each.problem or None,
                }
                for each in profiles
            ]
        )
        return ExitCode.OK
    rows = [
        (
            each.name,
            "shipped" if each.shipped else "yours",
            each.description or f"can't be used: {each.problem}",
        )
        for each in profiles
    ]
    output.table(render.table(("NAME", "FROM", "DESCRIPTION"), rows))
    return ExitCode.OK


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A profile.", autocompletion=complete.profiles)],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every setting as it counts, defaults included.")
    ] = False,
) -> ExitCode:
    """Print a profile's file; with --json, all its settings with defaults, what it extends, and ${…} filled in."""
    from dynamo_box.profile.load import load_profile, profile_text, resolved

    if as_json:
        output.json(resolved(load_profile(name)))
    else:
        output.text(profile_text(name).rstrip())
    return ExitCode.OK


@app.command()
def validate(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME|PATH…", help="Profiles.", autocompletion=complete.profiles)
    ],
    simulate: Annotated[
        list[str] | None,
        typer.Option(
            "--simulate",
            metavar="gpu=NxSIZE",
            help="Whether they would fit a machine with these GPUs.",
            autocompletion=complete.simulated,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> ExitCode:
    """Check profiles: all problems at once, with file, line and column; and whether this machine can run them."""
    from dynamo_box.errors import ProfileError

    results = []
    status = ExitCode.OK
    for name in names:
        problems: tuple[str, ...] = ()
        refusal: tuple[str, ...] = ()
        try:
            planning = Planning.of_profile(name, None, simulate or ())
        except ProfileError as error:
            status = ExitCode.USAGE
            problems = error.details or (error.what,)
            if not as_json:
                stderr.report(error)
        else:
            try:
                planning.plan()
            except PlanRefused as error:
                refusal = error.details
            if not as_json:
                output.text(f"{name}: valid" + (", but this machine can't carry it" if refusal else ""))
                for line in refusal:
                    output.text(f"  {line}")
        results.append(
            {
                "profile": name,
                "valid": not problems,
                "problems": problems,
                "fits": not problems and not refusal,
                "reasons": refusal,
            }
        )
    if as_json:
        output.json(results)
    return status


@app.command()
def schema() -> ExitCode:
    """Print the JSON Schema of a profile, for editors."""
    from dynamo_box.profile.json_schema import json_schema

    output.json(json_schema())
    return ExitCode.OK


@app.command()
def new(
    model: Annotated[
        str,
        typer.Argument(help="A model of the store or the catalogue.", autocompletion=complete.stored_models),
    ],
    path: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it there; default: to stdout."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What clients call the model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> ExitCode:
    """Write a profile that serves a model on this machine."""
    from dynamo_box.hardware import detect
    from dynamo_box.plan.author import write_profile

    text = write_profile(model, detect(), stored_facts(), name=name)
    if path is None:
        output.text(text.rstrip())
        return ExitCode.OK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
        with os.fdopen(os.open(path, flags, 0o644), "w") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{path} exists", remedy="choose another file, or replace it with --force") from error
    stderr.say(f"wrote {path}; start it with `dynbox up --profile {path}`")
    return ExitCode.OK
