"""A box of real processes, cleared up afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from supervised_box import BoxUnderTest


@pytest.fixture
def box(box_env: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[BoxUnderTest]:
    """`box_env` has put its directories into the environment."""
    monkeypatch.delenv("DYNBOX_RUN_ID", raising=False)
    under_test = BoxUnderTest()
    yield under_test
    under_test.clear_up()
