"""New lines of log files that are being rotated just then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_box.control.logs import Follower, since, tail


def add(path: Path, second: int) -> None:
    line = {"ts": f"2026-01-01T00:00:{second:02}Z", "level": "info", "process": "router", "event": f"at {second}"}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


class Rotating:
    """Three files are kept; `path` is rotated in the moment before the opening with the given number, and only then."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._left: int | None = None
        really_open = Path.open

        def rotate_and_open(opened: Path, *arguments: Any) -> Any:
            if self._left == 0:
                for older, newer in ((".log.2", ".log.1"), (".log.1", ".log")):
                    self.path.with_suffix(newer).replace(self.path.with_suffix(older))
                add(self.path, 4)
            if self._left is not None:
                self._left -= 1
            return really_open(opened, *arguments)

        monkeypatch.setattr(Path, "open", rotate_and_open)

    def before_opening(self, number: int) -> None:
        self._left = number


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rotating:
    add(tmp_path / "router.log.1", 1)
    add(tmp_path / "router.log", 2)
    return Rotating(tmp_path / "router.log", monkeypatch)


@pytest.mark.parametrize("opening", [0, 1])
def test_a_rotation_while_the_files_are_opened_loses_nothing(files: Rotating, opening: int) -> None:
    follower = Follower(files.path.parent, None)
    add(files.path, 3)
    files.before_opening(opening)
    found = [entry.fields["event"] for _ in range(2) for entry in follower.read()]
    assert found == ["at 3", "at 4"]


@pytest.mark.parametrize("opening", [0, 1])
def test_nor_does_it_for_who_reads_them_all(files: Rotating, opening: int) -> None:
    files.before_opening(opening)
    found = [entry.fields["event"] for entry in since(files.path.parent, ["router"], 0.0, lambda _: True)]
    assert found == ["at 1", "at 2", "at 4"]


def test_what_comes_after_the_mark_is_the_followers_alone(files: Rotating) -> None:
    directory = files.path.parent
    follower = Follower(directory, None)
    add(files.path, 3)
    for rotated in (False, True):
        if rotated:
            files.path.with_suffix(".log.1").unlink()
            files.path.replace(files.path.with_suffix(".log.1"))
            add(files.path, 4)
        kept = ["at 2"] if rotated else ["at 1", "at 2"]
        last = tail(directory, follower.marks, 10, lambda _: True, until=follower.marks)
        everything = since(directory, follower.marks, 0.0, lambda _: True, until=follower.marks)
        assert [entry.fields["event"] for entry in last] == kept
        assert [entry.fields["event"] for entry in everything] == kept
    assert [entry.fields["event"] for entry in follower.read()] == ["at 3", "at 4"]


def test_who_begins_while_no_file_is_current_sees_what_comes(files: Rotating) -> None:
    files.path.replace(files.path.with_suffix(".log.1"))
    follower = Follower(files.path.parent, ["router"])
    add(files.path, 3)
    assert [entry.fields["event"] for entry in follower.read()] == ["at 3"]
