"""Names that a person mistyped, and the ones they may have meant."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(wrong: str, known: Iterable[str], *, kind: str) -> str:
    """A remedy: the nearest names, else all there are, else that there are none."""
    import difflib

    names = sorted(set(known))
    if not names:
        return f"there are no {kind} yet"
    near = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5) or [name for name in names if wrong in name]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"{kind}: {', '.join(names)}"
