"""Memory files with known bytes, and whether a descriptor was left open."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest


def filled(size: int, seed: int) -> int:
    """A memory file of random bytes; the caller closes it."""
    descriptor = os.memfd_create("filled", os.MFD_CLOEXEC)
    os.write(descriptor, random.Random(seed).randbytes(size))
    return descriptor


def contents(descriptor: int, size: int) -> bytes:
    return os.pread(descriptor, size, 0)


class Maker:
    """A `make` that counts, and fails at allocation `fails_at` with `error`."""

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self._fails_at = fails_at
        self._error = error

    def __call__(self, number: int, size: int) -> int:
        self.asked.append((number, size))
        if number == self._fails_at:
            assert self._error is not None
            raise self._error
        descriptor = os.memfd_create(f"made {number}", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return descriptor


def open_descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {number: target for number, target in found.items() if not target.endswith("/fd")}


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@contextlib.contextmanager
def small_file_system(path: Path, size: str) -> Iterator[Path]:
    """A tmpfs of that size at `path`; the test is skipped where this user may not mount one."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
