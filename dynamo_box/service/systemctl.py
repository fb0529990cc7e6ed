"""The calls to systemd, through `systemctl`: it speaks to the right bus, and its words are those that people know."""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.errors import BoxError, NotRunning, TimedOut
from dynamo_box.service.unit import START_TIMEOUT_S, Scope

PROGRAM = "systemctl"
ANSWER_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 8 * 86400.0
"""Above the longest drain that a profile may ask for; systemd bounds the stop by the unit's own limit."""

_LINGER = Path("/var/lib/systemd/linger")
_BOOTED = Path("/run/systemd/system")
"""There when systemd is what runs this machine; see sd_booted(3)."""

_PROPERTIES = (
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "UnitFileState",
    "FragmentPath",
    "MainPID",
    "NRestarts",
    "StatusText",
)


@dataclass(frozen=True)
class UnitState:
    """What systemd says of a unit, in its own words: `active` is active, activating, failed, inactive, …"""

    loaded: bool
    active: str
    sub: str
    result: str
    enabled: bool
    fragment: str
    pid: int | None
    restarts: int
    text: str

    @property
    def is_up(self) -> bool:
        """Whether a start would do nothing: it runs, or is about to."""
        return self.active in ("active", "activating", "reloading")


class Systemctl:
    """systemd of one scope."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def require(self) -> None:
        """Raises:
        NotRunning: there is no systemd to speak to.
        """
        done = self._call("show", "--property=Version")
        if done.returncode:
            raise _unreachable(self._scope, tuple(done.stderr.splitlines()))

    def state(self, name: str) -> UnitState:
        done = self._checked("show", f"--property={','.join(_PROPERTIES)}", "--", f"{name}.service")
        return parse_state(done.stdout)

    def reload(self) -> None:
        self._checked("daemon-reload")

    def enable(self, name: str) -> None:
        self._checked("enable", "--", f"{name}.service")

    def disable(self, name: str) -> None:
        self._checked("disable", "--", f"{name}.service")

    def start(self, name: str) -> None:
        """Returns when the box answers."""
        self._checked("start", "--", f"{name}.service", timeout_s=START_TIMEOUT_S + ANSWER_TIMEOUT_S)

    def restart(self, name: str) -> None:
        """Drains, and returns when the box answers again."""
        self._checked("restart", "--", f"{name}.service", timeout_s=STOP_TIMEOUT_S)

    def stop(self, name: str) -> None:
        """Drains, and returns when nothing is left."""
        self._checked("stop", "--", f"{name}.service", timeout_s=STOP_TIMEOUT_S)

    def forget_failure(self, name: str) -> None:
        """A unit that failed is remembered as failed even without its file."""
        self._call("reset-failed", "--", f"{name}.service")

    def _checked(self, *arguments: str, timeout_s: float = ANSWER_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        done = self._call(*arguments, timeout_s=timeout_s)
        if done.returncode:
            raise BoxError(
                f"systemctl {self._scope.flag} {' '.join(arguments)} failed with status {done.returncode}",
                details=tuple(done.stderr.splitlines()[-10:]),
                remedy=f"`{journal(self._scope, arguments[-1].removesuffix('.service'))}` has what the service said",
            )
        return done

    def _call(self, *arguments: str, timeout_s: float = ANSWER_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        command = [PROGRAM, self._scope.flag, "--no-pager", *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
            )
        except FileNotFoundError as error:
            raise _unreachable(self._scope, ("there is no `systemctl` on PATH",)) from error
        except OSError as error:
            raise _unreachable(self._scope, (f"`systemctl` can't be run: {error.strerror}",)) from error
        except subprocess.TimeoutExpired as error:
            raise TimedOut(f"`{' '.join(command)}` took more than {timeout_s:.0f} s") from error


def parse_state(text: str) -> UnitState:
    """From what `systemctl show` prints."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return UnitState(
        loaded=values.get("LoadState") == "loaded",
        active=values.get("ActiveState", ""),
        sub=values.get("SubState", ""),
        result=values.get("Result", ""),
        enabled=values.get("UnitFileState") == "enabled",
        fragment=values.get("FragmentPath", ""),
        pid=_number(values.get("MainPID", "")) or None,
        restarts=_number(values.get("NRestarts", "")),
        text=values.get("StatusText", ""),
    )


def _number(text: str) -> int:
    """0 where an old systemd says nothing, or `[not set]`."""
    return int(text) if text.isdecimal() else 0


def lingers(linger: Path = _LINGER) -> bool:
    """Whether this user's systemd runs without a login, from boot on. A user without a name has no such choice."""
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return (linger / name).exists()


def ends_with_session(run_dir: Path, linger: Path = _LINGER) -> bool:
    """Whether systemd removes this run dir when the last session of its user ends, and the box with it."""
    return run_dir.is_relative_to("/run/user") and not lingers(linger)


def journal(scope: Scope, name: str) -> str:
    """The command that shows what a service said."""
    return f"journalctl {'--user ' if scope is Scope.USER else ''}-u {name}"


def _unreachable(scope: Scope, details: tuple[str, ...]) -> NotRunning:
    if not _BOOTED.is_dir():
        return NotRunning(
            "this machine isn't run by systemd, so it can't run a service",
            details=details,
            remedy="have whatever starts programs here run `dynbox up --foreground`; --dry-run prints the unit",
        )
    if scope is Scope.SYSTEM:
        return NotRunning("systemd doesn't answer", details=details)
    user = pwd.getpwuid(os.geteuid()).pw_name
    return NotRunning(
        f"systemd of user {user} doesn't answer",
        details=details,
        remedy=f"log in as {user} itself, not with su or sudo; or `loginctl enable-linger {user}` and "
        f"XDG_RUNTIME_DIR=/run/user/{os.geteuid()}",
    )
