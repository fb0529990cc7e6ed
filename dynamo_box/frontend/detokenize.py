"""Token ids → text, as they come, never half a character.

The pieces of a stream add up to what the tokenizer makes of all ids at once, special tokens left out. Byte-level
vocabularies map each token to bytes, so an incremental UTF-8 decoder does it in constant time a token and holds back at
most three bytes. Other tokenizers are asked for the text of a short window, and hold back while it ends in half a
character, but no longer than MAX_HELD_TOKENS.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

import tokenizers

MAX_HELD_TOKENS = 8
REPLACEMENT = "\ufffd"

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def feed(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete."""

    def finish(self) -> str:
        """What was held back: half a character becomes U+FFFD."""


class Vocabulary:
    """What detokenising needs to know of a tokenizer, made once a model."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder_type: str | None) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in added.items() if token.special)
        self._bytes: _ByteTable | None = None
        if decoder_type == "ByteLevel":
            self._bytes = _ByteTable(tokenizer, self._special)

    def detokenizer(self) -> Detokenizer:
        if self._bytes is not None:
            return _ByteLevel(self._bytes)
        return _Windowed(self._tokenizer, self._special)


class _ByteLevel:
    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._decoder = _utf8("replace")

    def feed(self, tokens: Iterable[int]) -> str:
        table = self._table
        return self._decoder.decode(b"".join([table[token] for token in tokens]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    """`_ids[:_read]` has been shown; the window before it gives the decoder its context (leading spaces)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids: list[int] = []
        self._read = 0

    def feed(self, tokens: Iterable[int]) -> str:
        return "".join(self._feed_one(token) for token in tokens if token not in self._special)

    def _feed_one(self, token: int) -> str:
        self._ids.append(token)
        text = self._unread()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def finish(self) -> str:
        return self._show(self._unread()) if self._read < len(self._ids) else ""

    def _unread(self) -> str:
        shown: str = self._tokenizer.decode(self._ids[: self._read])
        whole: str = self._tokenizer.decode(self._ids)
        return whole[len(shown) :]

    def _show(self, text: str) -> str:
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text


class _ByteTable(dict[int, bytes]):
    """Id → bytes of a byte-level vocabulary, whose characters each stand for a byte (GPT-2's mapping), as ids turn up.

    A token with a character outside of the mapping, as added ones may have, stands for itself.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(special, b""))
        self._tokenizer = tokenizer
        self._characters = byte_characters()

    def __missing__(self, token: int) -> bytes:
        text: str | None = self._tokenizer.id_to_token(token)
        if text is None:
            return b""  # beyond the vocabulary: models pad theirs
        characters = self._characters
        if all(character in characters for character in text):
            self[token] = bytes(characters[character] for character in text)
        else:
            self[token] = text.encode()
        return self[token]


def byte_characters() -> dict[str, int]:
    """Printable Latin-1 stands for itself; every other byte for a character from U+0100 on, in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    mapping = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return mapping | {chr(256 + offset): byte for offset, byte in enumerate(others)}
