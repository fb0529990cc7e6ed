"""What `/` and `--filter` take: a regular expression, turned round by a leading `!`."""

from __future__ import annotations

import re
from dataclasses import dataclass


class FilterError(ValueError):
    """The text is no regular expression; the message says where it breaks."""


@dataclass(frozen=True)
class Filter:
    """Lets texts through. Case counts only where the pattern has a capital."""

    text: str = ""
    pattern: re.Pattern[str] | None = None
    invert: bool = False

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Raises:
        FilterError: not a regular expression.
        """
        invert = text.startswith("!")
        source = text[1:] if invert else text
        if not source:
            return cls(text)
        flags = re.NOFLAG if any(character.isupper() for character in source) else re.IGNORECASE
        try:
            return cls(text, re.compile(source, flags), invert)
        except (re.error, RecursionError, OverflowError) as error:
            raise FilterError(f"{source!r} is no regular expression: {error}") from error

    @property
    def active(self) -> bool:
        return self.pattern is not None

    def matches(self, text: str) -> bool:
        return self.pattern is None or (self.pattern.search(text) is None) == self.invert


EVERYTHING = Filter()
