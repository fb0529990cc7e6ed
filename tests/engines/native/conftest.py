"""Lets the tests of this folder import their harness."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from dynamo_box.kv.client.lane import Limits
from dynamo_box.kv.onboard import Choice

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))
sys.path.insert(0, str(Path(__file__).parents[2] / "process" / "kv_store"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store on a machine that is busy with other tests is slow, not gone."""
    limits = partial(Limits, attach_s=90.0, seek_s=90.0, store_s=90.0, load_s=90.0, fetch_s=90.0)
    monkeypatch.setattr("dynamo_box.kv.client.tiers.Limits", limits)


@pytest.fixture
def loads_whatever_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether that is faster depends on the machine, and is decided elsewhere."""
    monkeypatch.setattr("engines.native.onboarding.choose", lambda tiers, **_: Choice(len(tiers), "a test"))
