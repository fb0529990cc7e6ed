"""The least number of tokens that a text can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_box.frontend.detokenize import byte_characters
from dynamo_box.frontend.extent import most_characters_per_token
from dynamo_box.frontend.tokenizer import FarTooLong, ModelTokenizer
from dynamo_box.protocol.request import unpack_tokens

BYTE_LEVEL = {**byte_characters(), "x" * 12: 256}


def most(vocabulary: dict[str, int], **stages: Any) -> int | None:
    definition: dict[str, Any] = {"model": {}, "pre_tokenizer": {"type": "ByteLevel"}, **stages}
    return most_characters_per_token(definition, vocabulary)


def test_the_longest_spelling_is_the_bound() -> None:
    assert most(BYTE_LEVEL) == 12
    assert most(BYTE_LEVEL, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}) == 48
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    assert most(fallback, pre_tokenizer=None, model={"byte_fallback": True}, normalizer=replace) == 6


def test_a_tokenizer_that_may_drop_characters_has_none() -> None:
    assert most({"a": 0}) is None
    assert most(BYTE_LEVEL, normalizer={"type": "BertNormalizer"}) is None
    regex = {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}
    assert most(BYTE_LEVEL, normalizer=regex) is None
    assert most(BYTE_LEVEL, pre_tokenizer={"type": "Whitespace"}) is None
    assert most(BYTE_LEVEL, added_tokens=[{"content": "<x>", "rstrip": True}]) is None


def test_texts_are_refused_from_the_bound_on(tiny_model: Path) -> None:
    tokenizer = ModelTokenizer(tiny_model)
    content = json.loads((tiny_model / "tokenizer.json").read_text())
    longest = max(map(len, [*content["model"]["vocab"], *(token["content"] for token in content["added_tokens"])]))
    assert tokenizer.encode_text("x" * longest * 10, max_tokens=10)
    with pytest.raises(FarTooLong, match="at least 11 tokens"):
        tokenizer.encode_text("x" * (longest * 10 + 1), max_tokens=10)
    with pytest.raises(FarTooLong):
        tokenizer.encode_chat([{"role": "user", "content": "x" * longest * 10}], max_tokens=10)


def test_a_long_text_has_the_ids_of_its_parts(tiny_model: Path) -> None:
    tokenizer = ModelTokenizer(tiny_model)
    word = unpack_tokens(tokenizer.encode_text(" day"))
    assert unpack_tokens(tokenizer.encode_text(" day" * 20_000)) == list(word) * 20_000
