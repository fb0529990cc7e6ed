"""The fleet screen, from snapshots."""

from __future__ import annotations

import pytest
from fakes import snapshots
from fakes.panels import row, text, tone
from msgspec.structs import replace
from rich.cells import cell_len

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, DeviceFigures
from dynamo_box.tui.columns import fit
from dynamo_box.tui.history import History
from dynamo_box.tui.host import HOST
from dynamo_box.tui.model import Table, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import fleet
from dynamo_box.tui.views.device_table import DEVICES
from dynamo_box.tui.views.fleet import PROCESSES

VIEW = fleet.VIEW


def table(snapshot: BoxSnapshot, key: str) -> Table:
    found = next(panel for panel in VIEW.panels(snapshots.frame(snapshot), 120) if panel.key == key)
    assert isinstance(found, Table)
    return found


def shown_at(table: Table, width: int) -> list[str]:
    natural = [
        max(cell_len(column.title), *(cell_len(row.cells[index].text) for row in table.rows))
        for index, column in enumerate(table.columns)
    ]
    widths = fit(table.columns, natural, width, 1)
    return [column.key for column, wide in zip(table.columns, widths, strict=True) if wide]


def test_a_busy_worker() -> None:
    assert row(table(snapshots.busy(), PROCESSES), "llama.aggregated.2") == {
        "process": "llama.aggregated.2",
        "model": "llama",
        "role": "aggregated",
        "state": "ready",
        "device": "GPU-511e2d3f",
        "weights": "16.0 GiB",
        "kv": "15.6/40.0 GiB",
        "other": "2.0 GiB",
        "rate": "1,221",
        "ttft": "42/300",
        "itl": "8.2/19",
        "queue": "22/2",
        "hit": "60%",
        "restarts": "0",
        "uptime": "1h04m",
        "pid": "5021",
    }


def test_router_and_frontend_say_what_they_can() -> None:
    processes = table(snapshots.busy(), PROCESSES)
    frontend, router = row(processes, "frontend"), row(processes, "router")
    assert (frontend["rate"], frontend["ttft"], frontend["itl"], frontend["queue"]) == (
        "9,894",
        "42/310",
        "8.4/19",
        "40",
    )
    assert (router["queue"], router["hit"], router["rate"], router["kv"]) == ("190", "61%", "-", "-")


def test_a_box_in_trouble() -> None:
    processes = table(snapshots.degraded(), PROCESSES)
    assert processes.note == "6 of 10 ready"
    assert row(processes, "llama.aggregated.2")["state"] == "starting loading weights 120 MiB of 513 MiB"
    assert row(processes, "llama.aggregated.5")["state"] == "draining 12 in flight"
    fatal = row(processes, "llama.aggregated.4")
    assert (fatal["state"], fatal["pid"], fatal["uptime"], fatal["restarts"]) == ("fatal", "-", "-", "5")
    assert "out of memory" in fatal["cause"]
    assert tone(processes, "llama.aggregated.4", "state") is Tone.BAD
    assert tone(processes, "llama.aggregated.4", "restarts") is Tone.WARN


def test_devices_host_and_disks_are_one_table() -> None:
    devices = table(snapshots.degraded(), DEVICES)
    throttled = row(devices, snapshots.busy().devices[1].id)
    assert throttled["used"] == "58.1/80.0 GiB"
    assert throttled["utilisation"] == "███████░  92%"
    assert (throttled["power"], throttled["temperature"]) == ("603/700 W", "62°C")
    assert throttled["throttled"] == "power cap"
    broken = snapshots.busy().devices[3].id
    assert row(devices, broken)["errors"] == "2 uncorrected ECC, XID 79: GPU has fallen off the bus"
    assert tone(devices, broken, "errors") is Tone.BAD
    assert tone(devices, broken, "temperature") is Tone.BAD
    assert row(devices, HOST)["used"] == "210 GiB/1.0 TiB"
    assert [row.cells[0].text for row in devices.rows][-3:] == ["host", "/models", "/scratch"]
    assert tone(devices, "disk /scratch", "used") is Tone.BAD


