"""Sizes and durations as people write them: "4GiB", "512 MiB", "2GB", "30s", "1.5m", "250ms"."""

from __future__ import annotations

import re

_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DECIMAL = {"B": 1, "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES = _BINARY | _DECIMAL
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)? ?(B|[kK]B|[MGT]B|[KMGT]iB)$"
DURATION_PATTERN = r"^[0-9]+(\.[0-9]+)? ?(ms|s|m|h)$"
LARGEST_SIZE = 1 << 50
LONGEST_DURATION_S = 30 * 86_400.0


def parse_size(value: object) -> int:
    """Bytes. A whole number stands for bytes already.

    Raises:
        ValueError: it is no size, or beyond 1024 TiB.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and re.fullmatch(SIZE_PATTERN, value):
        number, unit = _split(value)
        size = round(float(number) * _SIZES[unit]) if "." in number else int(number) * _SIZES[unit]
    else:
        raise ValueError(f'must be a size such as "512MiB" or "4GiB", not {_shown(value)}')
    if not 0 <= size <= LARGEST_SIZE:
        raise ValueError(f"must lie between 0 and 1024 TiB, not {_shown(value)}")
    return size


def parse_duration(value: object) -> float:
    """Seconds. A number stands for seconds already.

    Raises:
        ValueError: it is no duration, or beyond 30 days.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and re.fullmatch(DURATION_PATTERN, value):
        number, unit = _split(value)
        seconds = float(number) * _SECONDS[unit]
    else:
        raise ValueError(f'must be a duration such as "30s" or "5m", not {_shown(value)}')
    if not 0 <= seconds <= LONGEST_DURATION_S:
        raise ValueError(f"must lie between 0 and 30 days, not {_shown(value)}")
    return seconds


def format_size(size: int) -> str:
    """For reading: three significant figures at most, "513 MiB", "1.08 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    value, step = float(size), 0
    while abs(value) >= 1000 and step < len(units) - 1:
        value, step = value / 1024, step + 1
    unit = units[step]
    digits = 0 if unit == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def _split(text: str) -> tuple[str, str]:
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return number.strip(), text[len(number) :]


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
