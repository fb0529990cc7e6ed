"""`dynbox help TOPIC`: a page of the manual, as it lies in `dynamo_box/help/`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dynamo_box.cli import complete, output, terminal
from dynamo_box.cli.manual import page, title, topics
from dynamo_box.cli.names import did_you_mean
from dynamo_box.errors import ExitCode, UsageError

app = complete.verb()


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
            output.text("\n".join(f"  dynbox help {name:<16}{words}" for name, words in titles.items()))
        return ExitCode.OK
    if topic not in topics():
        raise UsageError(f"there is no page {topic!r}", remedy=did_you_mean(topic, topics(), kind="topics"))
    text = page(topic)
    if as_json:
        output.json({"topic": topic, "text": text})
    else:
        output.text(_styled(text) if terminal.has_colour(sys.stdout) else text.rstrip())
    return ExitCode.OK


def _styled(page: str) -> str:
    """Markdown reads well as it is; headings in bold make it quicker to scan."""
    return "\n".join(
        terminal.style(line.lstrip("# "), "bold", sys.stdout) if line.startswith("#") else line
        for line in page.rstrip().splitlines()
    )
