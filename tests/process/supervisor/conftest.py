"""A box of real processes, cleared up afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from supervised_box import BoxUnderTest


@pytest.fixture
def make_box(box_env: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], BoxUnderTest]]:
    """Boxes by name, each with a run dir of its own, and one home."""
    monkeypatch.delenv("DYNBOX_RUN_ID", raising=False)
    made: list[BoxUnderTest] = []

    def make(name: str) -> BoxUnderTest:
        made.append(BoxUnderTest(box_env.run.with_name(name)))
        return made[-1]

    yield make
    for box in made:
        box.clear_up()


@pytest.fixture
def box(make_box: Callable[[str], BoxUnderTest]) -> BoxUnderTest:
    return make_box("run")
