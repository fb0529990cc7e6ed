"""A live box for a real terminal, slow enough for a person to see its requests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mock_box import PROFILE, MockBox

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def slow_box(tmp_path: Path, tiny_model: Path) -> Iterator[MockBox]:
    """A running box that serves `tiny` at five tokens a second; torn down and checked for leftovers afterwards."""
    box = MockBox(tmp_path, PROFILE.replace("decode_ms: 2", "decode_ms: 200").format(source=tiny_model))
    box.start_again()
    yield box
    box.destroy()
