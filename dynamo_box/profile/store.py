"""The model store: one directory a model, each an ordinary Hugging Face directory plus `dynbox.json`.

The manifest is the mark of a whole model: it is written last, inside a `.partial-…` directory that is then renamed
into place (`dynamo_box.profile.pull.staging`). So a directory without a readable manifest, or whose files differ
from it in size, is broken: it is listed with the reason and never served. Names that begin with a dot are the
store's own.

Reading the store needs only msgspec and the standard library: every start does it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import msgspec

from dynamo_box.errors import BoxError, UsageError
from dynamo_box.profile.facts import ModelFacts

MANIFEST = "dynbox.json"
MANIFEST_FORMAT = 1
PARTIAL_PREFIX = ".partial-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class StoredFile(msgspec.Struct, frozen=True):
    """`name` is relative to the model's directory, without folders; `sha256` is in hex."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`dynbox.json`. `facts.path` is left out: the store may be moved."""

    format: int = MANIFEST_FORMAT
    name: str
    source: str
    fingerprint: str
    facts: ModelFacts
    files: tuple[StoredFile, ...]
    created: datetime


class StoredModel(msgspec.Struct, frozen=True):
    """A whole model. `fingerprint` (32 hex digits) is over all its files; `source` says where they came from."""

    name: str
    path: Path
    source: str
    fingerprint: str
    facts: ModelFacts
    files: tuple[StoredFile, ...]
    created: datetime

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return sum(file.size for file in self.files)


class BrokenModel(msgspec.Struct, frozen=True):
    """A directory in the store that is not a whole model, and why."""

    name: str
    path: Path
    reason: str


class ModelStore:
    """The models below `root`, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, name: str) -> Path:
        """Where the model of that name lies, or would lie.

        Raises:
            UsageError: no model can have that name.
        """
        return self.root / checked_name(name)

    def find(self, name: str) -> StoredModel | None:
        """The whole model of that name; None if there is none, or only a broken one (`inspect` says why)."""
        entry = self.inspect(name)
        return entry if isinstance(entry, StoredModel) else None

    def inspect(self, name: str) -> StoredModel | BrokenModel | None:
        path = self.path_of(name)
        return _read(path) if path.is_dir() else None

    def list(self) -> tuple[StoredModel | BrokenModel, ...]:
        """All models by name, broken ones among them."""
        try:
            names = sorted(os.listdir(self.root))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise BoxError(
                f"can't read the model store {self.root}: {error.strerror}",
                remedy="check its owner and permissions, or set DYNBOX_HOME",
            ) from error
        return tuple(_read(self.root / name) for name in names if _is_model_directory(self.root, name))

    def remove(self, name: str) -> int:
        """Take the model, whole or broken, out of the store. Returns the bytes of its files.

        Raises:
            BoxError: there is no such model, or it can't be removed.
        """
        path = self.path_of(name)
        if not path.is_dir():
            raise BoxError(f"no model {name!r} in the store {self.root}", remedy="see `dynbox models`")
        with self.lock(name):
            try:
                size = sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
                doomed = self.partial_path(name, "removed")
                path.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                raise BoxError(f"can't remove {path}: {error.strerror}", remedy="check its permissions") from error
        return size

    def partial_path(self, name: str, purpose: str) -> Path:
        """Where the holder of the model's lock keeps what is not, or no longer, part of the store."""
        return self.root / f"{PARTIAL_PREFIX}{checked_name(name)}@{purpose}"

    def partials_of(self, name: str) -> tuple[Path, ...]:
        """What unfinished pulls of that model left. Certainly dead if the caller holds the model's lock."""
        return tuple(self.root.glob(f"{PARTIAL_PREFIX}{checked_name(name)}@*"))

    def names_with_partials(self) -> tuple[str, ...]:
        found = (path.name.removeprefix(PARTIAL_PREFIX) for path in self.root.glob(f"{PARTIAL_PREFIX}*@*"))
        return tuple(sorted({text.partition("@")[0] for text in found}))

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Be the only writer of that model, across processes; the kernel releases it when the holder dies.

        Yields whether it was got: with `wait=False`, False at once if somebody else has it.
        """
        path = self.root / f".lock-{checked_name(name)}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BoxError(
                f"can't write to the model store {self.root}: {error.strerror}",
                remedy="check its owner and permissions, or set DYNBOX_HOME to a directory of your own",
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)


def checked_name(name: str) -> str:
    """`name`, if a model may have it.

    Raises:
        UsageError: it may not.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} can't be a model's name",
            remedy="use at most 96 letters, digits, '.', '-' and '_', beginning with a letter or digit",
        )
    return name


def _is_model_directory(root: Path, name: str) -> bool:
    return NAME.fullmatch(name) is not None and (root / name).is_dir()


def _read(path: Path) -> StoredModel | BrokenModel:
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return BrokenModel(path.name, path, f"has no {MANIFEST}")
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return BrokenModel(path.name, path, f"{MANIFEST} can't be read: {error}")
    if manifest.format != MANIFEST_FORMAT:
        return BrokenModel(path.name, path, f"{MANIFEST} has format {manifest.format}, not {MANIFEST_FORMAT}")
    for file in manifest.files:
        reason = _fault(path, file)
        if reason is not None:
            return BrokenModel(path.name, path, reason)
    return StoredModel(
        name=path.name,
        path=path,
        source=manifest.source,
        fingerprint=manifest.fingerprint,
        facts=msgspec.structs.replace(manifest.facts, name=path.name, path=str(path), fingerprint=manifest.fingerprint),
        files=manifest.files,
        created=manifest.created,
    )


def _fault(path: Path, file: StoredFile) -> str | None:
    if "/" in file.name or file.name in ("", ".", ".."):
        return f"{MANIFEST} names a file outside the model: {file.name!r}"
    try:
        size = (path / file.name).stat().st_size
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    return None if size == file.size else f"{file.name} has {size:,} bytes instead of {file.size:,}"
