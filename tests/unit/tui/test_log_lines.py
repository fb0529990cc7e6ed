"""The lines of the logs screen: bounded, filtered a slice at a time, and held where a person has scrolled to."""

from __future__ import annotations

import pytest

from dynamo_box.control.logs import LEVELS, Entry
from dynamo_box.tui.filter import Filter
from dynamo_box.tui.log_feed import LogBatch
from dynamo_box.tui.log_lines import BLOCK_LINES, MAX_TEXT, LogStore, Selection, Wanted
from dynamo_box.tui.log_pane import LogPane
from dynamo_box.tui.text import Mark, spans_width

LEVEL_OF = ("debug", "info", "warning", "error")


def entry(number: int) -> Entry:
    process = f"w.{number % 3}"
    fields: dict[str, object] = {"event": f"line {number}", "process": process, "n": number}
    return Entry(1_700_000_000.0 + number, process, LEVEL_OF[number % 4], fields)


def entries(start: int, end: int) -> tuple[Entry, ...]:
    return tuple(entry(number) for number in range(start, end))


def filled(lines: int, **bounds: int) -> LogStore:
    store = LogStore(**bounds)
    store.append(entries(0, lines))
    return store


def text_of(pane: LogPane, width: int = 120, height: int = 11) -> list[str]:
    return ["".join(span.text for span in line.spans).rstrip() for line in pane.lines(width, height)]


def pane_of(lines: int) -> LogPane:
    pane = LogPane()
    pane.take(LogBatch(entries(0, lines), anew=True))
    pane.lines(120, 11)
    return pane


# The store


def test_lines_and_their_fields_are_there() -> None:
    store = filled(3 * BLOCK_LINES + 7)
    for number in (0, BLOCK_LINES - 1, BLOCK_LINES, 3 * BLOCK_LINES + 6):
        line = store.line(number)
        assert (line.text, line.process) == (f"line {number}  n={number}", f"w.{number % 3}")
        assert line.level == LEVELS[LEVEL_OF[number % 4]]
        assert store.fields(number) == entry(number).fields
    assert store.processes == ("w.0", "w.1", "w.2")


def test_it_is_bounded_by_lines_and_says_what_it_dropped() -> None:
    store = filled(10_000, max_lines=2000)
    assert 2000 - BLOCK_LINES <= len(store) <= 2000
    assert store.dropped == store.first == 10_000 - len(store)
    assert store.line(store.first).text.startswith(f"line {store.first} ")
    assert store.fields(9_999) == entry(9_999).fields


def test_it_is_bounded_by_bytes() -> None:
    store = LogStore(max_bytes=1_000_000)
    for number in range(5000):
        store.append([Entry(0.0, "w", "info", {"event": f"{number} " + "x" * 3000})])
    assert store.bytes_held <= 1_000_000
    assert store.dropped + len(store) == 5000


def test_a_huge_line_is_clipped_on_the_screen_and_whole_in_its_entry() -> None:
    store = LogStore()
    store.append([Entry(0.0, "w", "info", {"event": "x" * 200_000})])
    assert len(store.line(0).text) == MAX_TEXT
    assert store.fields(0) == {"event": "x" * 200_000}


def test_what_a_model_wrote_has_no_power_over_the_terminal() -> None:
    store = LogStore()
    store.append([Entry(0.0, "w", "info", {"event": "a\x1b[2J\nb\tc[red]d", "😀": "é"})])
    text = store.line(0).text
    assert text.startswith("a\\x1b[2J\\nb ")
    assert text.endswith(" c[red]d  😀=é")
    assert not {"\x1b", "\n", "\t"} & set(text)


def test_cleared_it_goes_on_with_new_numbers() -> None:
    store = filled(700)
    store.clear()
    assert len(store) == 0
    store.append(entries(0, 10))
    assert (store.first, store.end, len(store)) == (700, 710, 10)
    assert store.line(700).text.startswith("line 0 ")


