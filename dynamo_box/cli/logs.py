"""`dynbox logs`: what every process wrote, merged by time, with or without a running box."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, terminal
from dynamo_box.cli.names import did_you_mean
from dynamo_box.control import logs as log_files
from dynamo_box.errors import ExitCode, NotRunning, UsageError
from dynamo_box.paths import home, logs_dir, run_dir

app = complete.verb()

DEFAULT_LINES = 200
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LEVEL_STYLES = {"warning": "yellow", "error": "red", "critical": "red", "debug": "dim"}


@app.command()
def logs(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Processes; all if none is named.", autocompletion=complete.logged_processes),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, across restarts of the box.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="WHEN", help="Only lines after 10m, 2h, 1d ago or an ISO time."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--lines",
            "-n",
            min=0,
            max=100_000,
            metavar="N",
            help="Only the last N lines (200 without --since).",
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option("--level", metavar="LEVEL", help="Only this level and above: debug, info, warning, error."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are: one JSON object each.")] = False,
) -> ExitCode:
    """Read the logs of the box, merged by time. They outlive a box and a crash of any part of it."""
    start = 0.0 if since is None else parse_since(since, time.time())
    wanted = at_least(level)
    directory = logs_dir(run_dir(), home())
    known = log_files.processes_with_logs(directory)
    for name in names or ():
        if name not in known:
            remedy = did_you_mean(name, known, kind="processes that have logged")
            raise NotRunning(f"no process called {name!r} has logged", remedy=remedy)
    if not known and not follow:
        raise NotRunning(f"no box has logged in {directory} yet", remedy="start one with `dynbox up`")

    show = _show_json if as_json else _show
    follower = log_files.Follower(directory, names or None) if follow else None
    until = {} if follower is None else follower.marks  # from there on the follower shows them
    chosen = list(until) or names or known
    if since is not None and count is None:
        entries: Iterable[log_files.Entry] = log_files.since(directory, chosen, start, wanted, until)
    else:
        count = DEFAULT_LINES if count is None else count
        entries = log_files.tail(directory, chosen, count, wanted, start, until)
    for entry in entries:
        show(entry)
    if follower is not None:
        sys.stdout.flush()
        for _ in follower.wait():
            for entry in follower.read():
                if wanted(entry):
                    show(entry)
            sys.stdout.flush()
    return ExitCode.OK


def parse_since(text: str, now: float) -> float:
    """Unix time of `10m`, `1h30m`, `2d` ago, or of an ISO 8601 time (local unless it says otherwise).

    Raises:
        UsageError: it is neither.
    """
    pieces = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if pieces and "".join(number + unit for number, unit in pieces) == text:
        return now - sum(float(number) * _UNITS[unit] for number, unit in pieces)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UsageError(
            f"--since {text!r} is no time",
            remedy="write 30s, 10m, 2h, 1d, or an ISO time such as 2026-01-31T14:00",
        ) from error


def at_least(level: str | None) -> log_files.Predicate:
    """Raises:
    UsageError: there is no such level.
    """
    if level is None:
        return lambda _: True
    lowest = log_files.LEVELS.get(level.lower())
    if lowest is None:
        raise UsageError(f"--level {level!r} is no level", remedy=did_you_mean(level, log_files.LEVELS, kind="levels"))
    return lambda entry: log_files.LEVELS.get(entry.level, log_files.LEVELS["info"]) >= lowest


def key_value(entry: log_files.Entry) -> str:
    """`12:34:56.789 warning worker event key=value`, and an exception on lines of its own. Safe for a terminal."""
    at = datetime.fromtimestamp(entry.at)
    head = f"{at:%H:%M:%S}.{at.microsecond // 1000:03} {entry.level:<7} {entry.process}"
    head = wording.printable(head).replace("\n", "\\n")
    line = f"{head}  {log_files.message(entry)}"
    trace = entry.fields.get("exception")
    return f"{line}\n{wording.printable(str(trace))}" if trace else line


def _show_json(entry: log_files.Entry) -> None:
    output.json_line(entry.fields)


def _show(entry: log_files.Entry) -> None:
    text = key_value(entry)
    name = _LEVEL_STYLES.get(entry.level)
    output.text(terminal.style(text, name, sys.stdout) if name else text)
