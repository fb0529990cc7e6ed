"""Every example in the manual (`dynamo_box/help/*.md`) is run, in order, against one box of mock workers.

What a page has to keep to, so that its examples can be found:

- An example is a line indented by four spaces in which `dynbox` is called. It ends at two spaces; what follows is a
  remark for the reader.
- A word in capitals is a placeholder. `MEANING` has what stands for it here.
- Examples exit with 0, or with what `EXIT_CODES` allows. They find a box that runs, except for `dynbox up`, which
  finds none; and they run in one directory, so that one may write a file that the next one reads.
- What can't be run here is in `NOT_RUN`, with the reason; the command line has to understand it all the same. So it
  has with every `dynbox …` in running text, between backquotes.
- An indented block that is YAML is a profile, and has to load.

`console` blocks, with what is printed, are for the README: see test_readme.py.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from box_under_test import Box
from fakes.tiny_gguf import make_tiny_gguf
from mock_box import PROFILE

from dynamo_box.cli.app import VERBS, _application
from dynamo_box.profile.load import load_text

ROOT = Path(__file__).parent.parent.parent
PAGES = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "dynamo_box" / "help").glob("*.md"))}
README = (ROOT / "README.md").read_text("utf-8")
LAST_PAGE = "up"
"""Its examples take the box down."""

MEANING = {
    "chat NAME": "chat tiny",
    "drain NAME": "drain tiny.aggregated.0",
    "sleep NAME": "sleep tiny",
    "wake NAME": "wake tiny",
    "restart NAME": "restart tiny.aggregated.0",
    "role WORKER": "role tiny.aggregated.0",
    "scale MODEL": "scale tiny",
    "advise MODEL": "advise tiny",
    "up --model NAME": "up --model tiny",
    "new MODEL": "new tiny",
    "PACKAGE==VERSION": "some-package==1.0",
    "ORGANISATION/NAME": "some/model",
    "@REVISION": "@main",
    "NAME": "router",
    "TOPIC": "up",
    "FILE": "./my.yaml",
    "SERVICE": "dynbox-smollm2",
}
"""What stands for a placeholder: in these words of an example, else anywhere."""

EXIT_CODES = {"dynbox doctor": {0, 1}, "dynbox service status": {3}, "dynbox kv clear": {3}}
"""Of examples that begin like this: a machine may have something wrong, no service is installed, and mock workers have
no KV tiers.
"""

NOT_RUN = {
    "dynbox pull pypi:": "needs a package index",
    "dynbox pull hf:": "needs the hub",
    r"dynbox service install(?!.*--dry-run)": "changes this machine; test_service.py has a systemd of its own",
    r"dynbox top(?!.*--(once|json|svg))": "takes over a terminal; tests/tui has one",
}
"""Patterns of examples, and why they can't be run here."""

DEADLINE_S = 120


def examples(page: str) -> list[str]:
    """Commands, with something definite for every placeholder."""
    lines = re.findall(r"^ {4}(\S.*)$", page, re.MULTILINE)
    return [definite(re.split(r" {2,}", line)[0]) for line in lines if re.search(r"(^|[|(] ?)dynbox ", line)]


def definite(command: str) -> str:
    for placeholder, meaning in MEANING.items():
        command = command.replace(placeholder, meaning)
    left = re.findall(r"\b[A-Z]{3,}\b(?!=)", re.sub(r'"[^"]*"', "", command))
    assert not left, f"no meaning for {left} in: {command}"
    return command


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), None)


def parse(command: str) -> None:
    """Have the command line understand `command`, without carrying it out.

    Raises:
        ClickException: a word that it doesn't know, or one that is missing.
    """
    called = re.search(r"\bdynbox ([^<|>&)]*)", command)
    assert called, command
    words = shlex.split(called[1])
    group = typer.main.get_command(_application())
    context: Any = group.make_context("dynbox", words, resilient_parsing=False)
    while context._protected_args or context.args:
        name, found, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = found.make_context(name, rest, parent=context)
        if not hasattr(found, "commands"):
            return


