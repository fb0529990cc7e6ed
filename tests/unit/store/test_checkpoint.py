"""A Hugging Face directory is checked by its headers before anything is taken from it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_box.errors import BoxError
from dynamo_box.profile.checkpoint import INDEX, facts_of, read_header


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(*, dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_facts_follow_from_config_and_headers(model: Path) -> None:
    facts = facts_of(model, name="tiny", source="here")
    config = json.loads((model / "config.json").read_text())
    assert facts.architecture == "llama"
    assert facts.dtype == "float64"
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (2, 4, 2, 4)
    assert facts.vocab_size == config["vocab_size"]
    assert facts.weights_bytes == pytest.approx((model / "model.safetensors").stat().st_size, abs=8192)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(model: Path, missing: str) -> None:
    (model / missing).unlink()
    with pytest.raises(BoxError, match=re.escape(missing.removeprefix("model"))):
        facts_of(model, name="tiny", source="here")


def test_pickled_weights_are_refused_with_the_reason(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BoxError) as refusal:
        facts_of(model, name="tiny", source="here")
    assert "run code" in (refusal.value.remedy or "")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 0}, {"vocab_size": "many"}, {"hidden_size": None}])
def test_an_impossible_config_is_refused(model: Path, change: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BoxError, match=r"config\.json"):
        facts_of(model, name="tiny", source="here")


def test_weights_cut_off_are_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BoxError, match="incomplete"):
        facts_of(model, name="tiny", source="here")


def test_an_index_must_find_all_its_shards(model: Path) -> None:
    names = list(read_header(model / "model.safetensors"))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    facts_of(model, name="tiny", source="here")
    (model / INDEX).write_text(json.dumps({"weight_map": {"more": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(BoxError, match="model-00002-of-00002"):
        facts_of(model, name="tiny", source="here")
    (model / INDEX).write_text("[]")
    with pytest.raises(BoxError, match="index"):
        facts_of(model, name="tiny", source="here")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"\xff",
        [],
        {"a": 1},
        {"a": entry(dtype="F7")},
        {"a": entry(shape=(3,))},
        {"a": entry(shape=(-2,), offsets=(0, -8))},
        {"a": entry(offsets=(8, 16))},
        {"a": entry(), "b": entry(offsets=(4, 12))},
        {"a": entry(shape=(1 << 40, 1 << 40), offsets=(0, 1 << 82))},
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(BoxError):
        read_header(write_safetensors(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 8, b"\x10" + bytes(7) + b"{}"])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BoxError):
        read_header(path)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_one_changed_byte_gives_a_header_or_a_refusal(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    content = bytearray((tiny_model / "model.safetensors").read_bytes())
    content[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except BoxError as refusal:
        assert str(path) in refusal.what
