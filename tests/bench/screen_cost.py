"""What a program that draws on a terminal costs: `python tests/bench/screen_cost.py --until PROCESS -- dynbox top`.

Runs it on a pseudo-terminal whose other end reads all it draws, and prints the seconds from the spawn to the first
screen that shows `--until`, then its share of a core, its resident memory and the bytes it draws a second.
Any program will do, so that others can be measured beside ours.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable

import psutil

FIRST_SCREEN_DEADLINE_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", required=True, help="text of the first whole screen")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--keys", default="", help="typed once the first screen is there")
    parser.add_argument("--size", default="140x42")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    columns, rows = map(int, arguments.size.split("x"))

    began = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor")
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.execvp(arguments.command[0], arguments.command)
    try:
        drawn = b""
        while arguments.until.encode() not in drawn:
            left = began + FIRST_SCREEN_DEADLINE_S - time.monotonic()
            if left <= 0:
                raise SystemExit(f"no {arguments.until!r} within {FIRST_SCREEN_DEADLINE_S:g} s")
            drawn += read(terminal, left)
        first = time.monotonic() - began
        os.write(terminal, arguments.keys.encode())
        process = psutil.Process(pid)
        read_for(terminal, 2.0)
        before, at = process.cpu_times(), time.monotonic()
        count = read_for(terminal, arguments.seconds)
        after, elapsed = process.cpu_times(), time.monotonic() - at
        cpu = (after.user + after.system - before.user - before.system) / elapsed
        memory = process.memory_info().rss / 2**20
        print(
            f"first screen {first:.2f} s   cpu {cpu:.1%} of a core   memory {memory:.0f} MiB   "
            f"{count / elapsed / 1000:.1f} KB/s drawn"
        )
    finally:
        os.kill(pid, signal.SIGTERM)
        drain_until_ended(pid, lambda: read(terminal, 0.1))


def read(terminal: int, timeout_s: float) -> bytes:
    if not select.select([terminal], [], [], timeout_s)[0]:
        return b""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the program has ended
        return b""


def read_for(terminal: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    count = 0
    while (left := end - time.monotonic()) > 0:
        count += len(read(terminal, left))
    return count


def drain_until_ended(pid: int, drain: Callable[[], object]) -> None:
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        drain()


if __name__ == "__main__":
    main()