class Reader:
    """Somebody who reads the manual and types what it says."""

    def __init__(self, root: Path, tiny_model: Path, smollm2: Path) -> None:
        self.root = root
        self.desk = root / "desk"
        self.desk.mkdir()
        (root / "home" / "models").mkdir(parents=True)
        (root / "home" / "models" / "smollm2").symlink_to(smollm2)
        self.box = Box(root / "run", root / "home")
        self._put_files(tiny_model)
        self.env = {
            **self.box.env,
            "PATH": f"{self._launcher()}:{os.environ['PATH']}",
            "HOME": str(root),
            "XDG_CONFIG_HOME": str(root / "config"),
            "DYNBOX_PORT": str(self.box.port),
        }
        self.box.env = self.env
        self.is_up = False

    def _put_files(self, tiny_model: Path) -> None:
        """Profiles of mock workers that hide the shipped ones of the same names, and what examples read."""
        profiles = self.root / "config" / "dynbox" / "profiles"
        profiles.mkdir(parents=True)
        brief = PROFILE.replace("decode_ms: 2", "decode_ms: 2, stop_after: 8")
        text = brief.format(source=tiny_model) + "frontend:\n  port: ${DYNBOX_PORT}\n"
        (profiles / "smollm2.yaml").write_text(text)
        (profiles / "smollm2-duo.yaml").write_text("extends: smollm2\n")
        make_tiny_gguf(self.desk / "model.gguf")
        (self.desk / "file").write_text("Something to talk about.")

    def _launcher(self) -> Path:
        directory = self.root / "bin"
        directory.mkdir()
        launcher = directory / "dynbox"
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dynamo_box "$@"\n')
        launcher.chmod(0o755)
        return directory

    def type(self, command: str) -> None:
        """Run one example and hold it to its exit code."""
        starts = command.startswith("dynbox up") and "--dry-run" not in command
        if starts and self.is_up:
            self.box.down()
        elif not starts and not self.is_up:
            self.box.up("smollm2")
        self.is_up = True
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}" if command.startswith("dynbox") else command],
            env=self.env,
            cwd=self.desk,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        allowed = next((codes for start, codes in EXIT_CODES.items() if command.startswith(start)), {0})
        if "-f" in command.split():  # it follows until it is interrupted
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            allowed = {130}
        try:
            output, _ = process.communicate("Hello\n", timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        assert process.returncode in allowed, f"$ {command}\nexit {process.returncode}\n{output}"
        if command.startswith("dynbox down"):
            self.is_up = False


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_example_of_the_manual_works(tmp_path: Path, tiny_model: Path, smollm2_path: Path) -> None:
    reader = Reader(tmp_path, tiny_model, smollm2_path)
    try:
        reader.type(f"dynbox pull {tiny_model} --name tiny")
        for page in sorted(PAGES, key=lambda name: (name == LAST_PAGE, name)):
            for command in examples(PAGES[page]):
                if reason_not_to_run(command) is None:
                    reader.type(command)
    finally:
        reader.box.destroy()


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_the_command_line_understands_every_example(page: str) -> None:
    text = PAGES.get(page, README)
    inline = re.findall(r"`(dynbox [^`]+)`", text)
    for command in [*examples(text), *map(definite, inline)]:
        if "…" not in command:
            parse(command)


def test_a_wrong_example_would_be_found() -> None:
    for wrong in ("dynbox lgos", "dynbox up --prot 1", "dynbox restart", "dynbox profile shwo smollm2"):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_every_profile_in_the_manual_loads(page: str) -> None:
    for block in re.findall(r"(?:^ {4}.*\n)+", PAGES[page], re.MULTILINE):
        text = re.sub(r"^ {4}", "", block, flags=re.MULTILINE)
        if re.match(r"\w+:(\s|$)", text):
            assert load_text(text, "example").served


def test_every_verb_has_an_example() -> None:
    shown = " ".join([*PAGES.values(), README])
    assert [verb for verb in VERBS if f"dynbox {verb}" not in shown] == []


def test_no_example_is_left_out_without_need() -> None:
    """Reasons, exit codes and meanings that no page needs any more."""
    commands = [command for page in PAGES.values() for command in examples(page)]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in commands)] == []
    assert [start for start in EXIT_CODES if not any(command.startswith(start) for command in commands)] == []
