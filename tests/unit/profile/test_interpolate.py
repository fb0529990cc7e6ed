from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.profile.interpolate import interpolate
from dynamo_box.profile.yaml_tree import Leaf, Place, Problem, plain_data, read_tree, typed


def filled(text: str, **environ: str) -> tuple[object, list[str]]:
    problems: list[Problem] = []
    tree = interpolate(read_tree(text.encode(), "p.yaml"), environ, problems)
    return plain_data(tree), [str(problem) for problem in problems]


def test_a_plain_value_is_typed_after_it_is_filled_in() -> None:
    assert filled("a: ${PORT:-8000}\nb: ${ON}\nc: '${PORT:-8000}'\n", ON="true") == (
        {"a": 8000, "b": True, "c": "8000"},
        [],
    )


def test_the_default_stands_in_for_an_empty_variable() -> None:
    assert filled("a: x${A:-y}z\n", A="")[0] == {"a": "xyz"}
    assert filled("a: x${A}z\n", A="")[0] == {"a": "xz"}
    assert filled("a: ${A:-}\n")[0] == {"a": None}


def test_dollars() -> None:
    assert filled("a: $$x $5 $${A} $\n")[0] == {"a": "$x $5 ${A} $"}


def test_a_variable_is_no_yaml_and_is_not_filled_in_again() -> None:
    assert filled("a: ${A}\n", A="{b: 1}\n# ${B}")[0] == {"a": "{b: 1}\n# ${B}"}


def test_every_problem_has_its_place() -> None:
    _, problems = filled("a: ${A}\nb:\n  - ${oops\n  - ${B:-1} ${C}\n")
    assert problems == [
        "p.yaml:1:4: the environment variable A is not set; ${A:-…} gives a default",
        "p.yaml:3:5: ${ must be ${NAME} or ${NAME:-default}; a dollar sign is $$",
        "p.yaml:4:5: the environment variable C is not set; ${C:-…} gives a default",
    ]


def one(text: str, environ: dict[str, str]) -> object:
    problems: list[Problem] = []
    leaf = interpolate(Leaf(Place("p", 1, 1), text, plain=False), environ, problems)
    assert isinstance(leaf, Leaf) and not problems
    return typed(leaf)


@given(st.text())
def test_escaped_text_comes_out_as_it_was(text: str) -> None:
    assert one(text.replace("$", "$$"), {}) == text


@given(st.text(), st.text(), st.text(st.characters(exclude_characters="}")))
def test_set_or_default(before: str, value: str, default: str) -> None:
    text = before.replace("$", "$$") + "${V:-" + default + "}"
    assert one(text, {"V": value}) == before + (value or default)
    assert one(text, {}) == before + default
