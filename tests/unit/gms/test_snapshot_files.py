"""Snapshots on disk: what was saved comes back; what is damaged, of something else or half-written never does."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec
import pytest
from fakes.memory_files import Maker, close_all, contents, filled, nothing_left_open, small_file_system

from dynamo_box.gms import snapshot_files
from dynamo_box.gms.copying import MoveFailed, MoveStopped, OutOfMemory
from dynamo_box.gms.snapshot_directories import SnapshotDamaged, clean, directory_of
from dynamo_box.gms.snapshot_files import DiskFull, load, save, verify
from dynamo_box.protocol.gms import Allocation, Entry, EpochRecord

STEP = 2 << 20
SIZES = (2 * STEP, STEP, STEP)
SHARD_BYTES = 2_400_000
"""Four shards, at no border of an allocation or of a page; an allocation lies in two of them."""
SHARDS = 4


def record_of(layout: str = "smollm2", content: str = "sha256:one", sizes: tuple[int, ...] = SIZES) -> EpochRecord:
    return EpochRecord(
        layout=layout,
        epoch=3,
        layout_hash=f"hash of {content}",
        content=content,
        place="device",
        allocations=tuple(Allocation(10 + number, size) for number, size in enumerate(sizes)),
        entries=(
            Entry("model.embed", 10, 0, "float32", (100, 20), (20, 1), 8000),
            Entry("ünïcode/../name", 12, 64, "bfloat16", (), (), 2),
        ),
    )


RECORD = record_of()
NEWER = record_of(content="sha256:two")


class Weights:
    """Memory files with the bytes of a record."""

    def __init__(self, seed: int, sizes: tuple[int, ...] = SIZES) -> None:
        self.sizes = sizes
        self.descriptors = [filled(size, seed * 100 + number) for number, size in enumerate(sizes)]

    @property
    def bytes(self) -> list[bytes]:
        return [contents(one, size) for one, size in zip(self.descriptors, self.sizes, strict=True)]


@pytest.fixture
def weights() -> Iterator[Weights]:
    made = Weights(1)
    yield made
    close_all(made.descriptors)


@pytest.fixture
def newer() -> Iterator[Weights]:
    made = Weights(2)
    yield made
    close_all(made.descriptors)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "snapshots"


@pytest.fixture
def saved(root: Path, weights: Weights) -> Path:
    directory = directory_of(root, RECORD.layout)
    save(directory, RECORD, weights.descriptors, shard_bytes=SHARD_BYTES)
    return directory


def loaded(directory: Path, record: EpochRecord) -> list[bytes]:
    """Bytes of each allocation, as they come back."""
    descriptors = load(directory, record, Maker())
    sizes = [allocation.size for allocation in record.allocations]
    found = [contents(one, size) for one, size in zip(descriptors, sizes, strict=True)]
    close_all(descriptors)
    return found


def refused(directory: Path, record: EpochRecord, *, allocates: bool = False) -> str:
    """Why both `verify` and `load` refuse it. Nothing may be left open, and nothing be made unless `allocates`."""
    with nothing_left_open():
        with pytest.raises(SnapshotDamaged) as by_verify:
            verify(directory, record)
        make = Maker()
        with pytest.raises(SnapshotDamaged) as by_load:
            load(directory, record, make)
    assert bool(make.asked) == allocates
    assert str(by_verify.value) == str(by_load.value)
    return str(by_verify.value)


# What comes back


def test_what_was_saved_comes_back(root: Path, weights: Weights) -> None:
    directory = directory_of(root, RECORD.layout)
    with nothing_left_open():
        result = save(directory, RECORD, weights.descriptors, shard_bytes=SHARD_BYTES)
        assert verify(directory, RECORD) == result.bytes
        assert loaded(directory, RECORD) == weights.bytes
    assert result.bytes == sum(SIZES) + (directory / "manifest.json").stat().st_size
    assert list(result.phases) == ["write", "verify"]
    assert len(list(directory.glob("shard-*.bin"))) == SHARDS
    assert os.listdir(root) == [directory.name]


@pytest.mark.parametrize(
    "sizes",
    [(), (1,), (0, 5, 0), (STEP,), (10 * STEP,), (5 * STEP, STEP, 4 * STEP), (STEP,) * 20, (4095, 1, 4096, 70_001)],
)
def test_any_sizes_come_back(root: Path, sizes: tuple[int, ...]) -> None:
    weights, record = Weights(3, sizes), record_of(sizes=sizes)
    directory = directory_of(root, record.layout)
    for shard_bytes in (SHARD_BYTES, STEP, snapshot_files.SHARD_BYTES):
        save(directory, record, weights.descriptors, shard_bytes=shard_bytes)
        assert loaded(directory, record) == weights.bytes
    close_all(weights.descriptors)


def test_the_epoch_and_the_place_may_differ(saved: Path, weights: Weights) -> None:
    later = msgspec.structs.replace(RECORD, epoch=9, place="disk", snapshot=str(saved))
    assert loaded(saved, later) == weights.bytes


def test_only_this_user_can_read_it(saved: Path) -> None:
    assert stat.S_IMODE(saved.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()} == {0o600}


def test_a_new_snapshot_replaces_the_old(saved: Path, newer: Weights) -> None:
    with nothing_left_open():
        save(saved, NEWER, newer.descriptors, shard_bytes=SHARD_BYTES)
    assert loaded(saved, NEWER) == newer.bytes
    assert "another content" in refused(saved, RECORD)
    assert os.listdir(saved.parent) == [saved.name]


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        pages = (len(mapping) + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        vector = (ctypes.c_ubyte * pages)()
        pointer = ctypes.c_char.from_buffer(mapping)
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(pointer)), ctypes.c_size_t(len(mapping)), vector)
        del pointer
        assert result == 0, os.strerror(ctypes.get_errno())
        return sum(one & 1 for one in vector) * mmap.PAGESIZE


def test_the_files_do_not_stay_in_memory(saved: Path) -> None:
    """Else a model on disk would go on taking the memory that it gave back."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", saved], capture_output=True, text=True, check=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.skip("temporary files are memory here")
    shards = sorted(saved.glob("shard-*.bin"))
    assert [resident_bytes(shard) for shard in shards] == [0] * SHARDS
    loaded(saved, RECORD)
    assert [resident_bytes(shard) for shard in shards] == [0] * SHARDS


