"""Which tokens a mock sequence produces.

The next token is a function of all tokens before it and of the sampling, as with a real model: the same
request gives the same output anywhere, beside any neighbours, and a request that goes on elsewhere with its
output so far as part of the prompt gives the same rest.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from zlib import crc32

import msgspec

from dynamo_box.protocol.request import Sampling

BYTE_TOKENS = 256
"""Byte-level vocabularies begin with one token a byte; alone, many of those are half a character."""

SMALL_VOCABULARY = 1024


class _Config(msgspec.Struct):
    vocab_size: int


class _AddedToken(msgspec.Struct):
    id: int


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


def ordinary_tokens(model_path: Path, vocab_size: int) -> range:
    """Ids of ordinary text: the longest run without special tokens, past the byte tokens where there is room.

    `vocab_size` counts if the model directory has no config.json.
    """
    config = model_path / "config.json"
    if config.is_file():
        vocab_size = msgspec.json.decode(config.read_bytes(), type=_Config).vocab_size
    special: list[int] = []
    tokenizer = model_path / "tokenizer.json"
    if tokenizer.is_file():
        added = msgspec.json.decode(tokenizer.read_bytes(), type=_Tokenizer).added_tokens
        special = sorted({token.id for token in added if token.id < vocab_size})
    bounds = [-1, *special, vocab_size]
    first, last = max(itertools.pairwise(bounds), key=lambda gap: gap[1] - gap[0])
    first += 1
    if last - first > SMALL_VOCABULARY:
        first += BYTE_TOKENS
    return range(first, max(last, first + 1))


class TokenStream:
    """The output of one sequence, one token at a time."""

    __slots__ = ("_first", "_mix", "_span", "_state")

    def __init__(self, prompt: bytes, sampling: Sampling, ordinary: range) -> None:
        """`prompt` is packed (u32 LE)."""
        self._state = crc32(prompt)
        self._first = ordinary.start
        self._span = len(ordinary)
        self._mix = 0
        if sampling.temperature > 0:
            knobs = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
            self._mix = crc32(msgspec.msgpack.encode(knobs))

    def next(self) -> int:
        scattered = ((self._state ^ self._mix) * 0x9E3779B97F4A7C15) >> 20 & 0xFFFFFFFF
        token = self._first + scattered % self._span
        self._state = crc32(token.to_bytes(4, "little"), self._state)
        return token
