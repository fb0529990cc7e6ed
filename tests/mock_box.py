"""Boxes of two mock workers over a tiny model: everything is real but the computing, and `up` takes a second.

`from mock_box import mock_box` in a conftest gives a folder's tests the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from box_under_test import Box

PROFILE = """
model:
  name: tiny
  source: {source}
  engine: mock
  block_size: 16
  workers: 2
  options: {{decode_ms: 2, prefill_tokens_per_s: 100000, kv_blocks: 1024}}
restart: {{first: 50ms, longest: 200ms, give_up_after: 1000, silence: 5s}}
"""


class MockBox(Box):
    """`start_again` starts it anew after its end, with the same profile and port."""

    def __init__(self, directory: Path, profile: str) -> None:
        super().__init__(directory / "run", directory / "home")
        self.home.mkdir()
        self.profile = directory / "tiny.yaml"
        self.profile.write_text(profile)

    def start_again(self) -> None:
        self.up(str(self.profile))


@pytest.fixture
def mock_box(tmp_path: Path, tiny_model: Path) -> Iterator[MockBox]:
    """A running box that serves `tiny`; torn down and checked for leftovers afterwards."""
    box = MockBox(tmp_path, PROFILE.format(source=tiny_model))
    box.start_again()
    yield box
    box.destroy()
