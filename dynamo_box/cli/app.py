"""`dynbox`: the table of verbs, and the one place that turns what happened into stderr and an exit code."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from dynamo_box import __version__
from dynamo_box.errors import BoxError, ExitCode


class Verb(NamedTuple):
    """`module` is imported when the verb runs; it holds `app`."""

    module: str
    summary: str


VERBS = {
    "up": Verb("up", "Start a box and wait until it answers"),
    "down": Verb("down", "Drain the box and stop it"),
    "ps": Verb("ps", "Show the box, its models and its processes"),
    "top": Verb("top", "Watch and steer the box"),
    "logs": Verb("logs", "Read the logs of every process, merged by time"),
    "restart": Verb("restart", "Drain and restart one process"),
    "drain": Verb("drain", "Let one worker finish and leave it stopped"),
    "role": Verb("role", "Have a worker compute prompts, answers, or both"),
    "scale": Verb("scale", "Have more or fewer workers of a model"),
    "disagg": Verb("disagg", "Show or change when prompts and answers part ways"),
    "advise": Verb("advise", "Say which role or policy would help"),
    "sleep": Verb("sleep", "Put a model to sleep and free its memory"),
    "wake": Verb("wake", "Wake a model that sleeps"),
    "gms": Verb("gms", "Show the weight memory of each device"),
    "kv": Verb("kv", "Show the KV tiers, or clear them"),
    "chat": Verb("chat", "Talk to a model of the box"),
    "pull": Verb("pull", "Bring a model into the store"),
    "models": Verb("models", "List the models in the store, or remove one"),
    "profile": Verb("profile", "List, show, check and write profiles"),
    "service": Verb("service", "Run a profile as a systemd service"),
    "doctor": Verb("doctor", "Check this machine and what a box needs"),
    "help": Verb("help", "Read a page of the manual"),
    "completion": Verb("completion", "Print the completion script for a shell"),
}


class Verbs(TyperGroup):
    """Verbs by name and summary; the module behind one is imported when that verb is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            module = importlib.import_module(f"dynamo_box.cli.{VERBS[args[0]].module}")
            self.commands[args[0]] = typer.main.get_command(module.app)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of stdout has seen enough
            return ExitCode.OK


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynbox {__version__}")
        raise typer.Exit


def _application() -> typer.Typer:
    app = typer.Typer(
        cls=Verbs,
        name="dynbox",
        help="A serious LLM serving stack on one machine. Start with `dynbox up`, then `dynbox chat`.",
        epilog="Exit codes: 0 ok, 1 failed, 2 usage or profile, 3 not running, 4 timed out, 130 interrupted.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
        ] = False,
    ) -> None:
        """Options that stand before the verb."""

    for name, verb in VERBS.items():
        app.command(name, help=verb.summary)(_placeholder)
    return app


def _placeholder() -> None:
    """Stands for a verb in the list; `Verbs.resolve_command` puts the real one in its place."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from dynamo_box.cli import stderr, stdout

    stdout.guard()
    if "_DYNBOX_COMPLETE" in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]  # its home is private

        completion_init()
    command = typer.main.get_command(_application())
    try:
        status = command.main(
            args=None if arguments is None else list(arguments), prog_name="dynbox", standalone_mode=False
        )
    except BoxError as error:
        stderr.report(error)
        status = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        status = ExitCode.INTERRUPTED
    except BrokenPipeError:
        status = ExitCode.OK
    except Exception as error:  # noqa: BLE001 - the last resort: a traceback belongs in a file
        status = stderr.report_usage(error) if hasattr(error, "format_message") else stderr.report_bug(error)
    return _finish(int(status or 0))


def _finish(status: int) -> int:
    """Write out what is left; a failure of that, unless another was reported already, is the command's."""
    from dynamo_box.cli import stderr, stdout

    try:
        stdout.close()
    except BoxError as error:
        if status == ExitCode.OK:
            stderr.report(error)
            return error.exit_code
    return status
