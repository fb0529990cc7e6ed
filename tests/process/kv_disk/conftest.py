"""What the tests of the disk tier share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_haste_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is underway when a tier is closed gets done, however busy the machine is."""
    monkeypatch.setattr("dynamo_box.kv.store.disk.GRACE_S", 120.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    if os.geteuid() != 0:
        pytest.skip("a file system can be mounted by root only; the same errors are injected in test_disk_faults.py")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "dynbox-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
