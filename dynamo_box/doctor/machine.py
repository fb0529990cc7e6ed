"""Where checks look: files below a root, the run dir and the home of one box.

Small reads that never raise: what can't be read is None, or nothing.
"""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.paths import Home, RunDir

NVIDIA_MODULE = "proc/driver/nvidia/version"


@dataclass(frozen=True)
class Machine:
    """`root` is where /proc, /sys, /dev and the libraries lie."""

    run: RunDir
    home: Home
    root: Path = Path("/")

    def text(self, path: str) -> str | None:
        """Of a file, relative to the root."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return None

    def lines(self, path: str) -> list[str]:
        return (self.text(path) or "").splitlines()

    def number(self, path: str) -> int | None:
        text = (self.text(path) or "").strip()
        return int(text) if text.isdecimal() else None

    @property
    def has_nvidia_driver(self) -> bool:
        return (self.root / NVIDIA_MODULE).exists()


def user_name(uid: int) -> str:
    """The login name; `uid N` for one that has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def owner(path: Path) -> int | None:
    """The uid that a path belongs to, links not followed."""
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def is_ours(path: Path) -> bool:
    return owner(path) == os.getuid()