def test_what_a_box_does_not_have_is_not_there() -> None:
    tiny = snapshots.tiny()
    absent = {"ttft", "itl", "cause"}
    assert not absent & {column.key for column in table(tiny, PROCESSES).columns}
    assert [column.key for column in table(tiny, DEVICES).columns] == ["device", "name", "used", "box", "planned"]
    assert [row.key for row in table(tiny, DEVICES).rows] == [HOST], "cpu device and host are one memory"
    bare = VIEW.panels(snapshots.frame(snapshots.empty()), 80)
    assert [panel.key for panel in bare] == [PROCESSES], "nothing is known of devices: no panel for them"


@pytest.mark.parametrize("snapshot", [snapshots.busy(), snapshots.degraded()], ids=["busy", "degraded"])
def test_80_columns_show_what_matters_most(snapshot: BoxSnapshot) -> None:
    wanted = {"process", "state", "device", "rate", "ttft", "queue", "hit", "uptime"}
    assert wanted <= set(shown_at(table(snapshot, PROCESSES), 80))
    assert "process" in shown_at(table(snapshot, PROCESSES), 20)


def test_rows_keep_the_order_of_the_plan_and_are_known_by_name() -> None:
    names = [process.name for process in snapshots.busy().processes]
    assert [row.key for row in table(snapshots.busy(), PROCESSES).rows] == names


def test_the_detail_of_a_process_has_everything() -> None:
    frame = snapshots.frame(snapshots.degraded())
    worker = text(VIEW.detail(frame, PROCESSES, "llama.aggregated.7"))
    for said in (
        "5071",
        "5070",
        "GPU-56233244-9a8b",
        "13,000 used, 4,000 cached, 3,480 free, of 20,480",
        "25.4/40.0 GiB",
    ):
        assert said in worker
    for said in (
        "vllm",
        "0.11.0",
        "prompt tokens",
        "1,007,000",
        "errors",
        "47/300",
        "req-0031",
        "the lowest cost",
        "ready",
    ):
        assert said in worker
    lost = text(VIEW.detail(frame, PROCESSES, "llama.aggregated.3"))
    assert "illegal memory access" in lost
    assert "starting again in 2.0 s" in lost
    assert "guard" not in lost
    assert "indexed blocks" in text(VIEW.detail(frame, PROCESSES, "router"))
    assert "disconnected" in text(VIEW.detail(frame, PROCESSES, "frontend"))


def test_the_detail_of_a_worker_tells_the_last_minute_from_its_whole_life() -> None:
    first = snapshots.busy()
    second = snapshots.later(first, 10.0)
    history = History()
    history.feed(first)
    history.feed(second)
    detail = text(VIEW.detail(snapshots.frame(second, history), PROCESSES, "llama.aggregated.0"))
    assert "in the last minute  50%" in detail
    assert "hit rate            60%" in detail


def test_the_detail_of_a_device_has_all_figures_and_who_is_on_it() -> None:
    frame = snapshots.frame(snapshots.degraded())
    device = snapshots.degraded().devices[3].id
    detail = text(VIEW.detail(frame, DEVICES, device))
    for said in (device, "70.0 GiB", "10.0 GiB", "thermal", "power brake", "XID 79", "weights", "llama.aggregated.3"):
        assert said in detail
    unread = text(VIEW.detail(frame, DEVICES, snapshots.degraded().devices[4].id))
    assert "Nothing reads this device" in unread
    assert "92.0 GiB" in text(VIEW.detail(frame, DEVICES, HOST))
    assert "KV tier" in text(VIEW.detail(frame, DEVICES, "disk /scratch"))
    assert "smollm2.aggregated.0" in text(VIEW.detail(snapshots.frame(snapshots.tiny()), DEVICES, HOST))


