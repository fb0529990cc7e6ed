"""Figures and tables for people. Pure: strings in, strings out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_box.cli.terminal import clip, printable

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def size(value: int | None) -> str:
    """Bytes with a binary unit and three digits, `-` for what can't be read."""
    if value is None:
        return "-"
    scaled, unit = float(value), 0
    while scaled >= 1000 and unit < len(_BINARY) - 1:
        scaled, unit = scaled / 1024, unit + 1
    if unit == 0:
        return f"{value} B"
    return f"{scaled:.{0 if scaled >= 100 else 1}f} {_BINARY[unit]}"


def duration(seconds: float | None) -> str:
    """`8s`, `3m12s`, `4h02m`, `2d03h`."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def amount(done: int | None, total: int | None, unit: str) -> str:
    """How far a phase is: `120 MiB of 513 MiB`, `3 of 8 layers`, `7 tokens`; empty if it doesn't say."""
    if done is None:
        return ""

    def one(value: int) -> str:
        return size(value) if unit == "bytes" else str(value)

    text = one(done) if total is None else f"{one(done)} of {one(total)}"
    return text if unit in ("", "bytes") else f"{text} {unit}"


def bar(done: int, total: int, columns: int) -> str:
    filled = columns * min(max(done, 0), total) // total if total > 0 else 0
    return "█" * filled + "░" * (columns - filled)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Columns as wide as their widest cell; those numbered in `right` are aligned to the right."""
    cells = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    to_right = set(right)
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if column in to_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def fit(text: str, columns: int) -> str:
    """Clip each line, so that a table never wraps on a narrow terminal."""
    return "\n".join(clip(line, columns) for line in text.splitlines())
