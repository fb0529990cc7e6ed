"""The memory screen: a bar a place that reads without colour, and exact bytes."""

from __future__ import annotations

import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.protocol.figures import GmsFigures, LayoutFigures, LockHolder
from dynamo_box.snapshot import BoxSnapshot, DeviceInfo
from dynamo_box.tui.filter import EVERYTHING
from dynamo_box.tui.model import Lines, Table
from dynamo_box.tui.stack import Stack
from dynamo_box.tui.text import spans_width
from dynamo_box.tui.views import charts
from dynamo_box.tui.views.layout_table import LAYOUTS
from dynamo_box.tui.views.memory import MAX_BARS, VIEW

MIB = 1 << 20
GIB = 1 << 30


def panels(snapshot: BoxSnapshot, width: int = 80) -> tuple[list[str], Table]:
    """The lines above the tables, as text, and the table of places."""
    found = VIEW.panels(snapshots.frame(snapshot), width)
    lines = [text for panel in found if isinstance(panel, Lines) for text in as_text(panel)]
    return lines, next(panel for panel in found if isinstance(panel, Table))


def layouts(snapshot: BoxSnapshot) -> Table:
    *_, table = VIEW.panels(snapshots.frame(snapshot), 80)
    assert isinstance(table, Table)
    assert table.key == LAYOUTS
    return table


def as_text(panel: object) -> list[str]:
    assert isinstance(panel, Lines)
    return ["".join(span.text for span in line) for line in panel.lines]


def cell(table: Table, row: str, column: str) -> str:
    index = [each.key for each in table.columns].index(column)
    return next(each for each in table.rows if each.key == row).cells[index].text


def detail(snapshot: BoxSnapshot, row: str, panel: str = "places") -> str:
    found = VIEW.detail(snapshots.frame(snapshot), panel, row)
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


def test_weights_that_two_workers_map_are_there_once_and_so_are_those_that_sleep_in_host_memory() -> None:
    _, table = panels(snapshots.shared())
    on_device, asleep_in_host_memory = (513 + 513 + 257) * MIB, (257 + 513) * MIB
    assert cell(table, "host", "weights") == f"{on_device + asleep_in_host_memory:,}"
    assert cell(table, "disk /", "weights") == f"{257 * MIB:,}"


def test_a_box_without_a_service_has_no_layouts() -> None:
    assert [panel.key for panel in VIEW.panels(snapshots.frame(snapshots.busy()), 80)] == ["bars", "places"]


def test_each_layout_says_where_it_is_and_who_maps_it() -> None:
    table = layouts(snapshots.shared())
    names = [row.cells[0].text for row in table.rows]
    assert names == ["smollm2", "coder", "judge", "guard", "chat"]
    assert [cell(table, f"gms@cpu {name}", "place") for name in names] == [
        "device",
        "host",
        "disk",
        "host→device",
        "device",
    ]
    assert cell(table, "gms@cpu smollm2", "readers") == "smollm2.aggregated.{0,1}"
    assert cell(table, "gms@cpu coder", "readers") == "-"
    assert cell(table, "gms@cpu guard", "waiters") == "guard.aggregated.0 ro 2s"
    assert table.note == "1 moving"
    assert "device" not in [column.key for column in table.columns], "one service: there is one device"


def test_80_columns_show_where_weights_are_and_who_maps_them() -> None:
    stack = Stack()
    stack.show(VIEW.panels(snapshots.frame(snapshots.shared()), 80), EVERYTHING)
    text = "\n".join("".join(span.text for span in line.spans) for line in stack.lines(80, 21))
    for said in ("LAYOUT", "PLACE", "BYTES", "host→device", "smollm2.aggregated.{0,1}", "guard.aggregated.0 ro"):
        assert said in text


def test_the_detail_of_a_layout_names_pids_epoch_hash_and_history() -> None:
    text = detail(snapshots.shared(), "gms@cpu smollm2", LAYOUTS)
    for said in ("gms@cpu", "9f2c41d0a7b3e655", "4010", "4020", "10m00s", "epoch 1 committed", "272"):
        assert said in text
    assert "guard.aggregated.0  4050" in detail(snapshots.shared(), "gms@cpu guard", LAYOUTS)
    assert VIEW.detail(snapshots.frame(snapshots.shared()), LAYOUTS, "gms@cpu gone") is None
    assert VIEW.detail(snapshots.frame(snapshots.shared()), LAYOUTS, "host") is None


