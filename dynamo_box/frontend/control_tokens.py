"""The special tokens of a model, and how a message is kept from writing them.

A chat template frames messages with special tokens. If a message may contain them too, whoever writes it can end his
turn and begin another as the system. So before the template runs, special tokens inside of messages are disarmed with a
mark after their first character, one that Unicode reserves for programs' private use; after the template has run and
special tokens have cut the text, the marks are taken out again. The model sees the characters that were written, as
ordinary text. Text without special tokens is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ControlTokens:
    """`ids` gives the packed id of each special token by its text."""

    def __init__(self, ids: Mapping[str, bytes]) -> None:
        self._ids = dict(ids)
        longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first)) if self._ids else None

    def occur_in(self, text: str) -> bool:
        return self._pattern is not None and self._pattern.search(text) is not None

    def disarm(self, text: str, mark: str) -> str:
        """`text` without special tokens; `mark` must not occur in it, and taking it out gives `text` back."""
        while self._pattern is not None and self._pattern.search(text):
            text = self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return text

    def cut(self, text: str) -> Iterator[tuple[str, bytes]]:
        """Pieces of ordinary text, each with the packed id of the special token that follows it (b"" at the end)."""
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            yield text[position : match.start()], self._ids[match[0]]
            position = match.end()
        yield text[position:], b""


def free_mark(texts: Iterable[str]) -> str | None:
    """A mark that occurs in none of `texts`; None if somebody used them all."""
    used = set("".join(texts)).intersection(_MARKS)
    return next((mark for mark in _MARKS if mark not in used), None)
