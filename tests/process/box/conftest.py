"""Boxes of two mock workers over a tiny model: everything is real but the computing, and `up` takes a second."""

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


@pytest.fixture
def mock_box(tmp_path: Path, tiny_model: Path) -> Iterator[Box]:
    """A running box that serves `tiny`; torn down and checked for leftovers afterwards."""
    profile = tmp_path / "tiny.yaml"
    profile.write_text(PROFILE.format(source=tiny_model))
    (tmp_path / "home").mkdir()
    box = Box(tmp_path / "run", tmp_path / "home")
    box.up(str(profile))
    yield box
    box.destroy()
