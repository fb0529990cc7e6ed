"""stdout that tells its own failures from those of other files.

An OSError says what went wrong, but not where: "No space left on device" may be the disk that `dynbox ps` is
redirected to, or the store that a model is pulled into. Here it becomes a `BoxError` where it happens, whoever writes.
A reader that went away (BrokenPipeError) is no failure and stays what it is.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from dynamo_box.errors import BoxError

STDOUT = 1


class Stdout(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        with _told():
            return super().write(text)

    def flush(self) -> None:
        with _told():
            super().flush()


def guard() -> None:
    """Put `Stdout` in the place of `sys.stdout`, also where the shell has closed it (`>&-`)."""
    old: Any = sys.stdout
    if isinstance(old, io.TextIOWrapper) and not isinstance(old, Stdout):
        encoding, errors, by_line, at_once = old.encoding, old.errors, old.line_buffering, old.write_through
        sys.stdout = Stdout(old.detach(), encoding, errors, line_buffering=by_line, write_through=at_once)
        if sys.__stdout__ is old:  # whoever asks for the terminal's size asks this one
            sys.__stdout__ = sys.stdout  # type: ignore[misc]  # Final for everybody else
    elif old is None:
        _occupy(STDOUT)
        sys.stdout = Stdout(open(STDOUT, "wb", closefd=False), "utf-8")  # noqa: SIM115 - for good


def close() -> None:
    """Write out what is left; after a failure drop it, which Python would otherwise report at exit.

    Raises:
        BoxError: it can't be written.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard()
    except BoxError:
        discard()
        raise


def discard() -> None:
    """From here on stdout leads nowhere."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)


def _occupy(descriptor: int) -> None:
    """Hold a closed descriptor with something that can't be written, lest a file or socket opened later get its number
    and the output.
    """
    unwritable = os.open(os.devnull, os.O_RDONLY)
    if unwritable != descriptor:
        os.dup2(unwritable, descriptor)
        os.close(unwritable)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BoxError(f"can't write the output: {error.strerror or error}") from error
