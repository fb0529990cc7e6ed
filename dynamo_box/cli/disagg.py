"""`dynbox disagg`: which requests go in two legs, and how that goes; `--policy` changes it while the box runs."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from dynamo_box.cli import complete, output, render
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode, NotRunning, UsageError
from dynamo_box.paths import run_dir
from dynamo_box.protocol.figures import RouterFigures, WorkerFigures
from dynamo_box.protocol.spec import Disagg, DisaggPolicy
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo

app = complete.verb()

ROUTER = "router"
CONDITIONAL = "conditional"
POLICIES = get_args(DisaggPolicy)
_HEADER = ("WORKER", "MODEL", "ROLE", "STATE", "COMPUTED", "HANDED OVER", "TAKEN OVER", "FAILED", "HAND-OVER")


@app.command()
def disagg(
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help="strict, fallback or conditional (also with its thresholds: conditional:min_uncached_tokens=512).",
            autocompletion=complete.disagg_policies,
        ),
    ] = None,
    min_uncached_tokens: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Two legs from so many tokens to compute on (conditional).")
    ] = None,
    min_uncached_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="X", help="Two legs from this share of a prompt to compute on."),
    ] = None,
    max_prefill_tokens: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Tokens that may wait at a prefill worker for one more.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print policy and workers as JSON.")] = False,
) -> ExitCode:
    """Show when prompts are computed on prefill workers and answers on decode workers, or change it.

    What is changed holds until `dynbox down`; requests that run are left as they are.
    """
    thresholds = {
        "min_uncached_tokens": min_uncached_tokens,
        "min_uncached_share": min_uncached_share,
        "max_prefill_tokens": max_prefill_tokens,
    }
    given: dict[str, float] = {name: value for name, value in thresholds.items() if value is not None}
    with ControlClient.connect(run_dir()) as client:
        snapshot = client.snapshot()
        if policy is None and not given:
            show(snapshot, as_json=as_json)
            return ExitCode.OK
        in_force = client.set_option(ROUTER, "disagg", _setting(policy, given, snapshot)).removeprefix("disagg ")
    if as_json:
        output.json({"disagg": in_force})
    else:
        output.text(f"policy {in_force}, for requests from now on")
    return ExitCode.OK


def _setting(policy: str | None, given: dict[str, float], snapshot: BoxSnapshot) -> str:
    """As the router takes it.

    Raises:
        UsageError: thresholds without the policy that has them, or a policy that is none.
    """
    name = (policy or _router(snapshot).disagg_settings.policy).partition(":")[0]
    if name not in POLICIES:
        raise UsageError(f"there is no policy {name!r}", remedy=f"there are {', '.join(POLICIES)}")
    if given and name != CONDITIONAL:
        raise UsageError(
            f"policy {name} has no thresholds", remedy=f"add --policy {CONDITIONAL}, or leave the thresholds out"
        )
    if given and policy is not None and ":" in policy:
        raise UsageError("thresholds are given twice: in --policy and beside it", remedy="give them once")
    if not given:
        return policy or name
    return f"{name}:{','.join(f'{key}={value:.10g}' for key, value in given.items())}"


def _router(snapshot: BoxSnapshot) -> RouterFigures:
    """Raises:
    NotRunning: there is none that says anything.
    """
    for process in snapshot.processes:
        if isinstance(process.figures, RouterFigures):
            return process.figures
    raise NotRunning("the router doesn't answer just now", remedy="see `dynbox ps`")


def show(snapshot: BoxSnapshot, *, as_json: bool) -> None:
    settings = _router(snapshot).disagg_settings
    workers = [process for process in snapshot.processes if process.kind == "worker"]
    if as_json:
        output.json({"disagg": settings, "workers": [_plain(process) for process in workers]})
        return
    output.text(_words(settings))
    if not any(process.role in ("prefill", "decode") for process in workers):
        output.text("no worker has a role of its own, so all requests go in one leg; see `dynbox help disagg`")
    output.table("\n" + render.table(_HEADER, map(_row, workers), right=range(4, len(_HEADER))))


def _words(settings: Disagg) -> str:
    if settings.policy == "strict":
        return "policy strict: every request goes in two legs, or it fails"
    if settings.policy == "fallback":
        return "policy fallback: every request goes in two legs where that works, else in one"
    return (
        f"policy conditional: in two legs go prompts with {settings.min_uncached_tokens:,} tokens to compute and more, "
        f"which are {settings.min_uncached_share:.0%} of it at least, unless {settings.max_prefill_tokens:,} wait"
    )


def _row(process: ProcessInfo) -> tuple[str, ...]:
    figures = process.figures
    head = (process.name, process.model or "-", process.role or "-", process.state)
    if not isinstance(figures, WorkerFigures):
        return (*head, "-", "-", "-", "-", "-")
    took = f"{1000 * figures.handover_seconds / figures.handed_over:.0f} ms" if figures.handed_over else "-"
    return (
        *head,
        f"{figures.computed_prompt_tokens:,}",
        f"{figures.handed_over:,}",
        f"{figures.taken_over:,}",
        f"{figures.transfers_failed:,}",
        took,
    )


def _plain(process: ProcessInfo) -> dict[str, object]:
    found: dict[str, object] = {
        "name": process.name,
        "model": process.model,
        "role": process.role,
        "state": process.state,
    }
    if isinstance(figures := process.figures, WorkerFigures):
        counts = ("computed_prompt_tokens", "handed_over", "taken_over", "handover_seconds", "transfers_failed")
        found |= {name: getattr(figures, name) for name in counts}
    return found
