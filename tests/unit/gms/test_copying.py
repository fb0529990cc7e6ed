"""Copies between memory files: every byte, all of them or none, and nothing left open."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.memory_files import Maker, close_all, contents, filled, nothing_left_open, small_file_system

from dynamo_box.gms import copying
from dynamo_box.gms.copying import MoveFailed, MoveStopped, OutOfMemory, copy_memory

SIZES = [3 << 20, 4096, 1, 2 << 20]


@pytest.fixture
def sources() -> Iterator[list[int]]:
    descriptors = [filled(size, seed) for seed, size in enumerate(SIZES)]
    yield descriptors
    close_all(descriptors)


def same(left: list[int], right: list[int]) -> bool:
    return all(contents(a, size) == contents(b, size) for a, b, size in zip(left, right, SIZES, strict=True))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a copy of a few MiB takes several."""
    monkeypatch.setattr(copying, "SLICE_BYTES", 1 << 20)


def test_every_byte_is_copied_and_each_destination_is_made_once(sources: list[int]) -> None:
    make = Maker()
    with nothing_left_open():
        copies = copy_memory(sources, SIZES, make)
        assert make.asked == list(enumerate(SIZES))
        assert same(sources, copies)
        close_all(copies)


def test_a_copy_is_a_copy(sources: list[int]) -> None:
    copies = copy_memory(sources, SIZES, Maker())
    before = contents(sources[0], 16)
    os.pwrite(copies[0], b"something else!!", 0)
    assert contents(sources[0], 16) == before
    close_all(copies)


def test_sealed_sources_opened_for_reading_only_are_copied() -> None:
    source = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(source, random.Random(5).randbytes(2 << 20))
    fcntl.fcntl(source, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    reader = os.open(f"/proc/self/fd/{source}", os.O_RDONLY)
    (copied,) = copy_memory([reader], [2 << 20], Maker())
    assert contents(copied, 2 << 20) == contents(source, 2 << 20)
    close_all([source, reader, copied])


def test_positions_of_the_descriptors_do_not_matter(sources: list[int]) -> None:
    for source in sources:
        os.lseek(source, 1, os.SEEK_SET)

    def make(number: int, size: int) -> int:
        descriptor = Maker()(number, size)
        os.lseek(descriptor, 7, os.SEEK_SET)
        return descriptor

    copies = copy_memory(sources, SIZES, make)
    assert same(sources, copies)
    close_all(copies)


def test_nothing_to_copy_is_nothing() -> None:
    assert copy_memory([], [], Maker()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("the budget is used up"), OutOfMemory),
        (OSError(errno.ENOMEM, "no memory"), OutOfMemory),
        (OSError(errno.ENOSPC, "tmpfs is full"), OutOfMemory),
        (OSError(errno.EMFILE, "too many open files"), MoveFailed),
    ],
)
@pytest.mark.parametrize("fails_at", range(len(SIZES)))
def test_a_destination_that_cannot_be_made_undoes_all(
    sources: list[int], fails_at: int, error: Exception, expected: type[MoveFailed]
) -> None:
    with nothing_left_open(), pytest.raises(MoveFailed) as failure:
        copy_memory(sources, SIZES, Maker(fails_at, error))
    assert type(failure.value) is expected
    assert failure.value.__cause__ is error


def test_an_error_that_is_not_about_memory_comes_through_and_undoes_all(sources: list[int]) -> None:
    with nothing_left_open(), pytest.raises(KeyError):
        copy_memory(sources, SIZES, Maker(2, KeyError("a mistake in make")))


@pytest.mark.parametrize("asked", range(7))
def test_it_can_be_stopped_at_every_slice(sources: list[int], asked: int) -> None:
    """Three slices of the first, one of the second and third, two of the fourth: seven questions."""
    left = iter([False] * asked)
    with nothing_left_open(), pytest.raises(MoveStopped):
        copy_memory(sources, SIZES, Maker(), stop=lambda: next(left, True))


def test_a_source_that_is_too_short_is_an_error_and_no_signal(sources: list[int]) -> None:
    os.ftruncate(sources[3], 1 << 20)
    with nothing_left_open(), pytest.raises(MoveFailed, match=r"allocation 3 has 1048576 bytes where 2097152"):
        copy_memory(sources, SIZES, Maker())


def test_a_source_that_cannot_be_read_is_an_error(sources: list[int]) -> None:
    blind = os.open(f"/proc/self/fd/{sources[1]}", os.O_WRONLY)
    with nothing_left_open(), pytest.raises(MoveFailed) as failure:
        copy_memory([sources[0], blind], SIZES[:2], Maker())
    assert isinstance(failure.value.__cause__, OSError)
    os.close(blind)


def test_memory_that_runs_out_while_bytes_are_copied_undoes_all(sources: list[int], tmp_path: Path) -> None:
    with small_file_system(tmp_path / "memory", "2m") as memory:

        def make(number: int, size: int) -> int:
            descriptor = os.open(memory / str(number), os.O_RDWR | os.O_CREAT)
            os.ftruncate(descriptor, size)
            return descriptor

        with nothing_left_open(), pytest.raises(OutOfMemory) as failure:
            copy_memory(sources, SIZES, make)
        assert isinstance(failure.value.__cause__, OSError)
        assert failure.value.__cause__.errno == errno.ENOSPC
