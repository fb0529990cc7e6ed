"""Bring a unit in and out: its file, and what systemd knows of it. Everything that can be refused is refused before
anything is written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.errors import BoxError, UsageError
from dynamo_box.files import replace_text
from dynamo_box.service.systemctl import Systemctl, UnitState, journal
from dynamo_box.service.unit import SUFFIX, ServiceUnit, is_ours, unit_text


@dataclass(frozen=True)
class Installed:
    """`changed`: the file wasn't there like this before. `was_up`: the service ran already."""

    path: Path
    changed: bool
    was_up: bool


def require_ours_or_free(path: Path, state: UnitState) -> None:
    """Raises:
    UsageError: a unit of this name exists that was not written here.
    """
    foreign = path if _exists(path) and not _is_ours(path) else None
    if foreign is None and state.fragment and Path(state.fragment) != path:
        foreign = Path(state.fragment)
    if foreign is not None:
        raise UsageError(
            f"{foreign} is another program's unit", remedy="choose another name with --name, or remove it yourself"
        )


def install(unit: ServiceUnit, directory: Path, systemctl: Systemctl) -> Installed:
    """Write the unit and have it started from now on at boot (or login); it is not started here.

    Raises:
        UsageError: there is another program's unit of that name.
        BoxError: it can't be written, or systemd doesn't take it.
    """
    path = directory / unit.file_name
    text = unit_text(unit)
    before = systemctl.state(unit.name)
    require_ours_or_free(path, before)
    changed = not path.exists() or path.read_text(errors="replace") != text
    if changed:
        _write(path, text)
    systemctl.reload()
    after = systemctl.state(unit.name)
    if not after.loaded:
        path.unlink()
        systemctl.reload()
        if after.fragment:
            raise BoxError(
                "systemd doesn't take the unit",
                remedy=f"`{journal(unit.scope, unit.name)}` says why; it may be older than version 244",
            )
        raise BoxError(
            f"systemd doesn't read units from {directory}",
            remedy="its own XDG_CONFIG_HOME differs from this shell's: `systemctl --user show-environment`",
        )
    systemctl.enable(unit.name)
    return Installed(path, changed, before.is_up)


def remove(name: str, directory: Path, systemctl: Systemctl) -> Path | None:
    """Stop, disable and delete; the path that is gone now, None if there was none.

    Raises:
        UsageError: the unit of that name is another program's.
    """
    path = directory / f"{name}{SUFFIX}"
    if not _exists(path):
        return None
    if not _is_ours(path):
        raise UsageError(f"{path} was not written by `dynbox service install`", remedy="remove it yourself")
    systemctl.stop(name)
    systemctl.disable(name)
    path.unlink(missing_ok=True)
    systemctl.reload()
    systemctl.forget_failure(name)
    return path


def installed_names(directory: Path) -> list[str]:
    """The services that were installed here, by name."""
    return sorted(path.name.removesuffix(SUFFIX) for path in directory.glob(f"*{SUFFIX}") if _is_ours(path))


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _is_ours(path: Path) -> bool:
    """A link (a masked unit is one, to /dev/null) is nobody's file to replace, nor is what can't be read."""
    try:
        return path.is_file() and not path.is_symlink() and is_ours(path.read_text(errors="replace"))
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    """Raises:
    BoxError: the directory can't be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise BoxError(
            f"can't write {path}: {error.strerror}",
            remedy=f"see that you may write to {path.parent}, and that it has room",
        ) from error
