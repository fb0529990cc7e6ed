"""What `dynbox` says to a person beside its data: the only writer to stderr, apart from the live display of `up`."""

from __future__ import annotations

import os
import sys

from dynamo_box.cli.terminal import style
from dynamo_box.errors import BoxError, ExitCode
from dynamo_box.wording import printable

DEBUG_VARIABLE = "DYNBOX_DEBUG"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def warn(text: str) -> None:
    say(f"{style('warning:', 'yellow', sys.stderr)} {text}")


def report(error: BoxError) -> None:
    """What happened, why, and what to do."""
    say(f"{style('error:', 'red', sys.stderr)} {printable(error.what)}")
    for line in error.details:
        say(f"  {printable(line)}")
    if error.remedy:
        say(f"{style('hint:', 'bold', sys.stderr)} {printable(error.remedy)}")


def report_usage(error: Exception) -> ExitCode:
    """An error that the argument parser found; it knows the command, and the nearest right word."""
    context = getattr(error, "ctx", None)
    message = error.format_message()  # type: ignore[attr-defined]  # what tells the parser's errors from others
    message = message.replace(": Value error, ", ": ", 1)  # the parser's way into "is not one of"
    if type(error).__name__ == "NoArgsIsHelpError":
        say(message)
        return ExitCode.USAGE
    say(f"{style('error:', 'red', sys.stderr)} {printable(message)}")
    if context is not None:
        say(f"{style('hint:', 'bold', sys.stderr)} {context.command_path} --help")
    return ExitCode.USAGE


def report_bug(error: Exception) -> ExitCode:
    """A defect of this program: one line here, the traceback in a file, or here if DYNBOX_DEBUG is set."""
    import traceback

    text = "".join(traceback.format_exception(error))
    say(f"{style('error:', 'red', sys.stderr)} {type(error).__name__}: {printable(str(error))}")
    if os.environ.get(DEBUG_VARIABLE):
        say(text)
        return ExitCode.FAILED
    from dynamo_box.paths import home

    path = home().state / "last-crash.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as problem:
        say(f"this is a defect of dynbox; run again with {DEBUG_VARIABLE}=1 to see where ({problem})")
    else:
        say(f"this is a defect of dynbox; where it happened is in {path} (or set {DEBUG_VARIABLE}=1)")
    return ExitCode.FAILED
