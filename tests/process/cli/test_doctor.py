"""`dynbox doctor` on this machine: what dead boxes leave is found and cleared, and what lives is left alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from box_under_test import COMMAND_DEADLINE_S, Box, eventually

from dynamo_box.profile.pull import pull
from dynamo_box.profile.store import ModelStore

PROFILE = """
model:
  name: tiny
  source: {source}
  engine: mock
  block_size: 16
  options: {{decode_ms: 2, prefill_tokens_per_s: 100000, kv_blocks: 64}}
restart: {{give_up_after: 1}}
"""


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    (tmp_path / "home").mkdir()
    box = Box(tmp_path / "run", tmp_path / "home")
    box.env["DYNBOX_PORT"] = str(box.port)
    yield box
    box.destroy()


@pytest.fixture
def running(box: Box, tmp_path: Path, tiny_model: Path) -> Box:
    profile = tmp_path / "tiny.yaml"
    profile.write_text(PROFILE.format(source=tiny_model))
    box.up(str(profile))
    return box


def run_doctor(box: Box, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        box.command("doctor", *arguments), env=box.env, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
    )


LATE = ("no answer within", "the supervisor doesn't answer")
"""What is found where nothing hangs, but the machine was busy for one or two seconds."""


def patiently(box: Box, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """The command, again while a look came too late; all runs of it."""
    runs = [run_doctor(box, *arguments)]
    give_up_at = time.monotonic() + COMMAND_DEADLINE_S
    while any(words in runs[-1].stdout for words in LATE) and time.monotonic() < give_up_at:
        runs.append(run_doctor(box, *arguments))
    return runs


def report(box: Box, *arguments: str) -> dict[str, Any]:
    """As JSON; the exit code fits, whatever this machine has to complain of. What was done is in it even if it was done
    in a run that came too late to look elsewhere.
    """
    results: list[dict[str, Any]] = []
    for run in patiently(box, "--json", *arguments):
        results.append(json.loads(run.stdout))
        assert run.returncode == (1 if results[-1]["status"] == "fail" else 0), run.stderr
    return {**results[-1], "done": [deed for result in results for deed in result["done"]]}


def finding(of: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in of["findings"] if each["name"] == name)
    return found


def kill_whole_box(box: Box) -> dict[str, Any]:
    """Supervisor and guards at once, so that nobody can clear up. Returns the last snapshot."""
    state = box.ps()
    victims = [state["box"]["pid"], *(process["guard_pid"] for process in state["processes"])]
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not box.pids(), "every process of the box is gone")
    return state


def leave_orphan(box: Box, state: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A process of the dead box that outlived it."""
    return subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"],
        env={**box.env, "DYNBOX_RUN_ID": state["box"]["run_id"]},
        start_new_session=True,
    )


def test_a_box_that_was_killed_whole_is_found_and_cleared_up(running: Box) -> None:
    state = kill_whole_box(running)
    with leave_orphan(running, state) as orphan:
        try:
            before = report(running)
            assert finding(before, "run dir")["fixable"]
            assert f"supervisor pid {state['box']['pid']}" in finding(before, "run dir")["found"]
            assert finding(before, "processes")["fixable"]
            assert f"(pid {orphan.pid})" in finding(before, "processes")["found"]
            assert before["done"] == before["left"] == []
            assert (running.run_dir / "control.sock").exists(), "looking removes nothing"
            after = report(running, "--fix")
            assert orphan.wait(COMMAND_DEADLINE_S) == -signal.SIGKILL
        finally:
            orphan.kill()
    assert finding(after, "run dir")["status"] == "pass"
    assert finding(after, "processes")["status"] == "pass"
    assert any(f"pids {orphan.pid}" in deed for deed in after["done"])
    assert any("sockets and instance files" in deed for deed in after["done"])
    assert list(running.run_dir.glob("*.sock")) == list((running.run_dir / "instances").iterdir()) == []
    assert report(running, "--fix")["done"] == []


