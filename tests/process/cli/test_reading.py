"""Verbs that read, and what every verb does when it is used wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dynamo_box.protocol import control

Dynbox = Callable[..., subprocess.CompletedProcess[str]]


def test_ps_shows_the_box_and_a_line_a_process(supervisor: Any, dynbox: Dynbox) -> None:
    lines = dynbox("ps").stdout.splitlines()
    assert lines[0].startswith("box ready  profile smollm2  http://127.0.0.1:8000")
    assert lines[0].endswith("up 1m15s")
    assert "smollm2  ready  1 of 1 workers" in lines[1]
    worker = next(line for line in lines if line.startswith("smollm2.aggregated.0"))
    assert "weights 120 MiB of 513 MiB" in worker
    assert worker.endswith("-")


def test_ps_json_has_the_promised_shape(supervisor: Any, dynbox: Dynbox) -> None:
    data = json.loads(dynbox("ps", "--json").stdout)
    assert {"state", "profile", "endpoint", "pid", "uptime_s"} <= data["box"].keys()
    assert data["models"][0]["name"] == "smollm2"
    worker = data["processes"][1]
    assert worker["name"] == "smollm2.aggregated.0"
    assert worker["rss_bytes"] is None
    expected = {"name", "kind", "model", "role", "state", "phase", "pid", "restarts", "device", "rss_bytes"}
    assert expected <= worker.keys()


def test_ps_without_a_box_keeps_its_shape_and_says_so(dynbox: Dynbox) -> None:
    done = dynbox("ps", "--json", code=3)
    data = json.loads(done.stdout)
    assert data["box"]["state"] == "stopped"
    assert data["processes"] == []
    assert "no box is running" in done.stderr
    assert "dynbox up" in done.stderr


def test_a_supervisor_that_says_no_is_quoted_with_its_exit_code(supervisor: Any, dynbox: Dynbox) -> None:
    supervisor.handlers[control.GetSnapshot] = lambda request: [
        control.Error(request.id, 4, "busy", "wait", ("line one",))
    ]
    done = dynbox("ps", code=4)
    assert done.stderr.splitlines() == ["error: busy", "  line one", "hint: wait"]
    assert done.stdout == ""


def test_a_supervisor_of_another_version_is_an_error_not_a_traceback(supervisor: Any, dynbox: Dynbox) -> None:
    supervisor.handlers[control.GetSnapshot] = lambda request: [
        control.SnapshotReply(request.id, msgspec.Raw(msgspec.msgpack.encode({"box": 7})))
    ]
    assert "another version" in dynbox("ps", code=1).stderr


def test_a_supervisor_that_hangs_up_is_an_error(supervisor: Any, dynbox: Dynbox) -> None:
    del supervisor.handlers[control.GetSnapshot]
    assert "went away" in dynbox("ps", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("lgos",), "'logs'"),
        (("up", "--prot", "1"), "--port"),
        (("help", "profile"), "profiles"),
        (("profile", "show", "smollm3"), "smollm2"),
        (("up", "--profile", "smolm2"), "smollm2"),
        (("completion", "tcsh"), "bash"),
        (("logs", "--level", "warn"), "warning"),
        (("up", "--log-level", "loud"), "info"),
        (("up", "--timeout", "nan"), "nan is not a number of seconds"),
        (("up", "--timeout", "inf"), "inf is not a number of seconds"),
        (("up", "--timeout=-1"), "-1 is not a number of seconds"),
        (("down", "--drain", "nan"), "nan is not a number of seconds"),
        (("profile", "validate", "/dev/null"), "not a file"),
    ],
)
def test_a_wrong_word_is_exit_2_with_the_nearest_right_one(
    dynbox: Dynbox, box_env: Any, arguments: tuple[str, ...], suggestion: str
) -> None:
    done = dynbox(*arguments, code=2)
    assert suggestion in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_process_that_is_not_there_is_exit_3_with_the_nearest_name(supervisor: Any, dynbox: Dynbox) -> None:
    assert "did you mean router" in dynbox("restart", "ruoter", code=3).stderr


def test_a_reader_that_goes_away_ends_it_quietly(supervisor: Any) -> None:
    done = subprocess.run(
        f"{sys.executable} -m dynamo_box help troubleshooting | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("# When something is wrong")


def test_help_lists_and_prints_pages(dynbox: Dynbox) -> None:
    index = dynbox("help").stdout
    for topic in ("up", "profiles", "models", "chat", "logs", "exit-codes", "environment", "troubleshooting"):
        assert f"dynbox help {topic}" in index
        assert dynbox("help", topic).stdout.startswith("# ")
    assert "130" in json.loads(dynbox("help", "exit-codes", "--json").stdout)["text"]


def test_version_and_usage(dynbox: Dynbox) -> None:
    assert dynbox("--version").stdout.startswith("dynbox 0.")
    assert "Commands:" in dynbox("--help").stdout
    bare = dynbox(code=2)
    assert "Commands:" in bare.stderr
    assert bare.stdout == ""


def test_a_defect_is_one_line_and_a_file(supervisor: Any, dynbox: Dynbox, box_env: Any) -> None:
    """A home that is a file breaks `models` in a way nobody foresaw; it stands for any such way."""
    (box_env.home / "state").mkdir(parents=True)
    broken = "import dynamo_box.cli.ps as ps; ps.show = lambda snapshot: 1 / 0; "
    script = broken + "import sys; from dynamo_box.cli.app import main; sys.exit(main(['ps']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in (box_env.home / "state" / "last-crash.txt").read_text()
