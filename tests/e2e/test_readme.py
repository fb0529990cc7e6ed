"""Every `console` example of the README is run, in order, and prints what the README says it prints.

Figures differ from run to run, so digits, units and the width of columns don't count; a line `…` stands for any lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from box_under_test import Box, eventually

README = Path(__file__).parent.parent.parent / "README.md"
ANY = "…"


def examples() -> list[tuple[str, list[str]]]:
    """(command, expected lines) of all console blocks, in order."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", README.read_text("utf-8"), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def blurred(line: str) -> str:
    line = re.sub(r"\b(B|KiB|MiB|GiB)\b", "B", line)
    line = re.sub(r"[\d.,:]+", "0", line)
    return re.sub(r"\s+", " ", line).strip()


def missing_line(expected: list[str], actual: list[str]) -> str | None:
    """The first expected line that doesn't come in its order; lines may stand between only where `…` does."""
    position, skipping = 0, False
    for line in expected:
        if line == ANY:
            skipping = True
            continue
        rest = [blurred(each) for each in actual[position:]]
        reach = len(rest) if skipping else 1
        if blurred(line) not in rest[:reach]:
            return line
        position += rest.index(blurred(line)) + 1
        skipping = False
    return None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_example_of_the_readme_works(box: Box, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    launcher = tmp_path / "bin" / "dynbox"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dynamo_box "$@"\n')
    launcher.chmod(0o755)
    env = {**box.env, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "DYNBOX_PORT": str(box.port)}
    commands = examples()
    assert len(commands) > 8
    for command, expected in commands:
        if command.startswith("dynbox logs supervisor"):
            eventually(lambda: any(each["restarts"] for each in box.ps()["processes"]), "a death was noticed")
            box.wait_ready()
        done = subprocess.run(
            ["bash", "-c", command.replace("8000", str(box.port)) + " 2>&1"],
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        missing = missing_line(expected, done.stdout.splitlines())
        assert missing is None, f"$ {command}\nno line like: {missing}\nin:\n{done.stdout}"


def test_the_readme_names_every_folder_and_no_other() -> None:
    text = README.read_text("utf-8")
    package = README.parent / "dynamo_box"
    folders = {path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert set(re.findall(r"^  (\w+)/ ", text, re.MULTILINE)) == folders


def test_every_page_that_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README.read_text("utf-8")):
        assert (README.parent / target).exists(), target
