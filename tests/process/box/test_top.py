"""`dynbox top` without a terminal, and what its screens are fed with, against a real box."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from box_under_test import COMMAND_DEADLINE_S, Box, eventually
from mock_box import MockBox

from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.tui.acts import Order, carry_out
from dynamo_box.tui.recording import Kind, Recording
from dynamo_box.tui.source import LiveSource, Lost, NewSnapshot, SourceEvent, Why

WORKER = "tiny.aggregated.0"


def wait_for_snapshot(events: queue.Queue[SourceEvent], state: str = "ready") -> NewSnapshot:
    while True:
        event = events.get(timeout=COMMAND_DEADLINE_S)
        if isinstance(event, NewSnapshot) and event.snapshot.box.state == state:
            return event


def wait_for_loss(events: queue.Queue[SourceEvent]) -> Lost:
    while not isinstance(event := events.get(timeout=COMMAND_DEADLINE_S), Lost):
        pass
    return event


def test_a_box_that_ends_and_comes_back_is_followed(mock_box: MockBox) -> None:
    events: queue.Queue[SourceEvent] = queue.Queue()
    source = LiveSource(RunDir(mock_box.run_dir))
    source.start(events.put)
    try:
        first = wait_for_snapshot(events).snapshot
        mock_box.down()
        assert wait_for_loss(events).why is Why.STOPPED
        mock_box.start_again()
        second = wait_for_snapshot(events).snapshot
        assert second.box.pid != first.box.pid
    finally:
        source.close()


def test_acts_do_to_the_box_what_they_say(mock_box: MockBox) -> None:
    run_dir = RunDir(mock_box.run_dir)
    before = mock_box.process(WORKER)
    box = mock_box.ps()["box"]["run_id"]
    with pytest.raises(BoxError, match="another box"):
        carry_out(run_dir, Order("restart", WORKER, run_id="the one before"))
    assert carry_out(run_dir, Order("restart", WORKER, run_id=box))
    assert mock_box.process(WORKER)["pid"] != before["pid"]
    assert carry_out(run_dir, Order("mode", "random", "router", box))
    assert carry_out(run_dir, Order("drain", WORKER, run_id=box))
    assert mock_box.process(WORKER)["pid"] is None


def test_once_prints_each_screen_as_text(shared_box: Box) -> None:
    for screen, seen in (
        ("fleet", WORKER),
        ("2", "Traffic"),
        ("memory", "Memory"),
        ("requests", "No request is running"),
        ("models", "tiny"),
        ("logs", "supervisor"),
        ("events", "box ready"),
    ):
        printed = shared_box.dynbox("top", "--once", "--screen", screen).stdout
        assert f"http://127.0.0.1:{shared_box.port}" in printed
        assert seen in printed
        assert "\x1b" not in printed


def test_once_obeys_filter_and_size(shared_box: Box) -> None:
    printed = shared_box.dynbox("top", "--once", "--filter", "!aggregated", "--size", "70x12").stdout
    lines = printed.splitlines()
    assert len(lines) <= 12 and all(len(line) <= 70 for line in lines)
    assert WORKER not in printed
    assert "frontend" in printed


def test_json_is_the_snapshot_that_ps_prints(shared_box: Box) -> None:
    snapshot = json.loads(shared_box.dynbox("top", "--json").stdout)
    printed = json.loads(shared_box.dynbox("ps", "--json").stdout)
    assert snapshot["box"]["pid"] == printed["box"]["pid"]
    assert snapshot.keys() == printed.keys() == shared_box.ps().keys()


def test_svg_is_a_picture_that_fetches_nothing(shared_box: Box, tmp_path: Path) -> None:
    picture = tmp_path / "fleet.svg"
    shared_box.dynbox("top", "--svg", str(picture), "--size", "100x30")
    text = picture.read_text("utf-8")
    ElementTree.fromstring(text)
    assert "aggregated" in text
    assert "url(" not in text.replace("url(#", "")
    assert [each.name for each in tmp_path.glob("*.tmp")] == []
    refused = shared_box.dynbox("top", "--svg", str(tmp_path / "none" / "x.svg"), code=1)
    assert "can't write" in refused.stderr


def test_a_picture_goes_through_links_and_replaces_nothing_but_files(shared_box: Box, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link.svg"
    os.mkfifo(pipe)
    link.symlink_to("real.svg")
    shared_box.dynbox("top", "--svg", str(link))
    assert link.is_symlink() and (tmp_path / "real.svg").read_text("utf-8").startswith("<svg")
    with shared_box.start("top", "--svg", str(pipe)) as drawing:
        assert pipe.read_text("utf-8").startswith("<svg")
        assert drawing.wait(COMMAND_DEADLINE_S) == 0
    assert pipe.is_fifo()


def test_what_a_character_set_lacks_is_no_defect(shared_box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shared_box.env, "PYTHONIOENCODING", "latin-1")
    assert WORKER in shared_box.dynbox("top", "--once").stdout


def test_a_recording_that_cannot_be_written_any_more_ends_and_plays(shared_box: Box, tmp_path: Path) -> None:
    recording = tmp_path / "box.dynrec"
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *shared_box.command("top", "--record", str(recording))]
    ended = subprocess.run(limited, env=shared_box.env, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
    assert ended.returncode == 1
    assert "recording ended" in ended.stderr
    assert WORKER in shared_box.dynbox("top", "--replay", str(recording), "--once").stdout


def test_without_a_terminal_a_recording_is_made_until_the_box_ends(mock_box: Box, tmp_path: Path) -> None:
    recording = tmp_path / "box.dynrec"
    running = mock_box.start("top", "--record", str(recording))
    assert running.stderr is not None
    assert "recording to" in running.stderr.readline()
    eventually(lambda: recording.stat().st_size > 600, "more than the head of a recording is written")
    mock_box.down()
    assert "has stopped" in running.communicate(timeout=COMMAND_DEADLINE_S)[1]
    assert running.returncode == 0
    printed = mock_box.dynbox("top", "--replay", str(recording), "--once").stdout
    assert WORKER in printed and "REPLAY" in printed
    with Recording.open(recording) as whole:
        assert whole.kind(0) is Kind.SNAPSHOT
        assert whole.header.profile == "tiny"
    assert json.loads(mock_box.dynbox("top", "--replay", str(recording), "--json").stdout)["models"]
    assert "exists" in mock_box.dynbox("top", "--record", str(recording), code=2).stderr


def test_an_interrupted_recording_can_be_played(shared_box: Box, tmp_path: Path) -> None:
    recording = tmp_path / "box.dynrec"
    running = shared_box.start("top", "--record", str(recording))
    assert running.stderr is not None
    assert "recording to" in running.stderr.readline()
    eventually(lambda: recording.stat().st_size > 600, "more than the head of a recording is written")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=COMMAND_DEADLINE_S)
    assert running.returncode == 130
    assert WORKER in shared_box.dynbox("top", "--replay", str(recording), "--once").stdout


class TestWithoutABox:
    @pytest.fixture
    def nobody(self, tmp_path: Path) -> Box:
        (tmp_path / "home").mkdir()
        return Box(tmp_path / "run", tmp_path / "home")

    @pytest.mark.parametrize("how", [["--once"], ["--json"], ["--svg", "x.svg"], ["--record", "/dev/null/x"]])
    def test_it_fails_as_ps_does(self, nobody: Box, how: list[str]) -> None:
        if how[0] == "--record":
            how = ["--record", str(nobody.home / "box.dynrec")]
        failed = nobody.dynbox("top", *how, code=3)
        assert "no box is running" in failed.stderr and "dynbox up" in failed.stderr
        assert failed.stdout == ""

    def test_a_demo_plays_all_the_same(self, nobody: Box) -> None:
        for demo in ("routed-load", "crash-recovery", "disagg"):
            for screen in ("fleet", "routing", "logs", "events"):
                printed = nobody.dynbox("top", "--replay", demo, "--once", "--screen", screen).stdout
                assert "REPLAY" in printed

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ([], "needs a terminal"),
            (["--screen", "flet"], "did you mean fleet?"),
            (["--once", "--filter", "("], "is no regular expression"),
            (["--once", "--theme", "drak"], "did you mean dark?"),
            (["--once", "--size", "80"], "is no size"),
            (["--once", "--size", "80x0"], "is no size"),
            (["--size", "80x24"], "--size is of no use"),
            (["--once", "--json"], "exclude each other"),
            (["--speed", "2"], "--speed is of no use"),
            (["--once", "--replay", "routed-load", "--speed", "0.01"], "is out of range"),
            (["--once", "--replay", "nothing-like-it"], "there is no recording"),
            (["--record", "a", "--replay", "b"], "exclude each other"),
        ],
    )
    def test_what_makes_no_sense_is_said(self, nobody: Box, wrong: list[str], said: str) -> None:
        failed = nobody.dynbox("top", *wrong, code=2)
        assert said in failed.stderr
        assert "hint:" in failed.stderr


def test_a_closed_stdin_is_no_terminal(shared_box: Box) -> None:
    closed = ["bash", "-c", 'exec "$@" <&-', "-", *shared_box.command("top")]
    failed = subprocess.run(closed, env=shared_box.env, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
    assert failed.returncode == 2
    assert "needs a terminal" in failed.stderr


def test_the_command_starts_without_importing_a_terminal(shared_box: Box) -> None:
    """`--once` is for scripts, which may ask often."""
    code = (
        "import sys; from dynamo_box.cli.app import main; status = main(['top', '--once']); "
        "sys.exit(status or 'textual' in sys.modules)"
    )
    done = subprocess.run(
        [shared_box.command()[0], "-c", code],
        env=shared_box.env,
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
