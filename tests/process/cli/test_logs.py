"""`dynbox logs` over real files, while they grow and rotate."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_box.paths import home, logs_dir, run_dir

Dynbox = Callable[..., subprocess.CompletedProcess[str]]
DEADLINE_S = 90


class LogFiles:
    """Writes what a supervisor would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)

    def add(self, process: str, *seconds: float, level: str = "info", suffix: str = "", **fields: Any) -> None:
        """One line a second given, counted from an hour ago."""
        with (self.directory / f"{process}.log{suffix}").open("a") as file:
            for second in seconds:
                line = {"ts": stamp(second), "level": level, "process": process, "event": f"at {second:g}", **fields}
                file.write(json.dumps(line) + "\n")

    def rotate(self, process: str) -> None:
        current = self.directory / f"{process}.log"
        first = self.directory / f"{process}.log.1"
        if first.exists():
            first.replace(self.directory / f"{process}.log.2")
        current.replace(first)


_base = 0.0


def stamp(second: float) -> str:
    at = _base + second
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06}Z"


@pytest.fixture
def files(box_env: Any) -> LogFiles:
    """An hour ago is counted from each test's own start: the suite may have been running for long by then."""
    global _base
    _base = time.time() - 3600
    return LogFiles(logs_dir(run_dir(), home()))


def events(text: str) -> list[str]:
    return [json.loads(line)["event"] for line in text.splitlines()]


def test_lines_are_merged_by_time_across_processes_and_rotated_files(files: LogFiles, dynbox: Dynbox) -> None:
    files.add("router", 1, 4, suffix=".2")
    files.add("router", 6, suffix=".1")
    files.add("router", 8)
    files.add("frontend", 2, 3, 7)
    assert events(dynbox("logs", "--json").stdout) == [f"at {n}" for n in (1, 2, 3, 4, 6, 7, 8)]
    assert events(dynbox("logs", "-n", "3", "--json").stdout) == ["at 6", "at 7", "at 8"]
    assert events(dynbox("logs", "frontend", "--json").stdout) == ["at 2", "at 3", "at 7"]
    assert events(dynbox("logs", "--since", "1d", "--json").stdout) == [f"at {n}" for n in (1, 2, 3, 4, 6, 7, 8)]


def test_a_line_dated_late_by_the_supervisor_is_put_in_its_place(files: LogFiles, dynbox: Dynbox) -> None:
    files.add("router", 5, 3, 4)
    for arguments in ((), ("--since", "1d")):
        assert events(dynbox("logs", "--json", *arguments).stdout) == ["at 3", "at 4", "at 5"]


def test_since_takes_spans_and_iso_times(files: LogFiles, dynbox: Dynbox) -> None:
    files.add("router", 0, 1800, 3500)
    assert events(dynbox("logs", "--since", "45m", "--json").stdout) == ["at 1800", "at 3500"]
    assert events(dynbox("logs", "--since", stamp(3000), "--json").stdout) == ["at 3500"]
    assert events(dynbox("logs", "--since", "45m", "-n", "1", "--json").stdout) == ["at 3500"]
    assert "10m" in dynbox("logs", "--since", "yesterday", code=2).stderr


def test_a_level_leaves_out_what_is_below_it(files: LogFiles, dynbox: Dynbox) -> None:
    files.add("router", *range(300))
    files.add("router", 300, level="warning")
    files.add("router", 301, level="error")
    files.add("router", *range(302, 600))
    assert events(dynbox("logs", "--level", "warning", "--json").stdout) == ["at 300", "at 301"]
    assert events(dynbox("logs", "--level", "error", "-n", "1", "--json").stdout) == ["at 301"]


def test_lines_for_people_show_fields_and_no_control_characters(files: LogFiles, dynbox: Dynbox) -> None:
    files.add("router", 1, level="error", request_id="r-1", text="a \x1b[2J\nb", exception="Trace\n  boom")
    text = dynbox("logs").stdout
    assert "error   router  at 1  request_id=r-1" in text
    assert "\x1b" not in text
    assert text.endswith("Trace\n  boom\n")


def test_bare_text_keeps_its_place(files: LogFiles, dynbox: Dynbox) -> None:
    files.add("supervisor", 1)
    with (files.directory / "supervisor.log").open("ab") as file:
        file.write(b"Fatal Python error: \xff\n{broken json\n")
    files.add("supervisor", 3)
    files.add("router", 2)
    for arguments in ((), ("--since", "1d")):
        found = events(dynbox("logs", "--json", *arguments).stdout)
        assert found == ["at 1", "Fatal Python error: \ufffd", "{broken json", "at 2", "at 3"]


def test_without_logs_or_with_a_wrong_name_it_says_so(files: LogFiles, dynbox: Dynbox) -> None:
    assert "no box has logged" in dynbox("logs", code=3).stderr
    files.add("router", 1)
    assert "did you mean router" in dynbox("logs", "roter", code=3).stderr


def test_wrong_arguments_are_wrong_before_any_box_has_logged(dynbox: Dynbox, box_env: Any) -> None:
    assert "--since 'yesterday'" in dynbox("logs", "--since", "yesterday", code=2).stderr
    assert "--level 'x'" in dynbox("logs", "--level", "x", code=2).stderr
    assert "dynbox up" in dynbox("logs", code=3).stderr
    assert "there are no processes that have logged yet" in dynbox("logs", "nope", code=3).stderr


def test_a_large_log_is_read_from_its_end(files: LogFiles, dynbox: Dynbox) -> None:
    with (files.directory / "router.log").open("w") as file:
        filler = "x" * 200
        file.writelines(
            json.dumps({"ts": stamp(n / 100), "level": "info", "process": "router", "event": f"{n}", "f": filler})
            + "\n"
            for n in range(100_000)
        )
    assert events(dynbox("logs", "-n", "2", "--json").stdout) == ["99998", "99999"]


class Following:
    """A `dynbox logs -f` at work."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._buffer = b""

    def next_event(self) -> str:
        assert self._process.stdout is not None
        end = time.monotonic() + DEADLINE_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], end - time.monotonic())
            assert ready, "no line came"
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, "it ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return str(json.loads(line)["event"])


@pytest.fixture
def following(files: LogFiles) -> Iterator[Following]:
    files.add("router", 1)
    command = [sys.executable, "-m", "dynamo_box", "logs", "-f", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        yield Following(process)
        process.terminate()


def test_following_survives_rotations_and_finds_new_processes(files: LogFiles, following: Following) -> None:
    assert following.next_event() == "at 1"
    files.add("router", 2)
    assert following.next_event() == "at 2"
    files.add("router", 3)
    files.rotate("router")
    files.add("router", 4)
    files.rotate("router")
    files.add("router", 5)
    assert [following.next_event() for _ in range(3)] == ["at 3", "at 4", "at 5"]
    files.add("worker", 6)
    assert following.next_event() == "at 6"


def test_following_waits_for_the_rest_of_a_line(files: LogFiles, following: Following) -> None:
    assert following.next_event() == "at 1"
    line = json.dumps({"ts": stamp(2), "level": "info", "process": "router", "event": "whole"}) + "\n"
    with (files.directory / "router.log").open("a") as file:
        file.write(line[:20])
        file.flush()
        files.add("other", 2)
        assert following.next_event() == "at 2"
        file.write(line[20:])
    assert following.next_event() == "whole"
