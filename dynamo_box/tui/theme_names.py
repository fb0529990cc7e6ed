"""Which theme, before anything that draws is imported."""

from __future__ import annotations

from collections.abc import Mapping

DARK, LIGHT, NONE = "dark", "light", "none"
THEME_NAMES = (DARK, LIGHT, NONE)


def default_theme(environment: Mapping[str, str]) -> str:
    """Without colour where the environment says so; light where the terminal says that its ground is (COLORFGBG)."""
    if environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return NONE
    ground = environment.get("COLORFGBG", "").rpartition(";")[2]
    return LIGHT if ground in ("7", "15") else DARK
