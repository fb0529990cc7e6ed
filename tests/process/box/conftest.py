"""Gives the tests of this folder a box of mock workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mock_box import PROFILE, MockBox, mock_box

__all__ = ["mock_box"]


@pytest.fixture(scope="module")
def shared_box(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[MockBox]:
    """One box for all tests of a module that leave it as it is."""
    box = MockBox(tmp_path_factory.mktemp("box"), PROFILE.format(source=tiny_model))
    box.start_again()
    yield box
    box.destroy()
