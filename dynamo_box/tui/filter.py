"""What `/` and `--filter` take: a regular expression, turned round by a leading `!`.

A pattern such as `(a+)+$` may take longer than anyone lives, and holds up everything else meanwhile, keys included.
Nothing but a signal ends it: `re` looks for signals as it goes.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


class FilterError(ValueError):
    """The text is no regular expression; the message says where it breaks."""


class FilterTooSlow(Exception):
    """What was inside `patience` took too long."""


@contextlib.contextmanager
def patience(limit_s: float) -> Iterator[None]:
    """End what is done inside after `limit_s` of processor time. In other threads than the main one it can't.

    Raises:
        FilterTooSlow: it was ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(*_: object) -> None:
        raise FilterTooSlow

    before = signal.signal(signal.SIGVTALRM, expired)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


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