# The selection


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (Wanted(), lambda n: True),
        (Wanted(level=LEVELS["warning"]), lambda n: n % 4 >= 2),
        (Wanted(process="w.1"), lambda n: n % 3 == 1),
        (Wanted(matches=Filter.parse(r"line \d*7 ").matches), lambda n: n % 10 == 7),
        (Wanted(matches=Filter.parse("!w.1").matches), lambda n: n % 3 != 1),
        (Wanted(matches=Filter.parse("^error ").matches), lambda n: n % 4 == 3),
        (Wanted(LEVELS["error"], "w.0", Filter.parse("3").matches), lambda n: n % 12 == 3 and "3" in str(n)),
    ],
)
def test_what_is_selected(wanted: Wanted, passes: object) -> None:
    assert callable(passes)
    store = filled(2000)
    selection = Selection(store, wanted)
    while not selection.complete:
        selection.advance(300)
    store.append(entries(2000, 2600))
    selection.advance(0)
    assert selection.complete
    assert [selection[at] for at in range(len(selection))] == [n for n in range(2600) if passes(n)]


def test_the_newest_are_looked_at_first_and_a_slice_at_a_time() -> None:
    store = filled(10_000)
    selection = Selection(store, Wanted(process="w.0"))
    selection.advance(900)
    assert [selection[at] for at in range(len(selection))] == list(range(9102, 10_000, 3))
    assert not selection.complete
    store.append(entries(10_000, 10_003))
    selection.advance(900)
    assert (selection[0], selection[len(selection) - 1]) == (8202, 10_002)


def test_positions_are_found_by_number_and_dropped_lines_go() -> None:
    store = filled(5000, max_lines=5000)
    selection = Selection(store, Wanted(process="w.0"))
    while not selection.complete:
        selection.advance()
    assert selection[selection.position_of(301)] == 303
    assert selection.position_of(10**9) == len(selection)
    for start in range(5000, 30_000, 700):
        store.append(entries(start, start + 700))
        selection.advance()
        expected = [n for n in range(store.first, store.end) if n % 3 == 0]
        assert [selection[at] for at in range(len(selection))] == expected


def test_a_selection_whose_store_was_dropped_under_it_while_it_looked() -> None:
    store = filled(4000, max_lines=4000)
    selection = Selection(store, Wanted(process="w.0"))
    selection.advance(100)
    store.append(entries(4000, 12_000))
    while not selection.complete:
        selection.advance(100)
    assert [selection[at] for at in range(len(selection))] == [n for n in range(store.first, store.end) if n % 3 == 0]


# The pane


def test_it_follows_the_newest_line() -> None:
    pane = pane_of(100)
    assert text_of(pane)[-1].endswith("line 99  n=99")
    pane.take(LogBatch(entries(100, 130)))
    shown = text_of(pane)
    assert shown[-1].endswith("line 129  n=129")
    assert "following" in shown[0]


def test_scrolled_back_it_stays_where_it_is() -> None:
    pane = pane_of(100)
    pane.scroll(-20)
    before = text_of(pane)[1:]
    assert before[-1].endswith("line 79  n=79")
    pane.take(LogBatch(entries(100, 400)))
    assert text_of(pane)[1:] == before
    assert "held" in text_of(pane)[0]
    pane.follow()
    assert text_of(pane)[-1].endswith("line 399  n=399")


def test_start_end_and_the_cursor() -> None:
    pane = pane_of(100)
    pane.move(-(10**6))
    assert text_of(pane)[1].endswith("line 0  n=0")
    pane.move(3)
    assert pane.current == 3
    assert [line.mark for line in pane.lines(120, 11)].index(Mark.CURSOR) == 4
    pane.move(-1_000_000)
    assert pane.current == 0
    pane.move(1_000_000)
    assert pane.following
    pane.scroll(-1_000_000)
    assert text_of(pane)[1].endswith("line 0  n=0")
    pane.scroll(1_000_000)
    assert pane.following


def test_the_place_is_kept_while_a_filter_works_its_way_back() -> None:
    pane = LogPane()
    pane.take(LogBatch(entries(0, 30_000)))
    pane.lines(120, 11)
    pane.move(-(10**6))
    pane.move(3000)
    pane.set_process("w.0")
    steps = 0
    while not pane.complete:
        assert len(text_of(pane)) == 11
        pane.advance()
        steps += 1
    assert steps > 1
    assert pane.current == 3000


