"""Boxes to test, torn down and checked for leftovers afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from box_under_test import Box


@pytest.fixture
def box(tmp_path: Path, smollm2_home: Path) -> Iterator[Box]:
    """A box of this test's own over the session's model store; torn down and checked for leftovers afterwards."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(smollm2_home / "models")
    made = Box(tmp_path / "run", home)
    yield made
    made.destroy()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, smollm2_home: Path) -> Iterator[Box]:
    """One box with profile smollm2 for all tests of a module that don't disturb it."""
    root = tmp_path_factory.mktemp("box")
    (root / "home").mkdir()
    (root / "home" / "models").symlink_to(smollm2_home / "models")
    made = Box(root / "run", root / "home")
    made.up()
    yield made
    made.destroy()
