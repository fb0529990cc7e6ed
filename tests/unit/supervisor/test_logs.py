"""Lines: cut, wrapped, rotated; whatever the bytes are."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.supervisor.logs import LineSplitter, ProcessLog, RotatingFile, readable, structured

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


def split(pieces: list[bytes], max_line: int = 16) -> list[bytes]:
    splitter = LineSplitter(max_line)
    return [line for piece in pieces for line in splitter.feed(piece)] + list(splitter.finish())


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8))
def test_lines_do_not_depend_on_how_the_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    lines = split(pieces)
    expected = [line[:16] for line in data.split(b"\n")]
    assert lines == (expected if expected[-1] else expected[:-1])


def test_a_line_without_end_costs_no_memory() -> None:
    splitter = LineSplitter(max_line=100)
    lines = [line for _ in range(1000) for line in splitter.feed(b"x" * 1000)]
    assert lines == [b"x" * 100]
    assert list(splitter.feed(b"\nnext\n")) == [b"next"]


@given(st.binary(max_size=200).filter(lambda raw: b"\n" not in raw))
def test_any_bytes_become_one_json_object_on_one_line(raw: bytes) -> None:
    line = structured("worker", raw, NOW)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert {"ts", "event"} <= set(json.loads(line))


def test_raw_lines_are_wrapped() -> None:
    assert json.loads(structured("worker", b"caf\xe9\r", NOW)) == {
        "ts": "2026-01-02T03:04:05.000000Z",
        "level": "info",
        "process": "worker",
        "event": "caf\ufffd",
    }


def test_structured_lines_pass_through_unchanged() -> None:
    raw = b'{"ts": "2026-01-01T00:00:00Z", "event": "loaded", "bytes": 5}'
    assert structured("worker", raw, NOW) == raw + b"\n"
    other = b'{"event": "no time"}'
    assert json.loads(structured("worker", other, NOW))["event"] == other.decode()


def test_people_read_events_with_their_fields_and_tracebacks() -> None:
    line = b'{"ts": "t", "level": "error", "process": "w", "event": "broke", "model": "m", "exception": "A\\n  B"}'
    assert readable(line) == ["[error] broke model=m", "A", "  B"]


def test_files_are_rotated_by_size_and_the_oldest_goes(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "w.log", limit=100, files=3)
    for number in range(100):
        file.write(f"{number:09d}\n".encode())
    file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["w.log", "w.log.1", "w.log.2"]
    text = "".join((tmp_path / name).read_text() for name in reversed(names))
    assert text.split() == [f"{number:09d}" for number in range(70, 100)]


def test_a_full_disk_is_counted_and_survived() -> None:
    file = RotatingFile(Path("/dev/full"))
    file.write(b"one\ntwo\n")
    assert file.lost == 2
    file.close()


def test_the_last_lines_are_those_of_the_present_life(tmp_path: Path) -> None:
    log = ProcessLog("w", RotatingFile(tmp_path / "w.log"))
    log.add([b"old", b""])
    log.forget_recent()
    log.add([f"line {number}".encode() for number in range(300)])
    assert log.last(2) == ("line 298", "line 299")
    assert len(log.last(1000)) == 200
    log.close()
