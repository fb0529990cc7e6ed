"""`dynbox top`: watch the box and steer it, in the terminal; or one look at it, as text, data or a picture."""

from __future__ import annotations

import codecs
import io
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamo_box.cli import complete, output, stderr, terminal
from dynamo_box.cli.names import did_you_mean
from dynamo_box.errors import BoxError, ExitCode, UsageError
from dynamo_box.files import replace_text
from dynamo_box.paths import home, logs_dir, run_dir

if TYPE_CHECKING:
    from dynamo_box.tui.filter import Filter
    from dynamo_box.tui.log_feed import LogFeed
    from dynamo_box.tui.session import Options
    from dynamo_box.tui.source import Source

app = complete.verb()

_SIZE = (120, 40)
END = math.inf
"""Where a recording is looked at once, if nobody asks for another moment."""
_MOST_CELLS = 1000


def _screen_names(incomplete: str) -> list[str]:
    from dynamo_box.tui.screens import SCREENS

    return [each.name for each in SCREENS if each.name.startswith(incomplete)]


@app.command()
def top(
    screen: Annotated[
        str, typer.Option("--screen", metavar="NAME", help="Screen, by name or key.", autocompletion=_screen_names)
    ] = "fleet",
    once: Annotated[bool, typer.Option("--once", help="Print the screen as text, and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON, and leave.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write a picture of the screen, and leave.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="FILE", help="Record the box, for --replay.")
    ] = None,
    replay: Annotated[
        str | None, typer.Option("--replay", metavar="FILE", help="Play a recording or a demo; no box is needed.")
    ] = None,
    speed: Annotated[float | None, typer.Option("--speed", metavar="X", help="Play so many times as fast.")] = None,
    at: Annotated[
        float | None, typer.Option("--at", min=0.0, metavar="SECONDS", help="Go to this moment of the recording.")
    ] = None,
    readonly: Annotated[bool, typer.Option("--readonly", help="Watch only; nothing can be told to the box.")] = False,
    theme: Annotated[
        str | None, typer.Option("--theme", metavar="NAME", help="dark, light or none (without colour).")
    ] = None,
    wanted: Annotated[
        str, typer.Option("--filter", metavar="REGEX", help="Only rows that match; a leading ! turns it round.")
    ] = "",
    size: Annotated[
        str | None, typer.Option("--size", metavar="COLSxROWS", help="Size of the picture, or of what --once prints.")
    ] = None,
) -> ExitCode:
    """Watch the box and steer it. Keys 1 to 7 choose a screen; ? says the rest."""
    from dynamo_box.tui.session import Options

    _refuse_nonsense(once=once, as_json=as_json, svg=svg, record=record, replay=replay, speed=speed, at=at, size=size)
    cells = None if size is None else _size(size)
    options = Options(_screen(screen), _filter(wanted), _theme(theme, svg), readonly)
    if as_json:
        return _print_snapshot(replay, at)
    if not (once or svg or record or _interactive()):
        raise UsageError("`dynbox top` needs a terminal", remedy="use --once, --json or --svg FILE where there is none")
    if once or svg:
        return _look(options, replay, speed, at, svg, cells)
    return _watch(options, replay, speed, at, record)


def _refuse_nonsense(
    *,
    once: bool,
    as_json: bool,
    svg: Path | None,
    record: Path | None,
    replay: str | None,
    speed: float | None,
    at: float | None,
    size: str | None,
) -> None:
    given = [name for name, on in (("--once", once), ("--json", as_json), ("--svg", svg), ("--record", record)) if on]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", remedy=f"use {given[0]} alone")
    if replay is not None and record is not None:
        raise UsageError("--record and --replay exclude each other", remedy="a recording is a file: copy it")
    if speed is not None and replay is None:
        raise UsageError("--speed is of no use without --replay", remedy="name a recording with --replay FILE")
    if at is not None and replay is None:
        raise UsageError("--at is of no use without --replay", remedy="name a recording with --replay FILE")
    if size is not None and not (once or svg):
        raise UsageError("--size is of no use without --once or --svg", remedy="resize the terminal instead")


def _screen(wanted: str) -> str:
    from dynamo_box.tui.screens import SCREENS, by_name

    found = by_name(wanted)
    if found is None:
        names = [each.name for each in SCREENS]
        raise UsageError(f"there is no screen {wanted!r}", remedy=did_you_mean(wanted, names, kind="screens"))
    return found.name


def _filter(text: str) -> Filter:
    from dynamo_box.tui.filter import Filter, FilterError

    try:
        return Filter.parse(text)
    except FilterError as error:
        raise UsageError(f"--filter: {error}", remedy="write \\ before characters that stand for themselves") from error


def _theme(wanted: str | None, svg: Path | None) -> str:
    from dynamo_box.tui.theme_names import DARK, THEME_NAMES, default_theme

    if wanted is None:
        return DARK if svg is not None else default_theme(os.environ)
    if wanted not in THEME_NAMES:
        raise UsageError(f"there is no theme {wanted!r}", remedy=did_you_mean(wanted, THEME_NAMES, kind="themes"))
    return wanted


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})[xX×](\d{1,4})", text)
    cells = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= each <= _MOST_CELLS for each in cells):
        raise UsageError(f"--size {text!r} is no size", remedy=f"write 120x40, at most {_MOST_CELLS}x{_MOST_CELLS}")
    return cells