@pytest.mark.parametrize(
    "layout", ["../../etc/passwd", "a/b", ".", "", "\0", "x" * 200, "語" * 200, "Smollm2", "smollm2 ", ".hidden"]
)
def test_any_layout_has_a_directory_of_its_own_in_the_root(layout: str, root: Path) -> None:
    directory = directory_of(root, layout)
    assert directory.parent == root
    assert len(directory.name) <= 60
    assert directory.name.isascii()
    assert not directory.name.startswith(".")
    assert directory != directory_of(root, "smollm2")


# What is refused


def flip(path: Path, bit: int) -> None:
    """In place: twice is as before."""
    with path.open("r+b", buffering=0) as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("number", range(SHARDS))
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_in_a_shard_is_found(saved: Path, number: int, where: str) -> None:
    shard = saved / f"shard-{number:05}.bin"
    bits = shard.stat().st_size * 8
    flip(shard, {"first": 0, "middle": bits // 2, "last": bits - 1}[where])
    assert f"{shard}: its checksum is" in refused(saved, RECORD, allocates=True)


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(saved: Path) -> None:
    manifest = saved / "manifest.json"
    for bit in range(manifest.stat().st_size * 8):
        flip(manifest, bit)
        with pytest.raises(SnapshotDamaged, match=r"manifest\.json"):
            verify(saved, RECORD)
        flip(manifest, bit)
    verify(saved, RECORD)


@pytest.mark.parametrize("number", range(SHARDS))
@pytest.mark.parametrize("bytes_more", [-1, 1, None])
def test_a_shard_of_another_length_is_found_before_anything_is_made(
    saved: Path, number: int, bytes_more: int | None
) -> None:
    shard = saved / f"shard-{number:05}.bin"
    size = shard.stat().st_size
    os.truncate(shard, 0 if bytes_more is None else size + bytes_more)
    assert f"{shard}: has " in refused(saved, RECORD)


@pytest.mark.parametrize("number", range(SHARDS))
def test_a_missing_shard_is_found_before_anything_is_made(saved: Path, number: int) -> None:
    (saved / f"shard-{number:05}.bin").unlink()
    assert refused(saved, RECORD) == f"{saved}/shard-{number:05}.bin: is missing"


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_manifest_is_refused(saved: Path, length: int) -> None:
    manifest = saved / "manifest.json"
    os.truncate(manifest, length if length >= 0 else manifest.stat().st_size + length)
    assert "is no manifest" in refused(saved, RECORD)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"checksum":"","body":{}}'])
def test_a_manifest_that_is_none_is_refused(saved: Path, content: bytes) -> None:
    (saved / "manifest.json").write_bytes(content)
    assert "manifest.json" in refused(saved, RECORD)


def test_there_is_no_snapshot(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    assert refused(saved, RECORD).endswith("manifest.json: is missing")
    absent = directory_of(saved.parent, "absent")
    assert refused(absent, RECORD) == f"{absent}: is missing"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (msgspec.structs.replace(RECORD, layout="llama"), "another layout: 'smollm2', not 'llama'"),
        (msgspec.structs.replace(RECORD, content="sha256:two"), "another content: 'sha256:one', not 'sha256:two'"),
        (msgspec.structs.replace(RECORD, layout_hash="other"), "another layout hash"),
        (msgspec.structs.replace(RECORD, allocations=RECORD.allocations[:2]), "another allocations"),
        (
            msgspec.structs.replace(RECORD, allocations=(Allocation(10, SIZES[0] + 1), *RECORD.allocations[1:])),
            "another allocations",
        ),
        (msgspec.structs.replace(RECORD, entries=RECORD.entries[:1]), "another entries"),
    ],
)
def test_a_snapshot_of_something_else_is_refused(saved: Path, other: EpochRecord, words: str) -> None:
    assert words in refused(saved, other)


