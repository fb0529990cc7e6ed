"""Numbers that are no figures: an engine may report them, and a recording may hold whatever it likes."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from fakes import snapshots

from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.bars import status
from dynamo_box.tui.feed import Feed
from dynamo_box.tui.filter import EVERYTHING
from dynamo_box.tui.model import Table
from dynamo_box.tui.screens import LOGS, SCREENS, view
from dynamo_box.tui.source import NewSnapshot
from dynamo_box.tui.stack import Stack
from dynamo_box.wording import duration

ABSURD = (math.nan, math.inf, -math.inf, 1e20, -1e20, 1e300)


def with_every_float(number: float, snapshot: BoxSnapshot, at: float) -> BoxSnapshot:
    def changed(value: Any) -> Any:
        match value:
            case dict():
                return {key: changed(each) for key, each in value.items()}
            case list() | tuple():
                return [changed(each) for each in value]
            case float():
                return number
            case _:
                return value

    plain = changed(msgspec.to_builtins(snapshot))
    return msgspec.msgpack.decode(msgspec.msgpack.encode({**plain, "at": at}), type=BoxSnapshot)


@pytest.mark.parametrize("kind", ["degraded", "shared", "tiered", "disaggregated"])
@pytest.mark.parametrize("at", [*ABSURD, snapshots.NOW])
@pytest.mark.parametrize("number", ABSURD)
def test_every_screen_and_every_detail_stands(number: float, at: float, kind: str) -> None:
    feed = Feed(live=False)
    feed.take(NewSnapshot(snapshots.busy()), snapshots.NOW)
    feed.take(NewSnapshot(with_every_float(number, snapshots.all_kinds()[kind], at)), snapshots.NOW)
    frame = feed.frame(snapshots.NOW)
    assert frame is not None
    assert status(feed, snapshots.NOW, (), 120).spans
    for screen in SCREENS:
        if screen.name == LOGS:
            continue
        panels = view(screen.name).panels(frame, 120)
        stack = Stack()
        stack.show(panels, EVERYTHING)
        for pane in stack.tables:
            for column in pane.table.columns:
                pane.sort_by(column.key)
                assert len(stack.lines(120, 40)) == 40
        for panel in panels:
            for row in panel.rows if isinstance(panel, Table) else ():
                view(screen.name).detail(frame, panel.key, row.key)


def test_a_time_that_is_none_is_not_told() -> None:
    assert duration(math.nan) == duration(math.inf) == duration(None) == "-"
