"""A box driven as a person drives it: the real command, the real processes, the real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from ports import free_port

from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir

COMMAND_DEADLINE_S = 120
CONDITION_DEADLINE_S = 120


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = CONDITION_DEADLINE_S) -> Any:
    """The first true result of `condition`, asked again and again until the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline_s} s: {what}")
        time.sleep(0.02)


class Box:
    """One run dir, one home, one port."""

    def __init__(self, run: Path, home: Path) -> None:
        self.run_dir = run
        self.home = home
        self.port = free_port()
        self.env = {**os.environ, "DYNBOX_RUN_DIR": str(run), "DYNBOX_HOME": str(home), "NO_COLOR": "1"}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "dynamo_box", *arguments]

    def dynbox(
        self, *arguments: str, code: int = 0, deadline_s: float = COMMAND_DEADLINE_S, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `dynbox` and hold it to its exit code."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            input=stdin if stdin is not None else "",
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def up(self, profile: str = "smollm2", *more: str) -> subprocess.CompletedProcess[str]:
        return self.dynbox("up", "--profile", profile, "--port", str(self.port), *more)

    def ps(self) -> dict[str, Any]:
        """What `dynbox ps --json` prints, without a process for it: tests that wait ask fifty times a second.

        Raises:
            NotRunning: there is no box.
        """
        with ControlClient.connect(RunDir(self.run_dir), CONDITION_DEADLINE_S) as client:
            snapshot = client.snapshot(CONDITION_DEADLINE_S)
            result: dict[str, Any] = json.loads(msgspec.json.encode(snapshot))
        return result

    def process(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each for each in self.ps()["processes"] if each["name"] == name)
        return found

    def wait_ready(self) -> dict[str, Any]:
        def ready() -> dict[str, Any] | None:
            state = self.ps()
            whole = all(each["state"] == "ready" for each in state["processes"])
            return state if whole and state["box"]["state"] == "ready" else None

        result: dict[str, Any] = eventually(ready, "every process ready")
        return result

    def wait_routed(self) -> None:
        """Return when the router has every worker that there is. It hears of new ones a moment after the supervisor;
        of one that lives again, or has another role, its figures don't tell whether it has.
        """

        def known() -> bool:
            processes = self.ps()["processes"]
            (figures,) = (each["figures"] for each in processes if each["kind"] == "router")
            return figures is not None and all(
                each["name"] in figures["workers"] for each in processes if each["kind"] == "worker"
            )

        eventually(known, "the router has every worker")

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, **options)

    def pids(self) -> set[int]:
        """Every live process that carries this box's run dir in its environment, the command line apart."""
        wanted = f"DYNBOX_RUN_DIR={self.run_dir}".encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if wanted in environment and state != b"Z":
                found.add(int(entry.name))
        return found

    def down(self) -> None:
        self.dynbox("down", "--drain", "5")

    def destroy(self) -> None:
        """End what runs, without a process for it where the supervisor answers; nothing may be left."""
        try:
            with ControlClient.connect(RunDir(self.run_dir), CONDITION_DEADLINE_S) as client:
                client.down(0.0, COMMAND_DEADLINE_S)
        except BoxError:  # there is no supervisor, or none that answers: the command sweeps what it left
            if self.pids():
                subprocess.run(
                    self.command("down", "--drain", "0"), env=self.env, capture_output=True, timeout=COMMAND_DEADLINE_S
                )
        end = time.monotonic() + CONDITION_DEADLINE_S
        while (leftovers := self.pids()) and time.monotonic() < end:
            time.sleep(0.02)
        for pid in leftovers:
            os.kill(pid, signal.SIGKILL)
        assert not leftovers, f"processes left behind: {leftovers}"
