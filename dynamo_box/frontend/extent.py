"""How few tokens a text can be, without tokenising it: a prompt far too long is refused before it costs anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dynamo_box.frontend.detokenize import byte_characters

_SHRINK = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1, "Lowercase": 1}
"""Normalizers that drop nothing, with the number of characters that may become one (the longest compositions of
Unicode have four)."""


def most_characters_per_token(definition: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """None where there is no bound: a tokenizer that drops characters, or has one token for any run of unknown ones.

    `definition` is the content of tokenizer.json; `vocabulary` holds added tokens too. A character is at least one
    character of a token's spelling, in byte-level vocabularies as well, so the longest spelling is the bound.
    """
    if not vocabulary or not _spells_everything(definition, vocabulary):
        return None
    if any(token.get("lstrip") or token.get("rstrip") for token in definition.get("added_tokens") or ()):
        return None
    shrink = 1
    for normalizer in _steps(definition.get("normalizer"), "normalizers"):
        if normalizer["type"] == "Replace":
            factor = 1 if len(normalizer["pattern"].get("String", "")) == 1 and normalizer["content"] else None
        else:
            factor = _SHRINK.get(normalizer["type"])
        if factor is None:
            return None
        shrink *= factor
    return shrink * max(map(len, vocabulary))


def _spells_everything(definition: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    """Has every byte a token, and does every byte get to be looked up?"""
    steps = list(_steps(definition.get("pre_tokenizer"), "pretokenizers"))
    for step in steps:
        drops = step.get("behavior") == "Removed"
        if drops or step["type"] not in ("ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"):
            return False
    if any(step["type"] == "ByteLevel" for step in steps):
        return vocabulary.keys() >= byte_characters().keys()
    return bool(definition["model"].get("byte_fallback")) and all(
        f"<0x{byte:02X}>" in vocabulary for byte in range(256)
    )


def _steps(stage: Mapping[str, Any] | None, members: str) -> Iterator[Mapping[str, Any]]:
    if stage is None:
        return
    if stage["type"] == "Sequence":
        for member in stage[members]:
            yield from _steps(member, members)
    else:
        yield stage
