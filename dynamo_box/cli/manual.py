"""The pages of the manual: files in `dynamo_box/help/`."""

from __future__ import annotations

from pathlib import Path

_PAGES = Path(__file__).parent.parent / "help"


def topics() -> list[str]:
    return sorted(path.stem for path in _PAGES.glob("*.md"))


def title(topic: str) -> str:
    """The first line of a page, which is its heading."""
    with (_PAGES / f"{topic}.md").open() as page:
        return page.readline().lstrip("# ").rstrip()


def page(topic: str) -> str:
    return (_PAGES / f"{topic}.md").read_text()
