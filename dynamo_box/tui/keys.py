"""The keys that work everywhere, in one table: the bindings, the last line and the help come from it."""

from __future__ import annotations

from typing import NamedTuple

from dynamo_box.tui.screens import SCREENS


class Key(NamedTuple):
    """`key` in Textual's words, `shown` as people write it. `hint` is what the last line says, if it names the key.
    `first`: it is looked at before any widget gets it.
    """

    key: str
    id: str
    action: str
    shown: str
    hint: str
    help: str
    first: bool = False


SCREEN_KEYS = tuple(
    Key(each.key, f"screen.{each.name}", f"screen({each.name!r})", each.key, "", f"{each.name}: {each.summary}")
    for each in SCREENS
)

KEYS: tuple[Key, ...] = (
    Key("slash", "filter", "filter", "/", "filter", "show what matches a regular expression; ! turns it round", True),
    Key("s", "sort", "sort", "s", "sort", "sort by the next column, or click its head"),
    Key("S", "sort.reverse", "sort_reverse", "S", "", "turn the order round"),
    Key("space", "pause", "pause", "space", "pause", "hold the screen still; the box goes on"),
    Key("enter", "detail", "detail", "enter", "detail", "all about the row under the cursor"),
    Key("tab", "table.next", "focus_next", "tab", "", "go to the next table"),
    Key("shift+tab", "table.previous", "focus_previous", "shift+tab", "", "go to the table before"),
    Key("up,k", "row.up", "move(-1)", "↑ k", "", "up"),
    Key("down,j", "row.down", "move(1)", "↓ j", "", "down"),
    Key("pageup", "page.up", "page(-1)", "page up", "", "a page up"),
    Key("pagedown", "page.down", "page(1)", "page down", "", "a page down"),
    Key("home,g", "row.first", "move(-1000000)", "home g", "", "first row"),
    Key("end,G", "row.last", "move(1000000)", "end G", "", "last row"),
    Key("escape", "clear", "clear", "esc", "", "clear the filter; close what is open"),
    Key("t", "theme", "theme", "t", "", "dark, light, no colour"),
    Key("question_mark", "help", "help", "?", "help", "this page"),
    Key("ctrl+p", "palette", "command_palette", "ctrl+p", "", "find a screen or an act by name"),
    Key("ctrl+z", "suspend", "suspend_process", "ctrl+z", "", "back to the shell; `fg` goes on here", first=True),
    Key("q", "quit", "quit", "q", "quit", "leave; the box stays as it is"),
    Key("ctrl+c", "quit.now", "quit", "ctrl+c", "", "leave, from anywhere", first=True),
)

SEEK_KEYS = (
    Key("left", "replay.back", "seek(-5)", "←", "", "5 s back"),
    Key("right", "replay.forward", "seek(5)", "→", "seek", "5 s forward"),
    Key("left_square_bracket", "replay.slower", "speed(0.5)", "[", "", "half the speed"),
    Key("right_square_bracket", "replay.faster", "speed(2)", "]", "speed", "twice the speed"),
)

OF_TABLES = frozenset({"sort", "sort.reverse", "table.next", "table.previous"})
"""Keys, by id, that mean nothing to the logs."""
