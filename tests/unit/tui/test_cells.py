"""One figure, one cell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import snapshots
from rich.cells import cell_len

from dynamo_box.protocol.figures import Quantiles, WorkerFigures
from dynamo_box.snapshot import DeviceInfo, ProcessInfo, Progress
from dynamo_box.tui.model import Cell, Column, Row, Span, Tone
from dynamo_box.tui.views import cells

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC0")
        time.tzset()
        yield
    time.tzset()


def worker(**given: Any) -> ProcessInfo:
    fields: dict[str, Any] = {
        "name": "w.0",
        "kind": "worker",
        "model": "m",
        "role": "aggregated",
        "state": "ready",
        "phase": "",
        "pid": 7,
        "restarts": 0,
        "device": "cpu",
        "rss_bytes": 900 * MIB,
    }
    return ProcessInfo(**{**fields, **given})


def test_what_cannot_be_read_is_absent_and_never_0() -> None:
    assert cells.count(None) is cells.ABSENT
    assert cells.rate(None) is cells.ABSENT
    assert cells.size(None) is cells.ABSENT
    assert cells.size_of(None, None) is cells.ABSENT
    assert cells.seconds(None) is cells.ABSENT
    assert cells.latency(None) is cells.ABSENT
    assert cells.latency(Quantiles()) is cells.ABSENT
    assert cells.percent(None) is cells.ABSENT
    assert cells.bar(None, 8) is cells.ABSENT
    assert cells.text(None) is cells.ABSENT
    assert cells.name("") is cells.ABSENT
    assert cells.pid(None) is cells.ABSENT
    assert cells.ABSENT.sort is None


def test_0_is_a_figure() -> None:
    assert cells.count(0) == Cell("0", Tone.PLAIN, 0)
    assert cells.rate(0.0).text == "0"
    assert cells.size(0).text == "0 B"
    assert cells.percent(0.0).text == "0%"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (cells.count(1_234_567), "1,234,567"),
        (cells.rate(1234.5), "1,234"),
        (cells.rate(9.96), "10"),
        (cells.rate(3.14), "3.1"),
        (cells.size(120 * MIB), "120 MiB"),
        (cells.size_of(12 * GIB, 40 * GIB), "12.0/40.0 GiB"),
        (cells.size_of(180 * MIB, 40 * GIB), "180 MiB/40.0 GiB"),
        (cells.size_of(5, 80), "5/80 B"),
        (cells.size_of(12 * GIB, None), "12.0 GiB"),
        (cells.size_of(None, 40 * GIB), "-/40.0 GiB"),
        (cells.seconds(192.4), "3m12s"),
        (cells.seconds(-0.2), "0s"),
        (cells.latency(Quantiles(0.012, 0.085)), "12/85"),
        (cells.latency(Quantiles(0.0084, 0.0192)), "8.4/19"),
        (cells.latency(Quantiles(None, 0.0192)), "-/19"),
        (cells.percent(0.004), "<1%"),
        (cells.percent(0.999), "99%"),
        (cells.percent(1.0), "100%"),
        (cells.bar(0.5, 8), "████░░░░  50%"),
        (cells.bar(1.7, 4), "████ 170%"),
        (cells.queue(12, 3), "12/3"),
        (cells.pid(12345), "12345"),
    ],
)
def test_figures_as_people_read_them(cell: Cell, text: str) -> None:
    assert cell.text == text


def test_who_waits_is_marked() -> None:
    assert cells.queue(12, 3).tone is Tone.WARN
    assert cells.queue(12, 0).tone is Tone.PLAIN


def test_figures_sort_by_value_and_not_by_text() -> None:
    sizes = [cells.size(value) for value in (900 * MIB, 2 * GIB, 5)]
    assert [cell.text for cell in sorted(sizes, key=lambda cell: cell.sort or 0)] == ["5 B", "900 MiB", "2.0 GiB"]


def test_names_sort_with_their_numbers_as_numbers() -> None:
    names = [cells.name(f"w.{number}") for number in (10, 9, 100, 1)]
    assert [cell.text for cell in sorted(names, key=lambda cell: str(cell.sort))] == ["w.1", "w.9", "w.10", "w.100"]


@pytest.mark.parametrize("foreign", [snapshots.MARKUP, snapshots.CONTROL, snapshots.EMOJI])
def test_foreign_text_is_one_line_without_power_over_the_terminal(foreign: str) -> None:
    for cell in (cells.text(foreign), cells.name(foreign), cells.state(foreign)):
        assert "\x1b" not in cell.text
        assert "\u202e" not in cell.text
        assert not {"\n", "\r", "\t"} & set(cell.text)
    assert cells.text(snapshots.MARKUP).text == snapshots.MARKUP, "markup is text like any other"


def test_wrapped_text_breaks_between_words_and_within_what_has_none() -> None:
    assert cells.wrapped("one two three", 8) == ["one two", "three"]
    assert cells.wrapped("one\n\ntwo", 8) == ["one", "", "two"]
    assert cells.wrapped("abcdefghijklm", 5) == ["abcde", "fghij", "klm"]
    wide = cells.wrapped("ラマモデル " * 10, 11)
    assert all(cell_len(line) <= 11 for line in wide)
    assert "".join(wide).replace(" ", "") == "ラマモデル" * 10


def test_a_clock_has_the_date_when_it_is_not_today(utc: None) -> None:
    now = 1_760_000_000.0
    assert cells.clock(now - 60, now).text == "08:52:20"
    assert cells.clock(now - 3 * 86400, now).text == "10-06 08:53:20"


def test_states_have_tones() -> None:
    assert cells.state("ready").tone is Tone.GOOD
    assert cells.state("starting").tone is Tone.WARN
    assert cells.state("fatal").tone is Tone.BAD
    assert cells.state("levitating").tone is Tone.PLAIN


def test_a_start_says_how_far_it_is() -> None:
    loading = worker(state="starting", phase="loading weights", progress=Progress(120 * MIB, 513 * MIB, "bytes"))
    assert cells.state_and_phase(loading).text == "starting loading weights 120 MiB of 513 MiB"
    assert cells.state_and_phase(worker(state="starting", phase="importing")).text == "starting importing"
    assert cells.state_and_phase(worker()).text == "ready"


def test_a_long_device_id_is_cut_to_what_tells_it_from_the_others() -> None:
    first, second = "GPU-4f1c2b3d-9a8b-0001", "GPU-4f1c2b3d-9a8b-0002"
    devices = [DeviceInfo(each, "H100", "cuda", None) for each in (first, second, "GPU-7777777777777", "cpu")]
    names = cells.device_names(devices)
    assert names["cpu"] == "cpu"
    assert names["GPU-7777777777777"] == "GPU-77777777"
    assert names[first] == first
    assert cells.device_label("GPU-7777777777777,cpu", names).text == "GPU-77777777, cpu"
    assert cells.device_label("GPU-of-another-plan", names).text == "GPU-of-another-plan"
    assert cells.device_label(None, names) is cells.ABSENT


def test_the_kv_pool_is_in_bytes_where_they_are_known() -> None:
    assert cells.kv_pool(WorkerFigures(kv_blocks_total=100, kv_blocks_used=25, kv_bytes=4 * GIB)).text == "1.0/4.0 GiB"
    assert cells.kv_pool(WorkerFigures(kv_blocks_total=2000, kv_blocks_used=25)).text == "25/2,000"
    assert cells.kv_pool(WorkerFigures(kv_bytes=4 * GIB)).text == "-/4.0 GiB"
    assert cells.kv_pool(WorkerFigures()) is cells.ABSENT


def test_other_memory_is_what_is_left_of_the_resident_where_weights_are_part_of_it() -> None:
    figures = WorkerFigures(weights_bytes=500 * MIB, kv_bytes=100 * MIB)
    assert cells.other_bytes(worker(figures=figures)) == 300 * MIB
    assert cells.other_bytes(worker(figures=figures, device="GPU-0")) == 900 * MIB
    assert cells.other_bytes(worker(figures=WorkerFigures(weights_bytes=2 * GIB, kv_bytes=0))) is None
    assert cells.other_bytes(worker(figures=WorkerFigures(kv_bytes=0))) is None
    assert cells.other_bytes(worker(rss_bytes=None)) is None


def test_a_rate_of_bytes_has_its_unit_and_one_of_nothing_is_dim() -> None:
    assert cells.byte_rate(120.4 * MIB, Tone.HOST) == Cell("120 MiB/s", Tone.HOST, 120.4 * MIB)
    assert cells.byte_rate(0.0, Tone.HOST) == Cell("0 B/s", Tone.DIM, 0.0)
    assert cells.byte_rate(None) is cells.byte_rate(float("nan")) is cells.ABSENT


def test_a_table_has_no_column_without_anything_in_it() -> None:
    columns = [Column(key, key) for key in ("name", "power", "errors")]
    rows = [
        Row("a", (Cell("a"), Cell("7 W"), cells.ABSENT)),
        Row("b", (Cell("b"), cells.ABSENT, Cell(""))),
    ]
    table = cells.table("t", "T", columns, rows)
    assert [column.key for column in table.columns] == ["name", "power"]
    assert table.rows[1] == Row("b", (Cell("b"), cells.ABSENT))
    assert len(cells.table("t", "T", columns, [], empty="none").columns) == 3


def test_facts_have_labels_in_a_column_and_absent_ones_no_line() -> None:
    lines = cells.facts([("pid", Cell("7")), ("guard", cells.ABSENT), ("restarts", Cell("0", Tone.GOOD))])
    assert lines == [
        (Span("pid       ", Tone.DIM), Span("7")),
        (Span("restarts  ", Tone.DIM), Span("0", Tone.GOOD)),
    ]


def test_a_section_without_lines_is_not_there() -> None:
    assert cells.section("Events", []) == []
    assert cells.section("Events", [()]) == [(), (Span("Events", Tone.TITLE),), ()]
