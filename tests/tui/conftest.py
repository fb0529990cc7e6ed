"""A live box for a real terminal, slow enough for a person to see its requests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mock_box import PROFILE, MockBox

sys.path.insert(0, str(Path(__file__).parent))


def start_slow_box(directory: Path, model: Path) -> MockBox:
    """A running box that serves `tiny` at five tokens a second."""
    box = MockBox(directory, PROFILE.replace("decode_ms: 2", "decode_ms: 200").format(source=model))
    box.start_again()
    return box


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[MockBox]:
    """One box for all tests of a module that leave it as it is."""
    box = start_slow_box(tmp_path_factory.mktemp("box"), tiny_model)
    yield box
    box.destroy()


@pytest.fixture
def box(tmp_path: Path, tiny_model: Path) -> Iterator[MockBox]:
    """A box of this test's own; torn down and checked for leftovers afterwards, like the other."""
    box = start_slow_box(tmp_path, tiny_model)
    yield box
    box.destroy()
