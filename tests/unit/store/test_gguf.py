"""GGUF files become Hugging Face directories with the very same numbers, or are refused with the reason."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.tiny_gguf import TOKENS, make_tiny_gguf
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dynamo_box.errors import BoxError
from dynamo_box.profile.pull import convert as convert_module
from dynamo_box.profile.pull import pull
from dynamo_box.profile.pull.convert import convert_gguf
from dynamo_box.profile.pull.gguf_file import SUPPORTED, GgufFile
from dynamo_box.profile.store import ModelStore


def ignore(_phase: str, _done: int, _total: int | None, _unit: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    path = tmp_path / "converted"
    path.mkdir()
    return path


def refusal_of(file: Path, into: Path) -> BoxError:
    with pytest.raises(BoxError) as refusal:
        convert_gguf(file, into, ignore)
    assert not (into / "model.safetensors").exists()
    return refusal.value


@pytest.mark.parametrize("quantisation", SUPPORTED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_supported_quantisation(
    file: Path, into: Path, quantisation: GGMLQuantizationType, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "CHUNK_BYTES", 10_000)  # several chunks a tensor
    expected = make_tiny_gguf(file, quantisation=quantisation, tied=tied)
    convert_gguf(file, into, ignore)
    weights = load_file(into / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], values, err_msg=name)
    assert json.loads((into / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_config_says_what_the_metadata_say(file: Path, into: Path) -> None:
    make_tiny_gguf(file, metadata={"tokenizer.ggml.eot_token_id": 0})
    convert_gguf(file, into, ignore)
    config = json.loads((into / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == float(np.float32(1e-5))
    assert config["vocab_size"] == len(TOKENS)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert "pad_token_id" not in config
    assert json.loads((into / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    tokenizer_config = json.loads((into / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == "<|im_end|>"
    assert "message['content']" in tokenizer_config["chat_template"]


def test_a_pull_of_a_file_gives_a_model(file: Path, tmp_path: Path) -> None:
    make_tiny_gguf(file, quantisation=GGMLQuantizationType.Q8_0)
    steps: list[tuple[str, int, int | None]] = []
    store = ModelStore(tmp_path / "models")
    model = pull(str(file), store, progress=lambda phase, done, total, _unit: steps.append((phase, done, total)))
    assert model.name == "tiny"
    assert model.facts.dtype == "float32"
    converting = [step for step in steps if step[0] == "converting"]
    assert converting[-1][1] == converting[-1][2] == model.facts.weights_bytes
    assert not list(store.root.glob(".partial-*"))


@pytest.mark.parametrize("quantisation", [GGMLQuantizationType.TQ2_0, GGMLQuantizationType.TQ1_0])
def test_other_quantisations_are_named_with_the_tensor(
    file: Path, into: Path, quantisation: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fakes.tiny_gguf.HIDDEN", 256)  # their blocks hold 256 values
    monkeypatch.setattr("fakes.tiny_gguf.INNER", 256)
    make_tiny_gguf(file, quantisation=quantisation)
    refusal = refusal_of(file, into)
    assert "token_embd.weight" in refusal.what
    assert quantisation.name in refusal.what
    assert "Q5_1" in (refusal.remedy or "")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general.architecture": "gemma"}, "gemma"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary"),
        ({"llama.attention.key_length": 32}, "rotated"),
        ({"llama.block_count": 3}, "missing"),
        ({"llama.block_count": 2**31}, "layers"),
        ({"llama.block_count": 1}, "no place"),
        ({"llama.attention.head_count": 0}, "heads"),
        ({"llama.feed_forward_length": 100}, "shape"),
        ({"llama.context_length": "long"}, "context_length is str"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of kind llama"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "unheard-of"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]}, "twice"),
        ({"tokenizer.ggml.tokens": [*TOKENS, "+1"], "tokenizer.ggml.token_type": []}, "embeddings for"),
        ({"tokenizer.ggml.merges": ["no such"]}, "merges"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "merges"),
        ({"tokenizer.ggml.token_type": [1, 2, 3]}, "token types"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "eos"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_or_contradicts_itself(
    file: Path, into: Path, metadata: dict[str, Any], reason: str
) -> None:
    if "general.architecture" in metadata:
        make_tiny_gguf(file)
        file.write_bytes(file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1))
    else:
        make_tiny_gguf(file, metadata=metadata)
    assert reason in refusal_of(file, into).what


@pytest.mark.parametrize("key", ["llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"])
def test_metadata_that_are_missing_are_named(file: Path, into: Path, key: str) -> None:
    make_tiny_gguf(file, leave_out=(key,))
    assert key in refusal_of(file, into).what


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.ffn_down.weight"])
def test_tensors_that_are_missing(file: Path, into: Path, tensor: str) -> None:
    make_tiny_gguf(file, leave_out=(tensor,))
    refusal_of(file, into)


def test_scaled_rope_is_not_converted_into_something_else(file: Path, into: Path) -> None:
    make_tiny_gguf(file, extra_tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert "rotary" in refusal_of(file, into).what


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGU",
        b"not a model at all",
        b"GGUF" + struct.pack("<I", 3),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"key",
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**60),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1),
        b"GGUF" + struct.pack("<IQQQ1sI4Q", 3, 1, 0, 1, b"t", 4, *[2**40] * 4),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 2**31) + bytes(64),
    ],
)
def test_hostile_files_are_refused_at_once(file: Path, into: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert "tiny.gguf" in refusal_of(file, into).what


def test_a_file_cut_off_anywhere_is_refused(file: Path) -> None:
    make_tiny_gguf(file)
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 4096), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(BoxError):
            GgufFile(file)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 8000), value=st.integers(0, 255))
def test_one_changed_byte_gives_a_file_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "mutated.gguf"
    original = tmp_path_factory.getbasetemp() / "original.gguf"
    if not original.exists():
        make_tiny_gguf(original)
    content = bytearray(original.read_bytes())
    content[position] = value
    file.write_bytes(content)
    try:
        GgufFile(file)
    except BoxError as refusal:
        assert refusal.remedy
