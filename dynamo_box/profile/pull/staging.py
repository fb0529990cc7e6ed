"""Building a model beside the store and putting it in with one rename.

Whoever holds a model's lock is the only one who writes it, so anything else with its name on it is left over from
a pull that died, and is removed. Everything is on disk (fsync) before the rename that makes it visible.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

import msgspec

from dynamo_box.errors import BoxError
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.store import MANIFEST, BrokenModel, Manifest, ModelStore, StoredFile, StoredModel

READ_BYTES = 1 << 20
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Staging:
    """Two empty directories on the store's disk: `model` is to become the model, `scratch` is thrown away."""

    name: str
    model: Path
    scratch: Path


@contextmanager
def staging(store: ModelStore, name: str) -> Iterator[Staging]:
    """Gone afterwards, but for what was committed. Needs the model's lock.

    Raises:
        BoxError: for any failure to read or write: disk full, permissions, read-only.
    """
    try:
        _remove_leftovers(store, name)
        path = store.partial_path(name, str(os.getpid()))
        stage = Staging(name, path / "model", path / "scratch")
        stage.model.mkdir(parents=True)
        stage.scratch.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise _storage_error(store.root, error) from error


def _remove_leftovers(store: ModelStore, name: str) -> None:
    """Of this model, and of any other that nobody is pulling now."""
    for path in store.partials_of(name):
        shutil.rmtree(path)
    for other in store.names_with_partials():
        with store.lock(other, wait=False) as dead:
            for path in store.partials_of(other) if dead else ():
                shutil.rmtree(path)


def commit(store: ModelStore, stage: Staging, *, source: str, facts: ModelFacts) -> StoredModel:
    """Hash, describe and sync what was staged, and make it the model. A broken one of that name goes."""
    staged, name = stage.model, stage.name
    files = tuple(_stored_file(path) for path in sorted(staged.iterdir()))
    fingerprint = _fingerprint(files)
    manifest = Manifest(
        name=name,
        source=source,
        fingerprint=fingerprint,
        facts=msgspec.structs.replace(facts, name=name, source=source, path=None, fingerprint=fingerprint),
        files=files,
        created=datetime.now(UTC).replace(microsecond=0),
    )
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    with (staged / MANIFEST).open("xb") as file:
        file.write(text)
        os.fsync(file.fileno())
    _sync_directory(staged)
    target = store.path_of(name)
    if target.exists():
        replaced = store.partial_path(name, "replaced")
        target.rename(replaced)
        shutil.rmtree(replaced)
    staged.rename(target)
    _sync_directory(store.root)
    model = store.inspect(name)
    if not isinstance(model, StoredModel):
        reason = model.reason if isinstance(model, BrokenModel) else "it is gone"
        raise BoxError(f"{name} went into the store but can't be read back: {reason}", remedy="check the disk")
    return model


def require_space(directory: Path, needed: int) -> None:
    """Refuse before the work what would fail after it.

    Raises:
        BoxError: fewer than `needed` bytes, and a little to spare, are free on that disk.
    """
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed + SPARE_BYTES:
        raise BoxError(
            f"not enough room on the store's disk: {_mib(needed + SPARE_BYTES)} needed, {_mib(free)} free",
            remedy="free some (`dynbox models` lists the store), or set DYNBOX_HOME to another disk",
        )


def _storage_error(root: Path, error: OSError) -> BoxError:
    """With what a person can do about it."""
    where = error.filename or root
    what = f"{where}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BoxError(what, remedy="free some space, or set DYNBOX_HOME to another disk")
    return BoxError(what, remedy="check its owner and permissions, or set DYNBOX_HOME to a directory of your own")


def _stored_file(path: Path) -> StoredFile:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
        os.fsync(file.fileno())
        return StoredFile(path.name, file.tell(), digest.hexdigest())


def _fingerprint(files: tuple[StoredFile, ...]) -> str:
    """32 hex digits over names, sizes and contents of all files."""
    return blake2b(msgspec.msgpack.encode(files), digest_size=16).hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
