"""The text of a unit, from what it shall run. Pure.

The supervisor replaces `dynbox up --foreground` in the same process, so that the main process is the one that notifies
(NotifyAccess=main). It drains and stops its children itself when it gets SIGTERM, and nobody else may be signalled
meanwhile (KillMode=mixed). It restarts what dies below it, whoever killed it (OOMPolicy=continue), and makes a cgroup a
child (Delegate=yes). What systemd adds is a start at boot, and another one after the supervisor's own death.
"""

from __future__ import annotations

import enum
import math
import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_box.errors import ExitCode, UsageError

MARKER = "# Written by `dynbox service install`"
SUFFIX = ".service"

START_TIMEOUT_S = 3600
"""`up` ends a start that makes no progress by itself, so this bounds only what it doesn't watch: a long download."""

STOP_MARGIN_S = 60
"""On top of the drain: every process may need TERM, then KILL, one kind after the other."""

WATCHDOG_S = 30
"""The supervisor gives a sign of life every second; after so long without one it is frozen."""

RESTART_WAIT_S = 5
RESTARTS_AN_HOUR = 5
OPEN_FILES = 65536
"""A connection, and two descriptors a process: far more than a box needs, far less than a leak takes."""

_PLAIN = re.compile(r"[A-Za-z0-9_@/:.,+=-]+")
_NOT_IN_PROGRAMS = frozenset("\"'\\")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}")


class Scope(enum.StrEnum):
    """Whose systemd: that of the user, or that of the machine."""

    USER = "user"
    SYSTEM = "system"

    @property
    def flag(self) -> str:
        return f"--{self}"

    @property
    def wanted_by(self) -> str:
        return "default.target" if self is Scope.USER else "multi-user.target"

    def config_directory(self, environ: Mapping[str, str] = os.environ) -> Path:
        """What systemd calls %E in this scope."""
        if self is Scope.SYSTEM:
            return Path("/etc")
        return Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or Path.home()) / ".config")

    def unit_directory(self, environ: Mapping[str, str] = os.environ) -> Path:
        return self.config_directory(environ) / "systemd" / self

    def environment_file(self, name: str, environ: Mapping[str, str] = os.environ) -> Path:
        """Where a person puts variables for the service: those that the profile reads, secrets among them."""
        return self.config_directory(environ) / "dynbox" / f"{name}.env"


@dataclass(frozen=True)
class ServiceUnit:
    """What a unit is made of. `profile` is a profile's name or absolute path, `python` the absolute path of the
    interpreter; `environment` holds no secrets, since everybody may read units.
    """

    name: str
    scope: Scope
    profile: str
    python: str
    drain_s: float
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        return self.name + SUFFIX

    @property
    def run_dir(self) -> str | None:
        """Where `dynbox` finds the box from outside, if that is not where it looks anyhow."""
        explicit = self.environment.get("DYNBOX_RUN_DIR")
        return explicit or (f"/run/{self.name}" if self.scope is Scope.SYSTEM else None)


def check_name(name: str) -> str:
    """Raises:
    UsageError: systemd takes no such name, or would take it for something else than a plain service.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a service",
            remedy="--name takes letters, digits and `_.-`, with a letter or digit first",
        )
    return name.removesuffix(SUFFIX)


def is_ours(text: str) -> bool:
    """Whether a unit was written here, so that it may be replaced or removed here."""
    return text.startswith(MARKER)


def unit_text(unit: ServiceUnit) -> str:
    """Raises:
    UsageError: a path or a variable that no unit can hold.
    """
    if set(unit.python) & _NOT_IN_PROGRAMS:
        raise UsageError(
            f"systemd starts no program with quotes or backslashes in its path: {unit.python}",
            remedy="install dynamo_box in another directory",
        )
    system = unit.scope is Scope.SYSTEM
    command = [unit.python, "-P", "-m", "dynamo_box", "up", "--foreground", "--profile", unit.profile]
    environment = dict(unit.environment)
    if unit.run_dir is not None:
        environment["DYNBOX_RUN_DIR"] = unit.run_dir
    edit = "systemctl edit" if system else "systemctl --user edit"
    lines = [
        f"{MARKER}, which replaces it without asking; changes belong in a drop-in: `{edit} {unit.name}`.",
        "[Unit]",
        f"Description=dynamo_box, service {unit.name}",
        *(["After=network.target nvidia-persistenced.service"] if system else []),
        "StartLimitIntervalSec=1h",
        f"StartLimitBurst={RESTARTS_AN_HOUR}",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(map(quoted, [':' + command[0], *command[1:]]))}",
        *(f"Environment={quoted(f'{name}={value}')}" for name, value in sorted(environment.items())),
        f"EnvironmentFile=-%E/dynbox/{unit.name}.env",
        *(_system_lines(unit) if system else []),
        "Restart=on-failure",
        f"RestartSec={RESTART_WAIT_S}",
        f"RestartPreventExitStatus={int(ExitCode.USAGE)}",
        f"TimeoutStartSec={START_TIMEOUT_S}",
        f"TimeoutStopSec={math.ceil(unit.drain_s) + STOP_MARGIN_S}",
        f"WatchdogSec={WATCHDOG_S}",
        "KillMode=mixed",
        "OOMPolicy=continue",
        "Delegate=yes",
        f"LimitNOFILE={OPEN_FILES}",
        "LimitMEMLOCK=infinity",
        f"SyslogIdentifier={unit.name}",
        "",
        "[Install]",
        f"WantedBy={unit.scope.wanted_by}",
    ]
    return "\n".join(lines) + "\n"


def _system_lines(unit: ServiceUnit) -> list[str]:
    """`User=` is what makes systemd set HOME in a system unit."""
    lines = [f"User={pwd.getpwuid(0).pw_name}"]
    if "DYNBOX_RUN_DIR" not in unit.environment:
        lines += [f"RuntimeDirectory={unit.name}", "RuntimeDirectoryMode=0700"]
    return lines


def quoted(word: str) -> str:
    """`word` as systemd reads it back from a command line or an `Environment=`: one word, no specifiers.

    A dollar sign stays as it is: the `:` before the program turns substitution off, and `Environment=` has none.

    Raises:
        UsageError: it isn't UTF-8, which no unit can hold.
    """
    if _PLAIN.fullmatch(word):
        return word
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{word!r} is not UTF-8, and a unit has to be", remedy="rename it") from error
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", escaped) + '"'
