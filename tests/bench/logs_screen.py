"""What the logs screen costs: `python tests/bench/logs_screen.py` prints the figures.

A real `dynbox top --screen logs` in a pseudo-terminal follows files that grow by 5,000 lines a second until 100,000
lines are in it; then it stands idle, and at last a filter is typed.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import tempfile
import termios
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from dynamo_box.paths import Home, RunDir, logs_dir

RATE = 5000
LINES = 100_000
PROCESSES = 9
WIDTH, HEIGHT = 120, 40
WATCHED_S = 5.0


def line(number: int, process: str) -> str:
    fields = {
        "request_id": f"{number:032x}",
        "endpoint": "chat_completions",
        "model": "mock",
        "worker": f"mock.aggregated.{number % 8}",
        "status": 200,
        "prompt_tokens": number % 900,
        "ttft_s": 0.0031,
        "event": "request ended",
        "level": "info",
        "ts": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "process": process,
    }
    return json.dumps(fields) + "\n"


def write(directory: Path, lines: int) -> None:
    """`lines` lines at RATE, in batches of a twentieth of a second."""
    names = [f"worker.{number}" for number in range(PROCESSES)]
    files = [(directory / f"{name}.log").open("a", buffering=1024 * 1024) for name in names]
    batch = RATE // 20
    start = time.monotonic()
    for first in range(0, lines, batch):
        for number in range(first, first + batch):
            files[number % PROCESSES].write(line(number, names[number % PROCESSES]))
        for file in files:
            file.flush()
        time.sleep(max(start + (first + batch) / RATE - time.monotonic(), 0))


class Terminal:
    """A program in a pseudo-terminal, whose output is taken and counted."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(arguments[0], arguments, environment)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        self.process = psutil.Process(self.pid)
        self.written = 0
        self.last = b""
        threading.Thread(target=self._drain, daemon=True).start()

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def report(self, title: str, seconds: float) -> None:
        """What it costs from now on, for so long."""
        before, start, written = self.process.cpu_times(), time.monotonic(), self.written
        time.sleep(seconds)
        after, wall = self.process.cpu_times(), time.monotonic() - start
        used = after.user + after.system - before.user - before.system
        memory = self.process.memory_info().rss / 2**20
        shown = (self.written - written) / wall / 1024
        print(f"{title:28} {100 * used / wall:5.1f} % of a core  {memory:4.0f} MiB  {shown:5.1f} KiB/s to the terminal")

    def find(self, pattern: str) -> str:
        """The last match in what it wrote, without the escape sequences."""
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.last.decode("utf-8", "replace"))
        matches = list(re.finditer(pattern, text))
        return matches[-1][0] if matches else "nothing"

    def _drain(self) -> None:
        try:
            while data := os.read(self._terminal, 65536):
                self.written += len(data)
                self.last = (self.last + data)[-20_000:]
        except OSError:
            return


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="dynbox-bench-") as directory:
        run, home = RunDir(Path(directory, "run")), Path(directory, "home")
        where = logs_dir(run, Home(home / "models", home / "logs", home / "state", home / "cache"))
        where.mkdir(parents=True)
        environment = {
            **os.environ,
            "DYNBOX_RUN_DIR": str(run.root),
            "DYNBOX_HOME": str(home),
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
        }
        top = Terminal([sys.executable, "-m", "dynamo_box", "top", "--screen", "logs"], environment)
        time.sleep(3)
        top.report("no lines", WATCHED_S)
        writer = threading.Thread(target=write, args=(where, LINES))
        writer.start()
        top.report(f"{RATE:,} lines a second", LINES / RATE - 1)
        writer.join()
        time.sleep(2)
        top.report("100,000 lines, none new", WATCHED_S)
        top.type("/")
        time.sleep(0.5)
        top.type("request_id=.*00042 ")
        top.report("a filter typed", WATCHED_S)
        top.process.kill()
        os.waitpid(top.pid, 0)
        print("on the screen:", top.find(r"[\d,]+ of [\d,]+ lines"))


if __name__ == "__main__":
    main()
