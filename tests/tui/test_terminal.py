"""`dynbox top` in a real terminal, before a live box: what is typed, what is seen, and what it does to the box."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from box_under_test import eventually
from mock_box import MockBox
from terminal import DEADLINE_S, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

WORKER = "tiny.aggregated.0"


def environment(box: MockBox) -> dict[str, str]:
    return {name: value for name, value in box.env.items() if name != "NO_COLOR"}


def open_top(box: MockBox, *options: str, columns: int = 120, rows: int = 40) -> Terminal:
    return Terminal(box.command("top", *options), environment(box), columns=columns, rows=rows)


def figures(box: MockBox, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each["figures"] for each in box.ps()["processes"] if each["kind"] == kind)
    return found


def filter_by(top: Terminal, text: str) -> None:
    top.press("/")
    top.wait_for("^a regular expression")
    top.type(text)
    top.wait_for(rf"^{re.escape(text)}$")


def select_worker(top: Terminal) -> None:
    """Leave one row on the fleet screen: the cursor is on it."""
    top.wait_for(rf"^{WORKER} .*ready")
    filter_by(top, WORKER)
    top.wait_without("^router ")
    top.press("Enter")


def stream(box: MockBox, request_id: str) -> str:
    """A long answer; returns how it ended: the last event of the stream."""
    body = {"model": "tiny", "prompt": "once upon a time", "max_tokens": 500, "stream": True}
    done = subprocess.run(
        ["curl", "-sN", f"http://127.0.0.1:{box.port}/v1/completions", "-H", "Content-Type: application/json",
         "-H", f"x-request-id: {request_id}", "-d", json.dumps(body)],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


def test_the_screens_show_the_box_and_a_filter_thins_them(running: MockBox) -> None:
    with open_top(running) as top:
        top.wait_for(rf"ready +tiny +http://127\.0\.0\.1:{running.port}")
        top.wait_for(r"^router .*ready")
        top.wait_for(rf"^{WORKER} .*ready")
        top.wait_for(r"^ 1 fleet  2 routing  3 memory  4 requests  5 models  6 logs  7 events$")
        assert "\x1b[" in top.screen(styles=True)
        filter_by(top, "!aggregated")
        top.wait_without(rf"^{WORKER}")
        top.wait_for("^frontend ")
        top.press("Escape")
        top.wait_for(rf"^{WORKER} .*ready")
        for key, seen in (
            ("2", r"^Traffic"),
            ("3", r"^Memory"),
            ("4", r"No request is running"),
            ("5", r"^tiny +"),
            ("6", r"\d\d:\d\d:\d\d.* supervisor"),
            ("7", r"box ready"),
            ("1", r"^router .*ready"),
        ):
            top.press(key)
            top.wait_for(seen)
        top.press("?")
        top.wait_for("help: fleet")
        top.press("Escape")
        top.wait_without("help: fleet")
        top.press("q")
        assert top.wait_ended() == 0


def test_what_is_typed_at_once_after_the_slash_is_the_filter(running: MockBox) -> None:
    """And never an act, or another screen: a person who types fast must not restart anything."""
    with open_top(running) as top:
        top.wait_for(rf"^{WORKER} .*ready")
        top.type(f"/{WORKER}|3rd")
        top.wait_for(rf"^{re.escape(WORKER)}\|3rd$")
        top.wait_without("^router ")
        top.wait_for("^Processes")


def test_restarting_a_worker_asks_first_and_happens_in_the_box(running: MockBox) -> None:
    before = running.process(WORKER)
    with open_top(running) as top:
        select_worker(top)
        top.press("r")
        top.wait_for(rf"(?i)restart.*{WORKER}")
        top.press("Escape")
        top.wait_without("esc leaves")
        assert running.process(WORKER)["pid"] == before["pid"]
        top.press("r")
        top.wait_for("esc leaves")
        top.press("y")
        top.wait_for(rf"restart {WORKER}: (?!under way)")
        after = running.process(WORKER)
        assert after["pid"] != before["pid"]
        assert after["state"] == "ready"
        top.wait_for(rf"^{WORKER} .*ready")


def test_cancelling_a_request_ends_the_clients_stream(running: MockBox) -> None:
    with ThreadPoolExecutor(1) as pool, open_top(running, "--screen", "requests") as top:
        ending: Future[str] = pool.submit(stream, running, "a-long-story")
        top.wait_for(r"^a-long-story .*decode")
        top.press("x")
        top.wait_for(r"(?i)cancel.*a-long-story")
        top.press("y")
        last = ending.result(timeout=DEADLINE_S)
        assert "cancel" in last
        assert "[DONE]" not in last
        top.wait_for("No request is running")
    assert figures(running, "frontend")["active"] == 0


def test_the_routers_mode_is_chosen_from_a_list(running: MockBox) -> None:
    assert figures(running, "router")["mode"] == "kv"
    with open_top(running, "--screen", "routing") as top:
        top.wait_for(r"mode kv")
        top.press("m")
        top.wait_for(r"round-robin")
        top.press("2")
        top.wait_for(r"mode round-robin")
    eventually(lambda: figures(running, "router")["mode"] == "round-robin", "the router's figures say so too")


def test_readonly_refuses_to_act(running: MockBox) -> None:
    before = running.process(WORKER)
    with open_top(running, "--readonly") as top:
        top.wait_for("READ.?ONLY")
        select_worker(top)
        assert "r restart" not in top.screen()
        top.press("r")
        top.press("7")
        top.wait_for("box ready")
        assert "esc leaves" not in top.screen()
    assert running.process(WORKER)["pid"] == before["pid"]


def test_every_size_is_survived(running: MockBox) -> None:
    with open_top(running) as top:
        top.wait_for(r"^router .*ready")
        top.resize(20, 5)
        top.wait_for("too small")
        top.press("2")
        top.resize(1, 1)
        top.resize(300, 80)
        top.wait_for(r"^Traffic")
        top.resize(80, 24)
        top.press("1")
        top.wait_for(r"^router .*ready")
        top.wait_for(r"q quit")
        assert len(top.screen().splitlines()) <= 24
        assert max(map(len, top.screen().splitlines())) <= 80


@pytest.mark.parametrize("end", ["q", "C-c", "TERM"])
def test_leaving_gives_the_terminal_back(running: MockBox, end: str) -> None:
    shell = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(shell, {**environment(running), "PS1": "shell> "}, columns=100, rows=30) as terminal:
        terminal.wait_for("^shell>")
        terminal.type("PS1='back> '; " + " ".join(running.command("top")) + "; echo status $?\n")
        terminal.wait_for(r"^router .*ready")
        assert terminal.is_alternate
        if end == "TERM":
            os.kill(pid_of_top(running), signal.SIGTERM)
        else:
            terminal.press(end)
        terminal.wait_for(r"^status \d+$")
        terminal.wait_for(r"^back>$")
        assert not terminal.is_alternate
        assert not terminal.takes_mouse
        assert terminal.cursor_is_visible
        terminal.type("echo $((6*7)); stty -a | grep -o ' echo '\n")
        terminal.wait_for(r"^42$")
        terminal.wait_for(r"^ echo$")
        assert "Traceback" not in terminal.screen()


def test_suspended_it_gives_the_terminal_back_and_draws_all_of_it_again(running: MockBox) -> None:
    shell = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(shell, {**environment(running), "PS1": "shell> "}, columns=100, rows=30) as terminal:
        terminal.wait_for("^shell>")
        terminal.type(" ".join(running.command("top")) + "\n")
        terminal.wait_for(r"^router .*ready")
        terminal.press("C-z")
        terminal.wait_for("Stopped")
        assert not terminal.is_alternate
        assert not terminal.takes_mouse
        terminal.type("fg\n")
        terminal.wait_for("^Processes")
        terminal.wait_for("1 fleet")
        terminal.press("q")
        terminal.wait_for("^shell>")


def pid_of_top(box: MockBox) -> int:
    for pid in box.pids():
        words = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"top" in words and b"dynamo_box" in words:
            return pid
    raise AssertionError("no `dynbox top` runs")


def test_a_box_that_goes_and_comes_back_is_followed(box: MockBox) -> None:
    with open_top(box) as top:
        top.wait_for(r"^router .*ready")
        box.down()
        top.wait_for(r"dynbox up|no box is running|has (stopped|ended)")
        assert not top.has_ended
        box.start_again()
        top.wait_for(rf"ready +tiny +http://127\.0\.0\.1:{box.port}")
        top.wait_for(r"^router .*ready")
        top.wait_without(r"no box is running")


def test_a_supervisor_that_is_killed_is_said_to_be_gone(box: MockBox) -> None:
    supervisor = box.ps()["box"]["pid"]
    with open_top(box) as top:
        top.wait_for(r"^router .*ready")
        os.kill(supervisor, signal.SIGKILL)
        top.wait_for(r"no box is running|reconnecting|gone|went away|ended|died")
        assert not top.has_ended
        began = time.monotonic()
        box.start_again()
        found = top.wait_for(rf"ready +tiny +http://127\.0\.0\.1:{box.port} +up (?:(\d+)m)?(\d+)s")
        assert 60 * int(found[1] or 0) + int(found[2]) <= time.monotonic() - began + 1, "the box that is there now"
        top.wait_for(r"^router .*ready")


def test_without_a_box_it_waits_for_one(box: MockBox) -> None:
    box.down()
    with open_top(box) as top:
        top.wait_for("no box is running")
        top.wait_for("dynbox up")
        box.start_again()
        top.wait_for(r"^router .*ready")
