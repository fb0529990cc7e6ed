"""`dynbox doctor`: this machine and what a box needs of it, each with the command that mends it."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_box.cli import complete, output, terminal
from dynamo_box.cli.progress import Display, Row, make_display
from dynamo_box.errors import ExitCode
from dynamo_box.paths import home, run_dir
from dynamo_box.wording import printable

if TYPE_CHECKING:
    from dynamo_box.doctor.examine import Check
    from dynamo_box.doctor.finding import Finding
    from dynamo_box.doctor.machine import Machine
    from dynamo_box.doctor.mend import Mended
    from dynamo_box.doctor.models import Progress

app = complete.verb()

SCHEMA_VERSION = 1

_STYLES = {"pass": "green", "warn": "yellow", "fail": "red", "skip": "dim"}
_INDENT = "  "
_NAME_COLUMNS = 24
_LEAST_COLUMNS = 60
_TELL_BYTES = 64 << 20


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Clear up what dead boxes and pulls of yours left.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Read every model and compare checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> ExitCode:
    """Check this machine and what a box needs of it. Exit code 1 if something failed, 0 with warnings."""
    from dynamo_box.doctor.checks import all_checks
    from dynamo_box.doctor.examine import examine
    from dynamo_box.doctor.finding import Status, overall
    from dynamo_box.doctor.machine import Machine

    machine = Machine(run_dir(), home())
    display = make_display(as_json=False)
    checks = all_checks(_progress(display) if deep else None)
    findings = examine(checks, machine)
    display.close()
    mended = None
    if fix:
        findings, mended = _fix(checks, machine, findings)
    if as_json:
        output.json(_as_data(findings, mended))
    else:
        columns = terminal.width() if sys.stdout.isatty() else None
        output.text("\n".join((*_table(findings, columns), *_deeds(mended), _summary(findings))))
    return ExitCode.FAILED if overall(findings) is Status.FAIL else ExitCode.OK


def _fix(
    checks: Sequence[Check], machine: Machine, findings: tuple[Finding, ...]
) -> tuple[tuple[Finding, ...], Mended]:
    """Mend, and look again at what mending may have changed."""
    from dynamo_box.doctor.examine import examine
    from dynamo_box.doctor.mend import MENDED_AREAS, mend

    mended = mend(machine, findings)
    if not mended.done:
        return findings, mended
    again = examine([check for check in checks if check.area in MENDED_AREAS], machine)
    areas = list(dict.fromkeys(check.area for check in checks))
    kept = [finding for finding in findings if finding.area not in MENDED_AREAS]
    return tuple(sorted((*kept, *again), key=lambda finding: areas.index(finding.area))), mended


def _table(findings: Sequence[Finding], columns: int | None) -> Iterator[str]:
    """Grouped by area. Lines are clipped to `columns`, if any; what is wrong is wrapped, and commands stay whole."""
    names = min(max(len(finding.name) for finding in findings), _NAME_COLUMNS)
    for area, group in groupby(findings, key=lambda finding: finding.area):
        yield terminal.style(area.upper(), "bold", sys.stdout)
        for finding in group:
            yield from _lines(finding, names, columns)


def _lines(finding: Finding, names: int, columns: int | None) -> Iterator[str]:
    status = terminal.style(finding.status.value, _STYLES[finding.status], sys.stdout)
    margin = len(_INDENT) + len(finding.status) + 2 + names + 2
    room = 0 if columns is None else max(columns, _LEAST_COLUMNS) - margin
    found = printable(finding.found).replace("\n", " ")
    if not finding.why:
        text = [terminal.clip(found, room) if room else found]
    else:
        text = [*_wrapped(found, room), *_wrapped(printable(finding.why), room)]
    yield f"{_INDENT}{status}  {printable(finding.name).ljust(names)}  {text[0]}".rstrip()
    for line in text[1:]:
        yield " " * margin + line
    if finding.command:
        yield " " * margin + terminal.style(f"$ {printable(finding.command)}", "bold", sys.stdout)


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, columns, break_on_hyphens=False) if columns else [text]


def _deeds(mended: Mended | None) -> Iterator[str]:
    """What `--fix` did and what it left."""
    if mended is None:
        return
    yield terminal.style("FIX", "bold", sys.stdout)
    if not mended.done and not mended.left:
        yield f"{_INDENT}nothing of yours to clear up"
    yield from (f"{_INDENT}{terminal.style('done', 'green', sys.stdout)}  {printable(deed)}" for deed in mended.done)
    yield from (f"{_INDENT}{terminal.style('left', 'yellow', sys.stdout)}  {printable(deed)}" for deed in mended.left)


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status.value for finding in findings)
    words = {"fail": "failed", "warn": "to look at", "pass": "fine", "skip": "skipped"}
    return ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])


def _as_data(findings: Sequence[Finding], mended: Mended | None) -> dict[str, Any]:
    """The same shape with and without `--fix`; it only gains fields within one `version`."""
    from dynamo_box.doctor.finding import overall

    return {
        "version": SCHEMA_VERSION,
        "status": overall(findings),
        "findings": [
            {
                "area": finding.area,
                "name": finding.name,
                "status": finding.status,
                "found": finding.found,
                "why": finding.why or None,
                "command": finding.command or None,
                "fixable": finding.fixable,
            }
            for finding in findings
        ],
        "done": mended.done if mended else [],
        "left": mended.left if mended else [],
    }


def _progress(display: Display) -> Progress:
    """Tells of each model that is read, every _TELL_BYTES and at its end."""
    from dynamo_box.doctor.models import READ_BYTES

    def show(model: str, done: int, total: int) -> None:
        if done == total or done % _TELL_BYTES < READ_BYTES:
            display.update([Row(model, "checking", "checksums", done, total, "bytes")])

    return show