def test_a_place_that_is_dropped_becomes_the_oldest_line() -> None:
    pane = LogPane(LogStore(max_lines=2000))
    pane.take(LogBatch(entries(0, 1000)))
    pane.lines(120, 11)
    pane.move(-(10**6))
    pane.take(LogBatch(entries(1000, 9000)))
    shown = text_of(pane)
    assert shown[1].endswith(f"line {pane.store.first}  n={pane.store.first}")
    assert "older dropped" in shown[0]


def test_level_and_process_go_round() -> None:
    pane = pane_of(40)
    seen = []
    for _ in range(4):
        pane.next_level()
        seen.append((pane.level, text_of(pane)[0]))
    assert [level for level, _ in seen] == ["info", "warning", "error", "debug"]
    assert "warning and above" in seen[1][1]
    assert "20 of 40 lines" in seen[1][1]
    processes = []
    for _ in range(4):
        pane.next_process()
        processes.append(pane.wanted.process)
    assert processes == ["w.0", "w.1", "w.2", None]
    pane.move(-1)
    pane.only_this_process()
    assert pane.wanted.process == entry(38).process
    pane.only_this_process()
    assert pane.wanted.process is None


def test_nothing_to_show_says_why() -> None:
    pane = LogPane()
    assert "looking" in text_of(pane)[1]
    pane.take(LogBatch((), anew=True))
    assert "nothing has been logged" in text_of(pane)[1]
    pane.take(LogBatch(entries(0, 20)))
    pane.set_filter(Filter.parse("no such text"))
    assert "no line passes" in text_of(pane)[1]
    assert pane.detail(80) is None
    for act in (pane.follow, pane.hold, pane.only_this_process, lambda: pane.move(-1)):
        act()
    pane.scroll(-3)
    assert not pane.click(3)


def test_a_filter_that_takes_too_long_is_given_up() -> None:
    pane = LogPane()
    pane.take(LogBatch((replace_event(entry(0), "a line of thirty words " * 10),)))
    pane.set_filter(Filter.parse(r"(\w+\s*)+$x"))
    assert pane.complete
    assert "takes too long" in text_of(pane)[1]
    pane.take(LogBatch(entries(1, 3)))
    pane.set_filter(Filter.parse("line 2"))
    assert "line 2" in text_of(pane)[1]


def test_starting_anew_forgets_what_was_there() -> None:
    pane = pane_of(100)
    pane.set_process("w.1")
    pane.scroll(-10)
    pane.take(LogBatch(entries(500, 510), anew=True))
    assert len(pane.store) == 10
    assert text_of(pane)[-1] == ""
    assert [line for line in text_of(pane)[1:] if line][-1].endswith("line 508  n=508")


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 50])
def test_any_size_gets_as_many_lines_as_it_has_and_none_too_long(width: int, height: int) -> None:
    pane = LogPane()
    wide = replace_event(entry(3), "漢字" * 100)
    pane.take(LogBatch((*entries(0, 30), wide)))
    lines = pane.lines(width, height)
    assert len(lines) == height
    assert all(spans_width(line.spans) <= width for line in lines)


def replace_event(old: Entry, event: str) -> Entry:
    return Entry(old.at, old.process, old.level, {**old.fields, "event": event})


def test_the_whole_entry() -> None:
    pane = LogPane()
    trace = "Traceback (most recent call last):\n  File 'x', line 1\nValueError: \x1b[31mno"
    fields: dict[str, object] = {"event": "broke", "request_id": "r-1", "long": "y" * 150, "exception": trace}
    pane.take(LogBatch((Entry(1.0, "router", "error", fields),)))
    page = pane.detail(60)
    assert page is not None
    text = ["".join(span.text for span in line) for line in page.lines]
    assert page.title == "router  error"
    assert "event       broke" in text
    assert sum(line.count("y") for line in text) == 150
    assert "  File 'x', line 1" in text
    assert text[-1] == "ValueError: \\x1b[31mno"
    assert all(spans_width(line) <= 60 for line in page.lines)


def test_a_time_that_is_none() -> None:
    pane = LogPane()
    for at in (float("nan"), float("inf"), -1.0, 1e300):
        pane.take(LogBatch((replace_at(entry(0), at),)))
    assert all(line.startswith("--:--") for line in text_of(pane)[1:5])


def replace_at(old: Entry, at: float) -> Entry:
    return Entry(at, old.process, old.level, old.fields)