def test_a_box_that_lives_is_left_alone(running: Box) -> None:
    before = running.ps()
    found = report(running, "--fix")
    assert finding(found, "box")["status"] == "pass"
    assert f"profile {before['box']['profile']}" in finding(found, "box")["found"]
    assert finding(found, "port")["found"] == f"{running.port}, the box's own"
    assert "held by profile" in finding(found, "run dir")["found"]
    assert found["done"] == []
    after = running.ps()
    pids = [[process["pid"] for process in state["processes"]] for state in (before, after)]
    assert pids[0] == pids[1]
    assert after["box"]["state"] == "ready"


def test_a_process_that_was_given_up_is_a_failure(running: Box) -> None:
    os.kill(running.process("router")["pid"], signal.SIGKILL)
    eventually(lambda: running.process("router")["state"] == "fatal", "the router is given up")
    found = finding(report(running), "router")
    assert found["status"] == "fail"
    assert found["command"] == "dynbox restart router"


def test_a_port_that_a_stranger_has_is_a_failure_with_another_port(box: Box) -> None:
    with socket.create_server(("127.0.0.1", box.port)):
        done = patiently(box)[-1]
        assert done.returncode == 1
        assert f"{box.port} is taken by " in done.stdout
        assert f"(pid {os.getpid()})" in done.stdout
        assert "$ export DYNBOX_PORT=" in done.stdout
    assert finding(report(box), "port")["status"] == "pass"


def test_damaged_models_are_found_by_size_and_by_checksum(box: Box, tiny_model: Path) -> None:
    store = ModelStore(box.home / "models")
    for name in ("cut", "changed"):
        pull(str(tiny_model), store, name=name, progress=lambda *_: None)
        weights = store.path_of(name) / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(content[:-1] if name == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    found = report(box)
    assert finding(found, "model cut")["status"] == "fail"
    assert finding(found, "models")["found"].endswith(": changed")
    assert [each["name"] for each in found["findings"]].count("checksums") == 0
    done = patiently(box, "--deep")[-1]
    assert done.returncode == 1
    assert "model.safetensors has SHA-256" in done.stdout
    assert "changed  checking  checksums" in done.stderr


def test_a_manifest_that_never_answers_does_not_hold_up_the_command(box: Box) -> None:
    model = box.home / "models" / "stuck"
    model.mkdir(parents=True)
    os.mkfifo(model / "dynbox.json")
    found = finding(json.loads(run_doctor(box, "--json").stdout), "models")
    assert found["status"] == "fail"
    assert found["found"].startswith("no answer within")


def test_the_report_for_people_is_grouped_and_plain_where_nobody_looks(box: Box) -> None:
    (box.home / "models" / "odd").mkdir(parents=True)
    text = patiently(box)[-1].stdout
    lines = text.splitlines()
    areas = [line.lower() for line in lines if line.isupper()]
    assert areas == ["python", "gpu", "limits", "memory", "disk", "box", "leftovers", "models"]
    assert "\x1b" not in text
    failure = next(index for index, line in enumerate(lines) if "model odd" in line)
    assert lines[failure].split() == ["fail", "model", "odd", "has", "no", "dynbox.json"]
    assert lines[failure + 2].strip() == "$ dynbox models rm odd"
    failures = sum(line.split()[:1] == ["fail"] for line in lines)  # the machine may have some of its own
    assert lines[-1].startswith(f"{failures} failed, ")


def test_the_shape_of_the_json_is_kept(box: Box) -> None:
    found = report(box)
    assert set(found) == {"version", "status", "findings", "done", "left"}
    assert found["version"] == 1
    for each in found["findings"]:
        assert set(each) == {"area", "name", "status", "found", "why", "command", "fixable"}
        assert each["status"] in ("pass", "warn", "fail", "skip")
        assert (each["why"] is None) == (each["status"] in ("pass", "skip"))


def test_wrong_usage_is_exit_2(box: Box) -> None:
    assert run_doctor(box, "--fixx").returncode == 2
    assert run_doctor(box, "everything").returncode == 2