def _open(replay: str | None, speed: float | None, at: float | None) -> tuple[Source, LogFeed]:
    if replay is not None:
        from dynamo_box.tui.replay import open_replay

        played = open_replay(replay, 1.0 if speed is None else speed)
        if at is not None:
            played.seek(at)
        return played, played
    from dynamo_box.tui.log_feed import LiveLog
    from dynamo_box.tui.source import LiveSource

    run = run_dir()
    return LiveSource(run), LiveLog(logs_dir(run, home()))


def _print_snapshot(replay: str | None, at: float | None) -> ExitCode:
    from dynamo_box.tui import headless
    from dynamo_box.tui.session import Options

    if replay is None:
        from dynamo_box.control.client import ControlClient

        with ControlClient.connect(run_dir()) as client:
            output.json(client.snapshot())
    else:
        output.json(headless.look(*_open(replay, None, END if at is None else at), Options()).session.feed.snapshot)
    return ExitCode.OK


def _look(
    options: Options,
    replay: str | None,
    speed: float | None,
    at: float | None,
    svg: Path | None,
    size: tuple[int, int] | None,
) -> ExitCode:
    """Print the screen or draw it: as wide as the terminal, with every row, if no size is asked for."""
    from dynamo_box.tui import headless

    seen = headless.look(*_open(replay, speed, END if at is None else at), options)
    if svg is not None:
        from dynamo_box.tui.drawing import as_svg
        from dynamo_box.tui.themes import THEMES

        width, height = size or _SIZE
        _write(svg, as_svg(seen.lines(width, height), width, THEMES[options.theme], f"dynbox top: {options.screen}"))
        return ExitCode.OK
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # lines and bars are drawn in characters that Latin-1 lacks
    width = size[0] if size else terminal.width(_SIZE[0])
    lines = seen.lines(width, size[1] if size else None)
    if terminal.has_colour(sys.stdout) and options.theme != "none":
        from dynamo_box.tui.drawing import as_ansi
        from dynamo_box.tui.themes import THEMES

        output.text(as_ansi(lines, width, THEMES[options.theme], truecolor=_truecolor()))
    else:
        output.text(headless.as_text(lines))
    return ExitCode.OK


def _watch(
    options: Options, replay: str | None, speed: float | None, at: float | None, record: Path | None
) -> ExitCode:
    """The screen, or a recording alone where there is no terminal."""
    source, log = _open(replay, speed, at)
    if record is None:
        return _show(source, log, options)
    from dynamo_box.tui.log_feed import LiveLog
    from dynamo_box.tui.recorded import Recorded
    from dynamo_box.tui.recorder import Recorder

    with Recorder(record) as recorder:
        recorded = Recorded(source, LiveLog(logs_dir(run_dir(), home())), recorder)
        if _interactive():
            return _show(recorded, log, replace(options, recording=lambda: recorded.state))
        from dynamo_box.tui import headless

        stderr.say(f"recording to {record}; ends with the box, or with Ctrl-C")
        stderr.say(headless.record(recorded))
    return ExitCode.OK


def _show(source: Source, log: LogFeed, options: Options) -> ExitCode:
    from dynamo_box.tui.app import TopApp

    if codecs.lookup(sys.stderr.encoding).name != "utf-8":
        raise UsageError(
            f"this terminal is said to take {sys.stderr.encoding}; the screens are drawn in UTF-8",
            remedy="LC_ALL=C.UTF-8 dynbox top, if it does take UTF-8; else --once",
        )
    for name in ("COLUMNS", "LINES"):  # of the shell's making, and wrong as soon as the terminal is resized
        os.environ.pop(name, None)
    top = TopApp(source, log, run_dir(), options)
    top.run()
    if top.failure is not None:
        raise top.failure
    return ExitCode(top.return_code or 0)


def _interactive() -> bool:
    streams = (sys.stdin, sys.stdout, sys.stderr)  # None where the shell has closed one (`<&-`)
    return all(stream is not None and stream.isatty() for stream in streams)


def _truecolor() -> bool:
    return os.environ.get("COLORTERM", "").casefold() in ("truecolor", "24bit")


def _write(path: Path, text: str) -> None:
    """A link stays a link, and what is no file (a pipe, /dev/stdout) isn't replaced by one."""
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            replace_text(path.resolve(), text)
    except OSError as error:
        raise BoxError(f"can't write {path}: {error.strerror}", remedy="name a file that you may write") from error