def test_what_is_in_use_beyond_the_processes_is_unattributed() -> None:
    busy = snapshots.busy()
    figures = DeviceFigures(used_bytes=60 << 30, box_bytes=50 << 30, other_bytes=4 << 30)
    device = replace(busy.devices[0], figures=figures)
    detail = text(VIEW.detail(snapshots.frame(replace(busy, devices=(device,))), DEVICES, device.id))
    assert "unattributed     6.0 GiB" in detail


def test_a_row_that_is_gone_has_no_detail() -> None:
    frame = snapshots.frame(snapshots.busy())
    assert VIEW.detail(frame, PROCESSES, "nobody") is None
    assert VIEW.detail(frame, DEVICES, "nothing") is None
    assert VIEW.detail(frame, "another panel", "router") is None


def test_workers_that_sleep_or_wake_and_the_service_that_has_their_weights() -> None:
    processes = table(snapshots.shared(), PROCESSES)
    assert processes.note == "5 of 9 ready, 2 asleep"
    assert tone(processes, "coder.aggregated.0", "state") is Tone.ACCENT
    assert tone(processes, "guard.aggregated.0", "state") is Tone.WARN
    assert row(processes, "guard.aggregated.0")["state"] == "waking populate"
    assert row(processes, "gms@cpu")["weights"] == "1.3 GiB"


def test_the_detail_of_a_service_has_its_layouts_and_that_of_a_worker_what_it_maps() -> None:
    frame = snapshots.frame(snapshots.shared())
    service = text(VIEW.detail(frame, PROCESSES, "gms@cpu"))
    for said in ("1.3/2.0 GiB", "770 MiB/4.0 GiB", "257 MiB", "refused", "judge", "host→device", "aggregated.{0,1}"):
        assert said in service
    assert "read-only, out of gms@cpu" in text(VIEW.detail(frame, PROCESSES, "smollm2.aggregated.1"))
    assert "waited for, out of gms@cpu" in text(VIEW.detail(frame, PROCESSES, "guard.aggregated.0"))
    assert "Layouts" not in text(VIEW.detail(frame, PROCESSES, "coder.aggregated.0"))


@pytest.mark.parametrize("kind", snapshots.all_kinds())
def test_no_snapshot_breaks_it(kind: str) -> None:
    snapshot = snapshots.all_kinds()[kind]
    frame = snapshots.frame(snapshot)
    for panel in VIEW.panels(frame, 80):
        assert isinstance(panel, Table)
        for each in panel.rows:
            assert len(each.cells) == len(panel.columns)
            assert all(cell.text == one_line(cell.text) for cell in each.cells)
            detail = text(VIEW.detail(frame, panel.key, each.key))
            assert "\x1b" not in detail
            assert all(cell_len(line) <= 80 for line in detail.splitlines())


def test_a_worker_on_several_devices_is_on_each() -> None:
    busy = snapshots.busy(2)
    router, first, _, frontend = busy.processes
    ids = [device.id for device in busy.devices]
    snapshot = replace(busy, processes=(router, replace(first, device=",".join(ids)), frontend))
    assert row(table(snapshot, PROCESSES), first.name)["device"] == "GPU-4f1c2b3d, GPU-501d2c3e"
    for device in ids:
        assert first.name in text(VIEW.detail(snapshots.frame(snapshot), DEVICES, device))


def test_a_mock_worker_has_blocks_and_no_bytes() -> None:
    busy = snapshots.busy(1)
    router, worker, frontend = busy.processes
    mock = replace(worker, figures=WorkerFigures(kv_blocks_total=20480, kv_blocks_used=100))
    processes = table(replace(busy, processes=(router, mock, frontend)), PROCESSES)
    assert row(processes, worker.name)["kv"] == "100/20,480"
    assert "weights" not in {column.key for column in processes.columns}
