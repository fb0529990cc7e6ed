"""The manifest of a snapshot: what it is of, size and checksum of each shard. It carries its own checksum."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import msgspec

from dynamo_box.gms.snapshot_bytes import Stream, read_fully
from dynamo_box.gms.snapshot_directories import MANIFEST, SnapshotDamaged, regular_file
from dynamo_box.protocol.gms import Allocation, Entry, EpochRecord

VERSION = 1
_MAX_MANIFEST_BYTES = 256 << 20


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    crc32c: int


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    layout: str
    content: str
    layout_hash: str
    epoch: int
    allocations: tuple[Allocation, ...]
    entries: tuple[Entry, ...]
    shards: tuple[Shard, ...]


class _Versioned(msgspec.Struct, frozen=True):
    """What every version of a body has."""

    version: int


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: `checksum` is of the bytes of `body`, as they are written."""

    checksum: str
    body: msgspec.Raw


def encode(record: EpochRecord, shards: tuple[Shard, ...]) -> bytes:
    body = msgspec.json.encode(
        _Body(
            VERSION,
            record.layout,
            record.content,
            record.layout_hash,
            record.epoch,
            record.allocations,
            record.entries,
            shards,
        )
    )
    return msgspec.json.encode(_Sealed(_checksum(body), msgspec.Raw(body)))


def read_manifest(folder: int, directory: Path, record: EpochRecord) -> tuple[_Body, int]:
    """What `directory` says it holds, if that is `record` and adds up; and the size of the manifest itself."""
    path = directory / MANIFEST
    with regular_file(folder, directory, MANIFEST) as (descriptor, size):
        if size > _MAX_MANIFEST_BYTES:
            raise SnapshotDamaged(path, f"{size} bytes are no manifest")
        content = bytearray(size)
        try:
            read_fully(descriptor, memoryview(content), 0)
        except OSError as error:
            raise SnapshotDamaged(path, f"can't be read: {error}") from error
    try:
        sealed = msgspec.json.decode(content, type=_Sealed)
        if sealed.checksum != _checksum(sealed.body):
            raise SnapshotDamaged(path, "its checksum is wrong")
        version = msgspec.json.decode(sealed.body, type=_Versioned).version
        if version != VERSION:
            raise SnapshotDamaged(path, f"version {version}, and this is a reader of version {VERSION}")
        body = msgspec.json.decode(sealed.body, type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotDamaged(path, f"is no manifest: {error}") from error
    for what in ("layout", "content", "layout_hash", "allocations", "entries"):
        found, expected = getattr(body, what), getattr(record, what)
        if found != expected:
            words = f": {found!r}, not {expected!r}" if isinstance(found, str) else ""
            raise SnapshotDamaged(path, f"is of another {what.replace('_', ' ')}{words}")
    if sum(shard.size for shard in body.shards) != Stream(record).bytes:
        raise SnapshotDamaged(path, "its shards don't add up to the layout")
    return body, size


def _checksum(body: bytes | msgspec.Raw) -> str:
    return blake2b(bytes(body), digest_size=16).hexdigest()