def test_the_snapshot_of_another_model_in_its_place_is_refused(saved: Path, newer: Weights) -> None:
    other = record_of("llama")
    place = directory_of(saved.parent, "llama")
    save(place, other, newer.descriptors, shard_bytes=SHARD_BYTES)
    shutil.rmtree(saved)
    place.rename(saved)
    assert "another layout" in refused(saved, RECORD)


def test_a_shard_of_another_snapshot_is_refused(saved: Path, newer: Weights) -> None:
    place = directory_of(saved.parent, "llama")
    save(place, record_of("llama"), newer.descriptors, shard_bytes=SHARD_BYTES)
    (place / "shard-00001.bin").rename(saved / "shard-00001.bin")
    assert "shard-00001.bin: its checksum is" in refused(saved, RECORD, allocates=True)


def rewrite(directory: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Another manifest with a right checksum, as an attacker or another version would write it."""
    manifest = directory / "manifest.json"
    body = json.loads(manifest.read_bytes())["body"]
    change(body)
    text = json.dumps(body)
    checksum = blake2b(text.encode(), digest_size=16).hexdigest()
    manifest.write_text(f'{{"checksum":"{checksum}","body":{text}}}')


def test_the_tool_of_these_tests_writes_what_is_accepted(saved: Path) -> None:
    rewrite(saved, lambda body: None)
    verify(saved, RECORD)


@pytest.mark.parametrize("version", [0, 2, -1, 10**30, "1", None])
def test_an_unknown_version_is_refused(saved: Path, version: object) -> None:
    rewrite(saved, lambda body: body.update(version=version, of_the_future=True))
    assert "manifest.json: " in refused(saved, RECORD)


@pytest.mark.parametrize(
    "shards",
    [
        [],
        [{"size": sum(SIZES), "crc32c": 0}],
        [{"size": -1, "crc32c": 0}, {"size": sum(SIZES) + 1, "crc32c": 0}],
        [{"size": 1, "crc32c": 0}] * SHARDS,
        [{"size": sum(SIZES), "crc32c": 0, "file": "../../secret"}],
        [{"size": 0, "crc32c": 0}] * 100_000,
    ],
)
def test_shards_that_do_not_fit_are_refused(saved: Path, shards: list[dict[str, object]]) -> None:
    rewrite(saved, lambda body: body.update(shards=shards))
    refused(saved, RECORD)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.bin"])
def test_links_pipes_and_directories_are_refused_without_waiting(saved: Path, tmp_path: Path, name: str) -> None:
    path = saved / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert f"{path}: can't be opened" in refused(saved, RECORD)
    path.unlink()
    os.mkfifo(path)
    assert f"{path}: is not a file of this user" in refused(saved, RECORD)
    path.unlink()
    path.mkdir()
    assert f"{path}: is not a file of this user" in refused(saved, RECORD)


def test_a_directory_that_others_could_have_written_is_refused(saved: Path, tmp_path: Path) -> None:
    saved.chmod(0o770)
    assert "is not this user's alone to write" in refused(saved, RECORD)
    saved.chmod(0o700)
    moved = tmp_path / "moved"
    saved.rename(moved)
    saved.symlink_to(moved)
    assert "can't be opened" in refused(saved, RECORD)
    saved.unlink()
    saved.write_text("a file")
    assert "can't be opened" in refused(saved, RECORD)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "manifest.json", "shard-00002.bin"])
def test_files_of_another_user_are_refused(saved: Path, name: str) -> None:
    os.chown(saved / name, 65534, 65534)
    assert "this user" in refused(saved, RECORD)


def test_a_disk_that_cannot_read_is_damage(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("shard-00001.bin"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert "shard-00001.bin: can't be read" in refused(saved, RECORD, allocates=True)


def test_short_reads_and_writes_are_carried_on(root: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write, place = os.preadv, os.write, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:10_001]], offset))
    monkeypatch.setattr(os, "write", lambda fd, view: write(fd, view[:7_777]))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: place(fd, view[:5_555], offset))
    directory = directory_of(root, RECORD.layout)
    save(directory, RECORD, weights.descriptors, shard_bytes=SHARD_BYTES)
    assert loaded(directory, RECORD) == weights.bytes


# Loading without memory


@pytest.mark.parametrize("fails_at", range(len(SIZES)))
@pytest.mark.parametrize("error", [MemoryError("the budget is used up"), OSError(errno.ENOMEM, "no memory")])
def test_memory_that_cannot_be_had_undoes_a_load(saved: Path, fails_at: int, error: Exception) -> None:
    with nothing_left_open(), pytest.raises(OutOfMemory) as failure:
        load(saved, RECORD, Maker(fails_at, error))
    assert failure.value.__cause__ is error
    verify(saved, RECORD)


def test_memory_that_runs_out_while_it_is_filled_undoes_a_load(saved: Path, tmp_path: Path) -> None:
    """Of each allocation of 2 or 4 MiB the file system has room for the first."""
    with small_file_system(tmp_path / "memory", "5m") as memory:

        def make(number: int, size: int) -> int:
            descriptor = os.open(memory / str(number), os.O_RDWR | os.O_CREAT)
            os.ftruncate(descriptor, size)
            return descriptor

        with nothing_left_open(), pytest.raises(OutOfMemory):
            load(saved, RECORD, make)


def test_what_was_loaded_can_be_sealed(saved: Path) -> None:
    """No map that could write is left."""

    def make(number: int, size: int) -> int:
        descriptor = os.memfd_create(f"made {number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        return descriptor

    descriptors = load(saved, RECORD, make)
    for descriptor in descriptors:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    close_all(descriptors)


def test_a_file_system_without_direct_reads_serves_too(
    saved: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without(path: str, flags: int, *more: int, **options: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", without)
    assert loaded(saved, RECORD) == weights.bytes


@pytest.mark.parametrize("asked", range(SHARDS))
def test_load_and_verify_can_be_stopped(saved: Path, asked: int) -> None:
    for act in (lambda stop: load(saved, RECORD, Maker(), stop=stop), lambda stop: verify(saved, RECORD, stop=stop)):
        left = iter([False] * asked)
        with nothing_left_open(), pytest.raises(MoveStopped):
            act(lambda left=left: next(left, True))


# Saving that fails


def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: int) -> Callable[[], int]:
    """Let call number `at` of `os.<name>` fail; how many calls there were."""
    real, calls = getattr(os, name), itertools.count()
    made: list[int] = []

    def call(*args: object, **options: object) -> object:
        number = next(calls)
        made.append(number)
        if number == at:
            raise OSError(error, os.strerror(error))
        return real(*args, **options)

    monkeypatch.setattr(os, name, call)
    return lambda: len(made)


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("write", errno.ENOSPC, DiskFull),
        ("write", errno.EDQUOT, DiskFull),
        ("write", errno.EFBIG, DiskFull),
        ("write", errno.EIO, MoveFailed),
        ("fsync", errno.ENOSPC, DiskFull),
        ("fsync", errno.EIO, MoveFailed),
        ("rename", errno.EIO, MoveFailed),
        ("mkdir", errno.ENOSPC, DiskFull),
        ("posix_fadvise", errno.EINVAL, MoveFailed),
        ("preadv", errno.EIO, MoveFailed),
    ],
)
def test_a_save_that_fails_at_any_call_leaves_what_was_there(
    saved: Path, weights: Weights, newer: Weights, name: str, error: int, expected: type[MoveFailed]
) -> None:
    for at in itertools.count(1 if name == "mkdir" else 0):  # the first one finds the root there, and may fail
        with pytest.MonkeyPatch.context() as patch:
            calls = failing(patch, name, at, error)
            try:
                with nothing_left_open():
                    save(saved, NEWER, newer.descriptors, shard_bytes=SHARD_BYTES)
            except MoveFailed as failure:
                assert isinstance(failure, expected)
            else:
                assert at >= calls() > 0
                break
        assert os.listdir(saved.parent) == [saved.name], f"{name} number {at}"
        assert loaded(saved, RECORD) == weights.bytes
    assert loaded(saved, NEWER) == newer.bytes


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_file_system(tmp_path / "disk", "9m") as disk, nothing_left_open():
        directory = directory_of(disk, RECORD.layout)
        monkeypatch.setattr(os, "write", lambda *_: pytest.fail("wrote"))
        with pytest.raises(DiskFull, match=r"has [\d.]+ MiB free, and the snapshot takes [\d.]+ MiB"):
            save(directory, RECORD, weights.descriptors)
        assert os.listdir(disk) == []


def test_a_disk_that_fills_up_meanwhile_is_left_as_it_was(
    tmp_path: Path, weights: Weights, newer: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two snapshots don't fit on it: the second save meets a real ENOSPC, since it is told that there is room."""
    with small_file_system(tmp_path / "disk", "12m") as disk, nothing_left_open():
        directory = directory_of(disk, RECORD.layout)
        monkeypatch.setattr(snapshot_files, "_check_space", lambda *_: None)
        save(directory, RECORD, weights.descriptors, shard_bytes=SHARD_BYTES)
        with pytest.raises(DiskFull):
            save(directory, NEWER, newer.descriptors, shard_bytes=SHARD_BYTES)
        assert os.listdir(disk) == [directory.name]
        assert loaded(directory, RECORD) == weights.bytes


def test_what_the_disk_gives_back_is_compared_before_it_counts(
    saved: Path, weights: Weights, newer: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a bit of what it was given."""
    real = os.write

    def write(descriptor: int, view: memoryview) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("shard-00002.bin"):
            view = memoryview(bytes([view[0] ^ 1]) + bytes(view[1:]))
        return real(descriptor, view)

    monkeypatch.setattr(os, "write", write)
    with nothing_left_open(), pytest.raises(SnapshotDamaged, match=r"shard-00002\.bin: its checksum is"):
        save(saved, NEWER, newer.descriptors, shard_bytes=SHARD_BYTES)
    assert os.listdir(saved.parent) == [saved.name]
    assert loaded(saved, RECORD) == weights.bytes


def test_memory_that_is_too_short_is_not_saved(root: Path, weights: Weights) -> None:
    os.ftruncate(weights.descriptors[2], SIZES[2] - 1)
    with nothing_left_open(), pytest.raises(MoveFailed, match="allocation 2 has less than its"):
        save(directory_of(root, RECORD.layout), RECORD, weights.descriptors)
    assert os.listdir(root) == []


def test_save_can_be_stopped_at_any_time(saved: Path, weights: Weights, newer: Weights) -> None:
    """While it writes, and while it reads back."""
    for asked in range(2 * SHARDS):
        left = iter([False] * asked)
        with nothing_left_open(), pytest.raises(MoveStopped):
            save(saved, NEWER, newer.descriptors, shard_bytes=SHARD_BYTES, stop=lambda left=left: next(left, True))
        assert os.listdir(saved.parent) == [saved.name]
        assert loaded(saved, RECORD) == weights.bytes


def test_what_is_not_ours_is_neither_replaced_nor_removed(root: Path, weights: Weights) -> None:
    directory = directory_of(root, RECORD.layout)
    directory.mkdir(parents=True)
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(MoveFailed, match="is no snapshot of ours"):
        save(directory, RECORD, weights.descriptors)
    assert clean(root, []) == []
    assert (directory / "thesis.txt").read_text() == "years of work"


# Killed while saving


def killed_at(at: int, act: Callable[[], object]) -> bool:
    """Run `act` in a child that is killed just before system call number `at` that changes the disk; False: it was
    done before.
    """
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def deadly(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                if next(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        for name in ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        try:
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def state_of(directory: Path) -> str:
    """Which snapshot is accepted."""
    for name, record in (("old", RECORD), ("new", NEWER)):
        try:
            verify(directory, record)
        except SnapshotDamaged:
            continue
        return name
    return "none"


@pytest.mark.slow
def test_a_kill_at_any_call_leaves_the_old_or_the_new_or_none_and_the_rest_is_cleaned_up(
    saved: Path, weights: Weights, newer: Weights
) -> None:
    seen: list[str] = []
    for at in itertools.count():
        killed = killed_at(at, lambda: save(saved, NEWER, newer.descriptors, shard_bytes=SHARD_BYTES))
        seen.append(state_of(saved))
        clean(saved.parent, [RECORD.layout])
        assert set(os.listdir(saved.parent)) <= {saved.name}, f"call {at}"
        assert state_of(saved) == seen[-1]
        if not killed:
            break
        if seen[-1] != "old":
            save(saved, RECORD, weights.descriptors, shard_bytes=SHARD_BYTES)
    assert [state for state, _ in itertools.groupby(seen)] == ["old", "none", "new"]
    assert seen.count("none") == 1  # between the two renames
    assert len(seen) >= 30


def test_a_kill_while_cleaning_up_leaves_nothing_that_is_accepted(saved: Path, weights: Weights) -> None:
    for at in itertools.count():
        killed = killed_at(at, lambda: clean(saved.parent, []))
        assert state_of(saved) in ("none", "old")
        clean(saved.parent, [])
        assert os.listdir(saved.parent) == []
        if not killed:
            break
        save(saved, RECORD, weights.descriptors, shard_bytes=SHARD_BYTES)
    assert at > SHARDS


SAVES_FOR_EVER = """
import sys
from pathlib import Path
import msgspec
from dynamo_box.gms.snapshot_files import save
from dynamo_box.protocol.gms import EpochRecord
directory, records, descriptors = Path(sys.argv[1]), sys.argv[2:4], [int(one) for one in sys.argv[4:]]
both = [msgspec.json.decode(one, type=EpochRecord) for one in records]
half = len(descriptors) // 2
while True:
    for record, its in zip(both, (descriptors[:half], descriptors[half:])):
        save(directory, record, its, shard_bytes=2_400_000)
        print(".", flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_time_of_a_process_that_saves(saved: Path, weights: Weights, newer: Weights) -> None:
    descriptors = weights.descriptors + newer.descriptors
    records = [msgspec.json.encode(record).decode() for record in (RECORD, NEWER)]
    chance = random.Random(7)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", SAVES_FOR_EVER, str(saved), *records, *map(str, descriptors)],
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"."
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.3))
            process.kill()
        state = state_of(saved)
        if state != "none":
            expected = (RECORD, weights) if state == "old" else (NEWER, newer)
            assert loaded(saved, expected[0]) == expected[1].bytes
        clean(saved.parent, [RECORD.layout])
        assert set(os.listdir(saved.parent)) <= {saved.name}


# Cleaning up


def test_clean_removes_what_nobody_wants_and_leaves_the_rest(saved: Path, newer: Weights) -> None:
    root = saved.parent
    other = directory_of(root, "llama")
    save(other, record_of("llama"), newer.descriptors)
    foreign = ["notes", "smollm2", f"{saved.name}.backup", directory_of(root, "foreign").name]
    for name in foreign:
        (root / name).mkdir()
        (root / name / "file").write_text("not ours")
    (root / f"{saved.name}.saving-{'0' * 16}").mkdir()
    (root / directory_of(root, "link").name).symlink_to(other)
    (root / directory_of(root, "file").name).write_text("")
    with nothing_left_open():
        assert clean(root, [RECORD.layout]) == [other, root / f"{saved.name}.saving-{'0' * 16}"]
    assert set(foreign) < set(os.listdir(root))
    verify(saved, RECORD)
    with nothing_left_open():
        assert clean(root, []) == [saved]


def test_clean_of_a_root_that_is_not_there(tmp_path: Path) -> None:
    assert clean(tmp_path / "absent", ["smollm2"]) == []


def test_clean_leaves_what_a_living_process_saves(root: Path, weights: Weights) -> None:
    directory = directory_of(root, RECORD.layout)

    def stop() -> bool:
        assert clean(root, []) == []
        return False

    save(directory, RECORD, weights.descriptors, shard_bytes=SHARD_BYTES, stop=stop)
    verify(directory, RECORD)
