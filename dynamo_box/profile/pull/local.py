"""A Hugging Face directory on this machine → the staging directory."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from dynamo_box.profile.checkpoint import facts_of
from dynamo_box.profile.pull.progress import Progress
from dynamo_box.profile.pull.staging import require_space
from dynamo_box.profile.store import MANIFEST

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt")
COPY_BYTES = 8 << 20


def import_directory(source: Path, into: Path, progress: Progress) -> None:
    """Bring what belongs to the model from `source` into `into`, after checking that it is whole.

    Weights are hard links where that is possible (same disk), else copies; so files of `source` may be replaced
    later, but not changed in place. Links are followed: the hub's cache is made of them.

    Raises:
        BoxError: `source` is not a whole model in safetensors.
    """
    facts_of(source, name=into.name, source=str(source))
    files = sorted(path for path in source.iterdir() if _belongs(path))
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        target = into / path.name
        if not (path.suffix == ".safetensors" and _linked(path.resolve(), target)):
            require_space(into, path.stat().st_size)
            _copy(path, target, done, total, progress)
        done += target.stat().st_size
        progress("copying", done, total, "bytes")


def _belongs(path: Path) -> bool:
    wanted = any(fnmatch(path.name, pattern) for pattern in WANTED) and not path.name.startswith(".")
    return wanted and path.name != MANIFEST and path.is_file()


def _linked(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:  # another disk, a file system without links, or a file of somebody else's
        return False
    return True


def _copy(path: Path, target: Path, done: int, total: int, progress: Progress) -> None:
    with path.open("rb") as original, target.open("xb") as copy:
        while block := original.read(COPY_BYTES):
            copy.write(block)
            progress("copying", done + copy.tell(), total, "bytes")
    shutil.copymode(path, target)