def test_a_writer_and_who_waits_for_it_are_named() -> None:
    writer, waiter = LockHolder("m.0", 7, "rw", snapshots.NOW - 9), LockHolder("m.1", 8, "rw_or_ro", snapshots.NOW - 4)
    layout = LayoutFigures("m", "writing", "", 0, "", 0, device_bytes=5, writer=writer, waiters=(waiter,))
    snapshot = with_layouts(layout)
    table = layouts(snapshot)
    row = "gms@cpu m"
    assert [cell(table, row, key) for key in ("state", "writer", "waiters")] == [
        "writing",
        "m.0",
        "m.1 rw_or_ro 4s",
    ]
    assert "written by m.0" in detail(snapshot, "host")
    assert "rw_or_ro" in detail(snapshot, row, LAYOUTS)


def test_of_very_many_readers_the_first_are_named_and_the_others_counted() -> None:
    readers = tuple(LockHolder(f"m.{number}", number, "ro", 0.0) for number in range(100))
    table = layouts(with_layouts(LayoutFigures("m", "committed", "device", 1, "", 5, 5, readers=readers)))
    assert cell(table, "gms@cpu m", "mapped") == "100"
    assert cell(table, "gms@cpu m", "readers").endswith(",31}, 68 more")


def test_who_maps_what_stands_in_the_detail_of_a_place() -> None:
    text = detail(snapshots.shared(), "host")
    assert "smollm2  513 MiB  device  mapped by smollm2.aggregated.{0,1}" in text
    assert "coder    257 MiB  host  mapped by nobody" in text
    assert "judge" not in text.partition("Who maps what")[2].partition("By process")[0]
    assert "judge  257 MiB  disk  mapped by nobody" in detail(snapshots.shared(), "disk /")


def test_a_service_that_says_nothing_is_said_to_and_an_empty_one_too() -> None:
    snapshot = snapshots.shared()
    gms, *others = snapshot.processes
    down = replace(gms, state="backoff", figures=None)
    assert layouts(replace(snapshot, processes=(down, *others))).empty == (
        "gms@cpu is backoff and has reported nothing yet."
    )
    assert layouts(with_layouts()).empty == "No weights are in a layout."


def with_layouts(*found: LayoutFigures) -> BoxSnapshot:
    snapshot = snapshots.shared()
    gms = replace(snapshot.processes[0], figures=GmsFigures("cpu", GIB, layouts=found))
    return replace(snapshot, processes=(gms, *snapshot.processes[1:]))


@pytest.mark.parametrize("kind", snapshots.all_kinds())
@pytest.mark.parametrize("width", [1, 5, 20, 40, 80, 200])
def test_lines_are_never_wider_than_the_screen(kind: str, width: int) -> None:
    for panel in VIEW.panels(snapshots.frame(snapshots.all_kinds()[kind]), width):
        if isinstance(panel, Lines):
            assert all(spans_width(line) <= width for line in panel.lines)


@pytest.mark.parametrize("kind", snapshots.all_kinds())
def test_every_place_has_a_detail_and_no_power_over_the_terminal(kind: str) -> None:
    snapshot = snapshots.all_kinds()[kind]
    bars, places = panels(snapshot)
    texts = list(bars)
    for table in (places, layouts(snapshot)) if kind in ("shared", "sleepers", "hostile", "gaps") else (places,):
        texts += [each.text for row in table.rows for each in row.cells]
        texts += [line for row in table.rows for line in detail(snapshot, row.key, table.key).splitlines()]
    assert not [text for text in texts if "\x1b" in text or "\u202e" in text]


def test_a_bar_is_as_wide_as_asked_and_divided_as_its_parts_are() -> None:
    assert charts.apportioned([1, 1, 1], 10) == [4, 3, 3]
    assert charts.apportioned([0, 5, 0], 7) == [0, 7, 0]
    assert charts.apportioned([0, 0], 7) == [0, 0]
    assert sum(charts.apportioned([1, 10**12, 7, 10**9], 33)) == 33
