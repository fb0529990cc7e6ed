"""Where profiles lie, and what they are called. Reads no file, so that a shell's completion is quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePath

SUFFIXES = (".yaml", ".yml")


@cache
def shipped_directory() -> Path:
    """`dynamo_box/_profiles` in an installation, `profiles/` beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def user_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CONFIG_HOME/dynbox/profiles`, which need not exist."""
    config = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".config")
    return Path(config) / "dynbox" / "profiles"


def profile_files(directory: Path) -> list[Path]:
    """The profiles in a directory, by name."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)


def profile_names(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Shipped and own ones, without a look inside."""
    directories = (shipped_directory(), user_directory(environ))
    return sorted({name_of(path) for directory in directories for path in profile_files(directory)})


def name_of(path: PurePath) -> str:
    """What a profile file's profile is called."""
    return path.name.removesuffix(".yaml").removesuffix(".yml")
