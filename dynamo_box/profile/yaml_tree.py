"""YAML text as a tree of plain values that remember where they stand.

Scalars stay text until `typed`, so that `${…}` can be filled in first. The file may come from anyone: its
size, its depth and what its aliases unfold to are bounded, tags are refused, and a key may appear once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from dynamo_box.profile.wording import escaped

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 40

Scalar = str | int | float | bool | None
_CORE = "tag:yaml.org,2002:"
_CORE_TAGS = frozenset(_CORE + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq"))


class Place(NamedTuple):
    """Line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Problem(NamedTuple):
    place: Place
    text: str

    def __str__(self) -> str:
        return escaped(f"{self.place}: {self.text}")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar as written; `plain` is False where quotes or a block style make it a text."""

    place: Place
    text: str
    plain: bool = True


@dataclass(frozen=True, slots=True)
class Sequence:
    place: Place
    items: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    """`keys` says where each key of `entries` stands."""

    place: Place
    entries: dict[str, Tree]
    keys: dict[str, Place]


Tree = Leaf | Sequence | Mapping


class Unreadable(Exception):
    """The text can't be read as a tree; all that is wrong with it, as far as reading came."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def read_tree(data: bytes, file: str) -> Mapping:
    """The one YAML mapping in `data`; `file` is what problems call it.

    Raises:
        Unreadable: it isn't one, or goes beyond a limit.
    """
    start = Place(file, 1, 1)
    if len(data) > MAX_BYTES:
        raise Unreadable(Problem(start, f"larger than {MAX_BYTES // 1024} KiB: this is no profile"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise Unreadable(Problem(Place(file, line, column), "not UTF-8 text: this is no profile")) from error
    node = _compose(text, file)
    if node is None or (isinstance(node, ScalarNode) and node.tag == _CORE + "null"):
        raise Unreadable(Problem(start, "empty: a profile names at least a model"))
    if not isinstance(node, MappingNode):
        raise Unreadable(Problem(_place(node, file), "a profile is a mapping of keys to values"))
    builder = _Builder(file)
    tree = builder.build(node, ())
    if builder.problems or not isinstance(tree, Mapping):
        raise Unreadable(*builder.problems)
    return tree


def typed(leaf: Leaf) -> Scalar:
    """What YAML 1.2 takes the scalar for; dates stay text."""
    if not leaf.plain:
        return leaf.text
    kind = _tag_of(leaf.text).removeprefix(_CORE)
    if kind == "null":
        return None
    if kind == "bool":
        return leaf.text.lower() == "true"
    if kind == "int":
        return _integer(leaf.text)
    if kind == "float":
        return float(leaf.text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return leaf.text


def plain_data(tree: Tree) -> object:
    """The tree without its places; sequences become tuples."""
    if isinstance(tree, Leaf):
        return typed(tree)
    if isinstance(tree, Sequence):
        return tuple(plain_data(item) for item in tree.items)
    return {key: plain_data(value) for key, value in tree.entries.items()}


_resolver = YAML(typ="safe", pure=True).resolver


def _tag_of(text: str) -> str:
    return str(_resolver.resolve(ScalarNode, text, (True, False)))


def _integer(text: str) -> int | str:
    digits = text.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2].lower(), 10)
    try:
        return sign * int(digits if base == 10 else digits[2:], base)
    except ValueError:  # more digits than Python converts
        return text


def _compose(text: str, file: str) -> Node | None:
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
        hint = " (indent with spaces)" if "\\t" in str(error.problem) else ""
        raise Unreadable(Problem(place, f"not YAML: {error.problem}{hint}")) from error
    except ReaderError as error:
        before = text[: error.position]
        place = Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise Unreadable(Problem(place, "a control character: this is no profile")) from error
    except RecursionError as error:
        raise Unreadable(Problem(Place(file, 1, 1), f"nested deeper than {MAX_DEPTH} levels")) from error
    except (YAMLError, ValueError) as error:
        raise Unreadable(Problem(Place(file, 1, 1), f"not YAML: {error}")) from error
    return node


def _place(node: Node, file: str) -> Place:
    return Place(file, node.start_mark.line + 1, node.start_mark.column + 1)


class _Builder:
    """Walks ruamel's nodes. An alias is the node it names, so visits are what has to be counted."""

    def __init__(self, file: str) -> None:
        self.problems: list[Problem] = []
        self._file = file
        self._visits = 0

    def build(self, node: Node, above: tuple[int, ...]) -> Tree:
        place = _place(node, self._file)
        self._visits += 1
        if self._visits > MAX_VALUES:
            raise Unreadable(Problem(place, f"more than {MAX_VALUES} values once its aliases are followed"))
        if id(node) in above:
            raise Unreadable(Problem(place, "an alias that contains itself"))
        if len(above) >= MAX_DEPTH:
            raise Unreadable(Problem(place, f"nested deeper than {MAX_DEPTH} levels"))
        if node.tag not in _CORE_TAGS:
            self.problems.append(Problem(place, f"tags such as {node.tag} aren't used in profiles"))
        if isinstance(node, MappingNode):
            return self._mapping(node, place, (*above, id(node)))
        if isinstance(node, SequenceNode):
            return Sequence(place, tuple(self.build(item, (*above, id(node))) for item in node.value))
        unquoted = getattr(node, "style", None) is None
        return Leaf(place, node.value, plain=unquoted and node.tag == _tag_of(node.value))  # else `!!str 1`

    def _mapping(self, node: MappingNode, place: Place, above: tuple[int, ...]) -> Mapping:
        entries: dict[str, Tree] = {}
        keys: dict[str, Place] = {}
        for key_node, value_node in node.value:
            at = _place(key_node, self._file)
            if not isinstance(key_node, ScalarNode):
                self.problems.append(Problem(at, "a key must be a word"))
                continue
            key = key_node.value
            value = self.build(value_node, above)
            if key in entries:
                first = keys[key]
                self.problems.append(Problem(at, f'"{key}" is here twice (first in line {first.line})'))
                continue
            entries[key] = value
            keys[key] = at
        return Mapping(place, entries, keys)
