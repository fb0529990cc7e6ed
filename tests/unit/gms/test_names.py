"""Names of memory files can be read back, whatever the layout is called."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.gms.names import MAX_NAME_BYTES, MemfdName, memfd_name, parse_memfd_name

PART = st.text(st.characters(codec="ascii", exclude_characters=":\0"), min_size=1, max_size=30)
LAYOUT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)


def test_its_form() -> None:
    assert memfd_name("k3", "device", "cpu", "org/model") == "dynbox:k3:device:cpu:org/model"


@given(PART, st.sampled_from(["device", "host"]), PART, LAYOUT)
def test_it_is_read_back(run_key: str, place: str, device: str, layout: str) -> None:
    assert parse_memfd_name(memfd_name(run_key, place, device, layout)) == (run_key, place, device, layout)


def test_the_kernel_takes_the_longest_and_shows_it() -> None:
    name = memfd_name("k", "host", "cpu", "m" * (MAX_NAME_BYTES - len("dynbox:k:host:cpu:")))
    fd = os.memfd_create(name)
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == f"/memfd:{name} (deleted)"
    finally:
        os.close(fd)
    with pytest.raises(ValueError, match="can't be the name"):
        memfd_name("k", "host", "cpu", "m" * MAX_NAME_BYTES)


@pytest.mark.parametrize(
    "parts",
    [("a:b", "device", "cpu", "m"), ("k", "disk", "cpu", "m"), ("k", "device", "", "m"), ("k", "host", "c", "a\0b")],
)
def test_parts_that_could_not_be_told_apart_are_refused(parts: tuple[str, str, str, str]) -> None:
    with pytest.raises(ValueError, match="can't be the name"):
        memfd_name(*parts)


@pytest.mark.parametrize("text", ["", "dynbox", "dynbox:k:device:cpu", "other:k:device:cpu:m", "dynbox:k:disk:cpu:m"])
def test_names_of_others(text: str) -> None:
    assert parse_memfd_name(text) is None


def test_a_layout_may_hold_colons() -> None:
    assert parse_memfd_name("dynbox:k:device:cpu:a:b:c") == MemfdName("k", "device", "cpu", "a:b:c")
