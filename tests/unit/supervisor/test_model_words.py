"""What people are told of a model's sleep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_box.supervisor import model_words


@pytest.mark.parametrize(
    ("place", "where"),
    [("device", " with its weights on the device"), ("host", " in host memory"), ("disk", " on disk"), ("", "")],
)
def test_where_a_model_sleeps_already_is_said_as_it_was_when_it_fell_asleep(place: str, where: str) -> None:
    model: Any = SimpleNamespace(name="m", said=SimpleNamespace(place=place), policy=SimpleNamespace(gms="gms@cpu"))
    assert model_words.already_asleep(model) == f"m sleeps{where} already"
    if place:
        assert model_words.slept(model, place, (), 1.0).startswith(f"m sleeps{where}: ")
