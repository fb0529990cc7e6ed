"""Profiles may come from anyone: what reading them refuses, and where it says the trouble is."""

# ruff: noqa: E501 (an expected text is one line)

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.profile.yaml_tree import MAX_BYTES, Unreadable, plain_data, read_tree


def read(text: str | bytes) -> object:
    return plain_data(read_tree(text if isinstance(text, bytes) else text.encode(), "p.yaml"))


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(Unreadable) as caught:
        read(text)
    return [str(problem) for problem in caught.value.problems]


def test_scalars_are_typed_as_yaml_1_2_does() -> None:
    text = "a: 1\nb: 0x1f\nc: 0o17\nd: 1.5\ne: true\nf: yes\ng: '1'\nh: ~\ni: 2001-01-01\nj: 1_000\nk: |\n  12\nl: 010\nm: -0x2\n"
    assert read(text) == {
        "a": 1, "b": 31, "c": 15, "d": 1.5, "e": True, "f": "yes", "g": "1", "h": None,
        "i": "2001-01-01", "j": 1000, "k": "12\n", "l": 10, "m": -2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", 'p.yaml:3:1: "a" is here twice (first in line 1)'),
        ("a: 1\n\tb: 2\n", "p.yaml:2:1: not YAML: found character '\\t' that cannot start any token (indent with spaces)"),
        ("a: [1,\n", "p.yaml:2:1: not YAML: expected the node content, but found '<stream end>'"),
        ("a: 1\n---\nb: 1\n", "p.yaml:2:1: not YAML: but found another document"),
        ("a: *x\n", "p.yaml:1:4: not YAML: found undefined alias 'x'"),
        ("", "p.yaml:1:1: empty: a profile names at least a model"),
        ("# nothing\n", "p.yaml:1:1: empty: a profile names at least a model"),
        ("- a\n", "p.yaml:1:1: a profile is a mapping of keys to values"),
        ("word\n", "p.yaml:1:1: a profile is a mapping of keys to values"),
        ("a: &a\n  b: *a\n", "p.yaml:1:4: an alias that contains itself"),
        ("a: 1\nb: !!python/object:os.system x\n", "p.yaml:2:4: tags such as tag:yaml.org,2002:python/object:os.system aren't used in profiles"),
        ("? [1]\n: 2\n", "p.yaml:1:3: a key must be a word"),
        ("a: 1\nb: \x01\n", "p.yaml:2:4: a control character: this is no profile"),
        (b"a: 1\nb: \xff\n", "p.yaml:2:4: not UTF-8 text: this is no profile"),
        (b"\x7fELF\x02\x01", "p.yaml:1:1: a control character: this is no profile"),
        (b"a" * (MAX_BYTES + 1), "p.yaml:1:1: larger than 256 KiB: this is no profile"),
        ("a: " + "[" * 60 + "]" * 60, "p.yaml:1:43: nested deeper than 40 levels"),
        ("a: " + "[" * 5000, "p.yaml:1:1: nested deeper than 40 levels"),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(text: str | bytes, expected: str) -> None:
    assert problems(text) == [expected]


def test_every_duplicate_is_named() -> None:
    assert len(problems("a: 1\na: 2\nb: {c: 1, c: 2}\n")) == 2


def test_aliases_that_unfold_without_end_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (problem,) = problems("\n".join(lines))
    assert "more than 20000 values once its aliases are followed" in problem


def test_an_alias_is_the_value_it_names() -> None:
    assert read("a: &x {b: 1}\nc: *x\n") == {"a": {"b": 1}, "c": {"b": 1}}


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(data)
    except Unreadable as error:
        assert error.problems


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=8),
    lambda inner: st.dictionaries(st.text("abcdef", min_size=1, max_size=4), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), VALUES, min_size=1, max_size=5))
def test_json_reads_as_what_it_is(data: dict[str, object]) -> None:
    assert read(json.dumps(data)) == data
