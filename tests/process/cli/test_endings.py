"""How `dynbox` ends when its output has nowhere to go, or when it is interrupted before it has begun."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 90
SCRIPT = "import importlib.metadata as m, sys; [e] = m.entry_points(group='console_scripts', name='dynbox'); "


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which `dynbox` is the command."""
    line = f'dynbox() {{ "{sys.executable}" -m dynamo_box "$@"; }}; {command}'
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.mark.parametrize("arguments", ["ps", "profile list --json", "help logs", "help", "up --help", "--version"])
def test_a_full_disk_is_no_defect(supervisor: Any, box_env: Any, arguments: str) -> None:
    done = shell(f"dynbox {arguments} >/dev/full")
    assert done.stderr == "error: can't write the output: No space left on device\n"
    assert done.returncode == 1
    assert not (box_env.home / "state" / "last-crash.txt").exists()


@pytest.mark.parametrize("arguments", ["ps", "profile list --json", "--help"])
def test_nor_is_a_closed_stdout(supervisor: Any, arguments: str) -> None:
    done = shell(f"dynbox {arguments} >&-")
    assert done.stderr == "error: can't write the output: Bad file descriptor\n"
    assert done.returncode == 1


def test_a_command_that_has_nothing_to_print_needs_no_stdout(box_env: Any) -> None:
    done = shell("dynbox ps >&-")
    assert "no box is running" in done.stderr
    assert done.returncode == 3


@pytest.mark.parametrize("command", [["-m", "dynamo_box"], ["-c", SCRIPT + "sys.exit(e.load()())"]])
def test_an_interrupt_while_it_is_being_imported_is_exit_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """The first library that it imports stands for any moment of its start."""
    (tmp_path / "typer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_installed_script_starts_where_the_module_does() -> None:
    [script] = importlib.metadata.entry_points(group="console_scripts", name="dynbox")
    assert script.value == "dynamo_box.__main__:main"
