"""The terminal's end."""

from __future__ import annotations

import os

from dynamo_box.tui.driver import LastingTerminal


def test_a_terminal_that_is_gone_is_reported_once_and_swallows_the_rest() -> None:
    read, write = os.pipe()
    reports: list[str] = []
    with os.fdopen(write, "w", buffering=1) as file:
        terminal = LastingTerminal(file, lambda: reports.append("gone"))
        terminal.write("hello\n")
        assert os.read(read, 100) == b"hello\n"
        assert not reports
        os.close(read)
        for _ in range(100):
            terminal.write("is anybody there?\n")
            terminal.flush()
        assert reports == ["gone"]
        assert terminal.fileno() == write
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), write)  # what the file holds back goes somewhere
