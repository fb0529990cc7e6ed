"""The memory screen: a bar a place that reads without colour, and exact bytes."""

from __future__ import annotations

import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.snapshot import BoxSnapshot, DeviceInfo
from dynamo_box.tui.model import Lines, Table
from dynamo_box.tui.text import spans_width
from dynamo_box.tui.views import charts
from dynamo_box.tui.views.memory import MAX_BARS, VIEW

GIB = 1 << 30


def panels(snapshot: BoxSnapshot, width: int = 80) -> tuple[list[str], Table]:
    """The lines above the table, as text, and the table."""
    *lines, table = VIEW.panels(snapshots.frame(snapshot), width)
    assert isinstance(table, Table)
    return [text for panel in lines for text in as_text(panel)], table


def as_text(panel: object) -> list[str]:
    assert isinstance(panel, Lines)
    return ["".join(span.text for span in line) for line in panel.lines]


def cell(table: Table, row: str, column: str) -> str:
    index = [each.key for each in table.columns].index(column)
    return next(each for each in table.rows if each.key == row).cells[index].text


def detail(snapshot: BoxSnapshot, row: str) -> str:
    found = VIEW.detail(snapshots.frame(snapshot), "places", row)
    return "\n".join(as_text(found))


def test_every_device_the_host_and_the_disks_have_a_bar_of_their_own() -> None:
    bars, table = panels(snapshots.busy())
    starts = [line.split("  ")[0].strip() for line in bars[:11]]
    assert starts[0] == "GPU-4f1c2b3d"
    assert [line.split()[0] for line in bars[8:11]] == ["host", "disk", "disk"]
    assert len(table.rows) == 11
    assert bars[0].endswith("58.0/80.0 GiB  72%")
    bar = bars[0].split()[1]
    order = [character for number, character in enumerate(bar) if number == 0 or bar[number - 1] != character]
    assert order == ["█", "▓", "▒", "░", "=", "·"]


def test_the_legend_names_what_is_drawn_and_nothing_else() -> None:
    bars, _ = panels(snapshots.tiny())
    legend = bars[1]
    assert legend == "█ weights  ▒ KV cached  ░ KV free  = other  ? unattributed  · free"


def test_bytes_in_the_table_are_exact_and_unknown_is_never_nought() -> None:
    snapshot = snapshots.degraded()
    _, table = panels(snapshot)
    well, unread = snapshot.devices[0].id, snapshot.devices[3].id
    assert cell(table, well, "weights") == f"{16 * GIB:,}"
    assert cell(table, well, "total") == f"{80 * GIB:,}"
    assert cell(table, unread, "weights") == cell(table, unread, "others") == "-"
    assert cell(table, unread, "unattributed") == f"{70 * GIB:,}"


def test_a_column_that_no_place_has_is_not_there() -> None:
    _, table = panels(snapshots.tiny())
    keys = [column.key for column in table.columns]
    assert "others" not in keys
    assert "basis" not in keys
    assert "unattributed" in keys


def test_a_simulated_device_says_planned() -> None:
    device = DeviceInfo("SIM-00", "NVIDIA H100", "simulated", 80 * GIB, {"KV": 40 * GIB})
    snapshot = replace(snapshots.empty(), devices=(device,))
    bars, table = panels(snapshot)
    assert bars[0].endswith("40.0/80.0 GiB planned")
    assert cell(table, "SIM-00", "basis") == "planned"
    assert "as planned: nothing measures this place" in detail(snapshot, "SIM-00")


def test_of_many_devices_the_fullest_have_bars_beside_host_and_disks() -> None:
    bars, table = panels(snapshots.crowded())
    labels = [line.split()[0] for line in bars]
    assert "host" in labels
    assert labels.count("disk") == 2
    assert f"… and {len(table.rows) - MAX_BARS} that are less full" in bars
    assert len(table.rows) == 65


def test_a_detail_sets_what_is_held_beside_the_plan_and_names_the_processes() -> None:
    snapshot = snapshots.busy()
    text = detail(snapshot, snapshot.devices[0].id)
    assert "17,179,869,184" in text
    assert "llama.aggregated.0" in text
    assert "llama.aggregated.1" not in text
    assert [line.split() for line in text.splitlines() if line.startswith("KV  ")] == [
        ["KV", "40.0", "GiB", "40.0", "GiB", "as", "planned"]
    ]
    assert "49.0 MiB less" in detail(snapshots.tiny(), "host")
    assert VIEW.detail(snapshots.frame(snapshot), "places", "gone") is None


@pytest.mark.parametrize("kind", snapshots.all_kinds())
@pytest.mark.parametrize("width", [1, 5, 20, 40, 80, 200])
def test_lines_are_never_wider_than_the_screen(kind: str, width: int) -> None:
    *lines, _ = VIEW.panels(snapshots.frame(snapshots.all_kinds()[kind]), width)
    for panel in lines:
        assert isinstance(panel, Lines)
        assert all(spans_width(line) <= width for line in panel.lines)


@pytest.mark.parametrize("kind", snapshots.all_kinds())
def test_every_place_has_a_detail_and_no_power_over_the_terminal(kind: str) -> None:
    snapshot = snapshots.all_kinds()[kind]
    bars, table = panels(snapshot)
    texts = bars + [each.text for row in table.rows for each in row.cells]
    texts += [line for row in table.rows for line in detail(snapshot, row.key).splitlines()]
    assert not [text for text in texts if "\x1b" in text or "\u202e" in text]


def test_a_bar_is_as_wide_as_asked_and_divided_as_its_parts_are() -> None:
    assert charts.apportioned([1, 1, 1], 10) == [4, 3, 3]
    assert charts.apportioned([0, 5, 0], 7) == [0, 7, 0]
    assert charts.apportioned([0, 0], 7) == [0, 0]
    assert sum(charts.apportioned([1, 10**12, 7, 10**9], 33)) == 33
