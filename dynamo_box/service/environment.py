"""What the service's environment will be: not that of the shell in which it is installed.

A profile that reads a variable loads here and would fail at the next boot; so it is checked against this one.
"""

from __future__ import annotations

import os
import pwd
import shlex
from collections.abc import Mapping
from pathlib import Path

from dynamo_box.errors import UsageError

KEPT = (
    "DYN_KVBM_CPU_CACHE_GB",
    "DYN_KVBM_DISK_CACHE_DIR",
    "DYN_KVBM_DISK_CACHE_GB",
    "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY",
    "DYNBOX_HOME",
    "DYNBOX_LOG_LEVEL",
    "DYNBOX_PORT",
    "DYNBOX_RUN_DIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
)
"""Where things are, which port, and how large KV tiers are; nothing here is a secret. Everything else comes from the
environment file.
"""

_PATHS = frozenset(name for name in KEPT if name.startswith("XDG_")) | {
    "DYNBOX_HOME",
    "DYNBOX_RUN_DIR",
    "DYN_KVBM_DISK_CACHE_DIR",
}


def kept(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of the shell's environment goes into the unit; paths become absolute, as a service starts elsewhere."""
    found = {name: environ[name] for name in KEPT if environ.get(name)}
    return {name: str(Path(value).absolute()) if name in _PATHS else value for name, value in found.items()}


def of_service(unit_environment: Mapping[str, str], file: Path) -> dict[str, str]:
    """Everything that the service will surely find set.

    Raises:
        UsageError: the environment file can't be read.
    """
    account = pwd.getpwuid(os.geteuid())
    login = {"HOME": os.environ.get("HOME") or account.pw_dir, "USER": account.pw_name, "LOGNAME": account.pw_name}
    return login | dict(unit_environment) | read_environment_file(file)


def read_environment_file(file: Path) -> dict[str, str]:
    """`NAME=value` lines, values quoted as in a shell, as systemd reads them; none if there is no such file.

    Raises:
        UsageError: it can't be read, or a line is something else.
    """
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} can't be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith(("#", ";")):
            continue
        name, equals, value = line.partition("=")
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise UsageError(f"{file}:{number}: {error}") from error
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"{file}:{number}: not NAME=value", remedy="one variable a line, as in a shell")
        found[name.strip()] = " ".join(words)
    return found
