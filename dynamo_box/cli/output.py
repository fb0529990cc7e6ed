"""stdout: data only. JSON comes indented, one document; streams come as one object a line."""

from __future__ import annotations

import sys

import msgspec

from dynamo_box.cli import render, terminal


def text(data: str) -> None:
    print(data)  # noqa: T201


def table(data: str) -> None:
    """A table; clipped to the width of a terminal, whole when a program reads it."""
    text(render.fit(data, terminal.width()) if sys.stdout.isatty() else data)


def json(value: object) -> None:
    text(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def json_line(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
