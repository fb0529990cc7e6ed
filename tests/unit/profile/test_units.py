from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.profile.units import LARGEST_SIZE, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512 MiB", 512 << 20),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("7B", 7),
        (12, 12),
        ("1kB", 1000),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["4GIB", "4", "-1MiB", "", "GiB", "1e3MiB", True, None, 1.5, [1], -1, "9999999TiB", "4 GiB\n"]
)
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1.5m", 90), ("250ms", 0.25), ("2 h", 7200), (3, 3), (0.5, 0.5)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["30", "s", "-1s", "1d", True, None, -1, float("inf"), float("nan"), "1000h"])
def test_no_durations(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_duration(text)


@given(st.integers(0, LARGEST_SIZE))
def test_a_formatted_size_reads_back_to_within_a_percent(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= max(0.006 * size, 0)


@given(st.integers(0, 1 << 20), st.sampled_from([("KiB", 10), ("MiB", 20), ("GiB", 30)]))
def test_binary_units_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number << unit[1]
