"""Tables and bars for people. Pure: strings in, strings out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_box.cli.terminal import clip
from dynamo_box.wording import printable


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
