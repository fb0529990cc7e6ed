"""How wide columns are, and which stay when the terminal is narrow. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_box.tui.model import Column


def fit(columns: Sequence[Column], natural: Sequence[int], width: int, gap: int) -> tuple[int, ...]:
    """The width of each column, 0 for one that is left out. `natural` are the widths that would clip nothing.

    Where they don't fit, long texts are clipped first, down to each column's `least`; then the column that is kept
    least goes and the others get their room back. Numbers (columns that stand to the right) aren't clipped: what is
    left of one is another number. Columns that always stay are cut at the right edge in the end.
    """
    shown = list(range(len(columns)))
    while shown:
        widths = {index: min(natural[index], columns[index].widest) for index in shown}
        excess = sum(widths.values()) + gap * (len(shown) - 1) - width
        floor = {
            index: wide if columns[index].right else min(wide, columns[index].least) for index, wide in widths.items()
        }
        if excess <= sum(widths[index] - floor[index] for index in shown):
            _take(widths, floor, excess)
            return tuple(widths.get(index, 0) for index in range(len(columns)))
        droppable = [index for index in shown if columns[index].keep > 0]
        if not droppable:
            return _squeeze(floor, len(columns), width, gap)
        shown.remove(min(droppable, key=lambda index: (columns[index].keep, -index)))
    return (0,) * len(columns)


def _take(widths: dict[int, int], floor: dict[int, int], excess: int) -> None:
    """Take `excess` cells from the columns that are furthest above their floor."""
    for _ in range(excess):
        widest = max(widths, key=lambda index: widths[index] - floor[index])
        widths[widest] -= 1


def _squeeze(floor: dict[int, int], count: int, width: int, gap: int) -> tuple[int, ...]:
    """What is left of the columns that always stay, from the left on."""
    widths = [0] * count
    left = width
    for index, wanted in floor.items():
        widths[index] = max(min(wanted, left), 0)
        left -= widths[index] + gap
    return tuple(widths)
