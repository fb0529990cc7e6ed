"""A store of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_box.profile.store import ModelStore


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")
