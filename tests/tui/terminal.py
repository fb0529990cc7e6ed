"""A real terminal to run programs in: tmux, with a server of the test's own on a private socket.

What a person would see is read back with `screen`, what a person would type goes in with `press` and `type`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pytest

DEADLINE_S = 120
POLL_S = 0.05
_COMMAND_TIMEOUT_S = 120
_KEEPING_STATUS = ("sh", "-c", '"$@"; echo "$?" >"$0"')
"""tmux 3.3 loses the status of a command now and then, and leaves it a zombie."""


class Terminal:
    """A window of `columns` by `rows` in which one command runs; a context manager that leaves no process behind.

    The command sees exactly `environment`, with TERM and a UTF-8 locale set as tmux offers them.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, columns: int = 120, rows: int = 40
    ) -> None:
        if shutil.which("tmux") is None:
            pytest.fail("tmux is not installed; `./install.sh test` says how to get it")
        self._directory = Path(tempfile.mkdtemp(prefix="dynbox-tmux-"))  # short: a socket's path has 107 bytes at most
        self._environment = {**environment, "LC_ALL": "C.UTF-8"}
        self._environment.pop("TMUX", None)
        self._status = self._directory / "status"
        (self._directory / "tmux.conf").write_text(
            "set -g default-terminal screen-256color\n"
            "set -s escape-time 0\n"
            "set -g status off\n"
            "set -g remain-on-exit on\n"
            "set -g history-limit 200\n"
        )
        try:
            size = ("-x", str(columns), "-y", str(rows))
            self._tmux("new-session", "-d", "-s", "main", *size, "--", *_KEEPING_STATUS, str(self._status), *command)
        except BaseException:
            shutil.rmtree(self._directory)
            raise
        self._server = int(self._ask("#{pid}"))
        self._session = int(self._ask("#{pane_pid}"))

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: `q`, `Enter`, `Escape`, `C-c`, `Down`, `F1`."""
        self._tmux("send-keys", "-t", "main", *keys)

    def type(self, text: str) -> None:
        """Text as it is, with no key names in it."""
        self._tmux("send-keys", "-t", "main", "-l", "--", text)

    def screen(self, *, styles: bool = False) -> str:
        """The lines that are seen now; with `styles`, also the escape sequences of their colours."""
        return self._tmux("capture-pane", "-p", "-t", "main", *(["-e"] if styles else []))

    def wait_for(self, pattern: str, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """The first sight of a regular expression (`^` and `$` are ends of lines) on the screen."""
        return self._wait(lambda screen: re.search(pattern, screen, re.MULTILINE), f"no {pattern!r}", deadline_s)

    def wait_without(self, pattern: str, deadline_s: float = DEADLINE_S) -> None:
        self._wait(lambda screen: not re.search(pattern, screen, re.MULTILINE), f"still {pattern!r}", deadline_s)

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-t", "main", "-x", str(columns), "-y", str(rows))

    @property
    def cursor_is_visible(self) -> bool:
        return self._ask("#{cursor_flag}") == "1"

    @property
    def is_alternate(self) -> bool:
        """Whether a program has the whole screen, and gives it back when it ends."""
        return self._ask("#{alternate_on}") == "1"

    @property
    def takes_mouse(self) -> bool:
        return self._ask("#{mouse_any_flag}") == "1"

    def wait_ended(self, deadline_s: float = DEADLINE_S) -> int:
        """The command's exit status."""
        self._wait(lambda _: self.has_ended, "the command runs", deadline_s)
        return int(self._status.read_text())

    @property
    def has_ended(self) -> bool:
        return self._status.exists() and self._status.stat().st_size > 0

    def close(self) -> None:
        """End the server and see it and the command gone."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self._directory)
            pidfds = list(_pidfds([self._server, *_members(self._session)], stack))
            self._tmux("kill-server")
            left = [pidfd for pidfd in pidfds if not _ends(pidfd)]
            for pidfd in left:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert not left, "tmux, or what ran in it, did not go by itself"

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, condition: Callable[[str], object], complaint: str, deadline_s: float) -> re.Match[str]:
        end = time.monotonic() + deadline_s
        while True:
            screen = self.screen()
            if found := condition(screen):
                return found  # type: ignore[return-value]
            if time.monotonic() > end:
                pytest.fail(f"{complaint} within {deadline_s} s on this screen:\n{screen}")
            time.sleep(POLL_S)  # a terminal has no event for what is on it

    def _ask(self, what: str) -> str:
        return self._tmux("display-message", "-p", "-t", "main", what).rstrip("\n")

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-u", "-f", str(self._directory / "tmux.conf"), "-S", str(self._directory / "socket"), *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )
        assert done.returncode == 0, f"tmux {arguments}: {done.stderr}"
        return done.stdout


def _members(session: int) -> Iterator[int]:
    """Processes of a session, which is named by its leader."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                yield int(entry.name)


def _ends(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(DEADLINE_S * 1000))


def _pidfds(pids: Sequence[int], stack: contextlib.ExitStack) -> Iterator[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            yield pidfd
