"""`dynbox help TOPIC`: a page of the manual, as it lies in `dynamo_box/help/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dynamo_box.cli import complete, output, terminal
from dynamo_box.cli.names import did_you_mean
from dynamo_box.errors import ExitCode, UsageError

app = complete.verb()

PAGES = Path(__file__).parent.parent / "help"


@app.command("help")
def show(
    topic: Annotated[
        str | None,
        typer.Argument(help="A topic; without one, the list of them.", autocompletion=complete.topics),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> ExitCode:
    """Read a page of the manual."""
    if topic is None:
        titles = {name: title(name) for name in topics()}
        if as_json:
            output.json(titles)
        else:
            output.text("\n".join(f"  dynbox help {name:<16}{text}" for name, text in titles.items()))
        return ExitCode.OK
    if topic not in topics():
        raise UsageError(f"there is no page {topic!r}", remedy=did_you_mean(topic, topics(), kind="topics"))
    page = (PAGES / f"{topic}.md").read_text()
    if as_json:
        output.json({"topic": topic, "text": page})
    else:
        output.text(_styled(page) if terminal.has_colour(sys.stdout) else page.rstrip())
    return ExitCode.OK


def topics() -> list[str]:
    return sorted(path.stem for path in PAGES.glob("*.md"))


def title(topic: str) -> str:
    """The first line of a page, which is its heading."""
    with (PAGES / f"{topic}.md").open() as page:
        return page.readline().lstrip("# ").rstrip()


def _styled(page: str) -> str:
    """Markdown reads well as it is; headings in bold make it quicker to scan."""
    return "\n".join(
        terminal.style(line.lstrip("# "), "bold", sys.stdout) if line.startswith("#") else line
        for line in page.rstrip().splitlines()
    )
