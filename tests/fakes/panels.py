"""What is said in the panels of a view, for tests of views."""

from __future__ import annotations

from dynamo_box.tui.model import Lines, Table, Tone


def row(table: Table, key: str) -> dict[str, str]:
    found = next(row for row in table.rows if row.key == key)
    return {column.key: cell.text for column, cell in zip(table.columns, found.cells, strict=True)}


def tone(table: Table, key: str, column: str) -> Tone:
    index = [each.key for each in table.columns].index(column)
    return next(row for row in table.rows if row.key == key).cells[index].tone


def text(lines: Lines | None) -> str:
    assert lines is not None
    return "\n".join("".join(span.text for span in line) for line in lines.lines)
