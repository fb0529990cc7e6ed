"""`${NAME}` and `${NAME:-default}` in the values of a profile; `$$` is a dollar sign.

The default also stands in for an empty variable, as in a shell. A value without quotes is typed after it is
filled in: `port: ${PORT:-8000}` is a number. What a variable holds is never read as YAML structure or
interpolated again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as Environ

from dynamo_box.profile.yaml_tree import Leaf, Mapping, Problem, Sequence, Tree

_REFERENCE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<broken>\{))"
)


def interpolate(tree: Tree, environ: Environ[str, str], problems: list[Problem]) -> Tree:
    """`tree` with every reference filled in; what can't be is left as it is and added to `problems`."""
    if isinstance(tree, Leaf):
        return _leaf(tree, environ, problems)
    if isinstance(tree, Sequence):
        return Sequence(tree.place, tuple(interpolate(item, environ, problems) for item in tree.items))
    entries = {key: interpolate(value, environ, problems) for key, value in tree.entries.items()}
    return Mapping(tree.place, entries, tree.keys)


def _leaf(leaf: Leaf, environ: Environ[str, str], problems: list[Problem]) -> Leaf:
    if "$" not in leaf.text:
        return leaf

    def fill(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        if match["broken"]:
            problems.append(Problem(leaf.place, "${ must be ${NAME} or ${NAME:-default}; a dollar sign is $$"))
            return match[0]
        value = environ.get(match["name"])
        if match["default"] is not None:
            return value or match["default"]
        if value is None:
            name = match["name"]
            problem = f"the environment variable {name} is not set; ${{{name}:-…}} gives a default"
            problems.append(Problem(leaf.place, problem))
            return match[0]
        return value

    return Leaf(leaf.place, _REFERENCE.sub(fill, leaf.text), leaf.plain)
