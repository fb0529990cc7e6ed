"""What pydantic found wrong with a profile, said at its line and in the profile's terms."""

from __future__ import annotations

import typing

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dynamo_box.profile.schema import Profile
from dynamo_box.profile.values import Impossible, Location
from dynamo_box.profile.wording import nearest, shown
from dynamo_box.profile.yaml_tree import Mapping, Place, Problem, Sequence, Tree, plain_data


def validate(tree: Mapping) -> tuple[Profile | None, list[Problem]]:
    """The profile, or everything that is wrong with it in the order of the file.

    Unknown keys are taken out before a second look, since they keep pydantic from checking what they stand
    beside.
    """
    try:
        return Profile.model_validate(plain_data(tree)), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    problems = [Problem(key_place(tree, loc), _unknown_key(loc)) for loc in unknown]
    try:
        Profile.model_validate(plain_data(_without(tree, unknown)))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        for detail in errors:
            if not _follows(detail, errors, unknown):
                problems += _problems(tree, detail)
    return None, sorted(set(problems))


def value_place(tree: Tree, location: Location) -> Place:
    """Where the value stands, or the innermost mapping that would hold it."""
    for step in location:
        inner = _child(tree, step)
        if inner is None:
            break
        tree = inner
    return tree.place


def key_place(tree: Tree, location: Location) -> Place:
    """Where the key of the value stands."""
    parent = tree
    for step in location[:-1]:
        inner = _child(parent, step)
        if inner is None:
            return parent.place
        parent = inner
    if isinstance(parent, Mapping) and location[-1] in parent.keys:
        return parent.keys[str(location[-1])]
    return parent.place


def _follows(detail: ErrorDetails, errors: list[ErrorDetails], unknown: list[Location]) -> bool:
    """Whether it only says again what something more precise says: a list short of the items that are wrong,
    or a profile that lacks what a misspelt key would have brought.
    """
    location = detail["loc"]
    if detail["type"] == "too_short":
        return any(len(one["loc"]) > len(location) and one["loc"][: len(location)] == location for one in errors)
    return not location and any(len(one) == 1 for one in unknown)


def _child(tree: Tree, step: str | int) -> Tree | None:
    if isinstance(tree, Mapping) and isinstance(step, str):
        return tree.entries.get(step)
    if isinstance(tree, Sequence) and isinstance(step, int) and step < len(tree.items):
        return tree.items[step]
    return None


def _without(tree: Tree, unknown: list[Location], at: Location = ()) -> Tree:
    if isinstance(tree, Mapping):
        kept = {k: _without(v, unknown, (*at, k)) for k, v in tree.entries.items() if (*at, k) not in unknown}
        return Mapping(tree.place, kept, tree.keys)
    if isinstance(tree, Sequence):
        return Sequence(tree.place, tuple(_without(v, unknown, (*at, i)) for i, v in enumerate(tree.items)))
    return tree


_RENAMED = {"after_idle": "idle_ttl", "weights_to": "keep"}
"""Keys of `sleep` that older profiles have, and what they are called now."""


def _unknown_key(location: Location) -> str:
    if location[-2:-1] == ("sleep",) and location[-1] in _RENAMED:
        return f'unknown key "{location[-1]}"; did you mean "{_RENAMED[str(location[-1])]}"?'
    known = _fields_at(location[:-1])
    if not location[:-1]:
        known = ["extends", *known]
    return f'unknown key "{location[-1]}"; {nearest(str(location[-1]), known)}'


def _fields_at(location: Location) -> list[str]:
    section: type[BaseModel] = Profile
    for step in location:
        if isinstance(step, str):
            section = _section_in(section.model_fields[step].annotation)
    return list(section.model_fields)


def _section_in(annotation: typing.Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_in(inner) for inner in typing.get_args(annotation) if inner is not type(None))


def _problems(tree: Tree, detail: ErrorDetails) -> list[Problem]:
    location = detail["loc"]
    context = detail.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, Impossible):
        unknown = [Problem(key_place(tree, (*location, *within)), text) for within, text in cause.unknown]
        return unknown + [Problem(value_place(tree, (*location, *within)), text) for within, text in cause.problems]
    if detail["type"] == "missing":
        return [Problem(value_place(tree, location), f'"{location[-1]}" is missing')]
    key = next((str(step) for step in reversed(location) if isinstance(step, str)), "the profile")
    return [Problem(value_place(tree, location), f'"{key}" {_complaint(detail, context)}')]


_MUST_BE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text (put it into quotes)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _complaint(detail: ErrorDetails, context: dict[str, typing.Any]) -> str:
    kind = detail["type"]
    given = shown(detail["input"])
    if kind in _MUST_BE:
        return f"must be {_MUST_BE[kind]}, not {given}"
    if kind in _LIMITS:
        words, limit = _LIMITS[kind]
        return f"must be {words} {context[limit]:g}, not {given}"
    if kind == "literal_error":
        choices = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return f"can't be {given}; {nearest(str(detail['input']), choices)}"
    if kind == "string_pattern_mismatch":
        allowed = "letters, digits, '.', '-' and '_', beginning with a letter or digit, at most 64"
        return f"can't be {given}: {allowed}"
    if kind == "value_error":
        return str(context["error"])
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
