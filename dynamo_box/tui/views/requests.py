"""What runs now, by request."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from dynamo_box.protocol.figures import FrontendFigures, RequestFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.model import Act, Cell, Column, Frame, Lines, Panel, Row, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import cells, decisions

_PHASES = {
    "queued": Cell("queued", Tone.WARN, "queued"),
    "routing": Cell("routing", Tone.WARN, "routing"),
    "prefill": Cell("prefill", Tone.ACCENT, "prefill"),
    "handover": Cell("handover", Tone.ACCENT, "handover"),
    "decode": Cell("decode", Tone.GOOD, "decode"),
}

_COLUMNS = (
    Column("request", "REQUEST", least=8, widest=40),
    cells.number_column("age", "AGE"),
    Column("phase", "PHASE", least=8, widest=16),
    Column("model", "MODEL", keep=1, least=6, widest=24),
    Column("prefill_worker", "PREFILL", keep=7, least=10, widest=36, help="who computes its prompt", tail=True),
    Column("worker", "WORKER", least=10, widest=36, tail=True),
    cells.number_column("prompt", "PROMPT", keep=5, help="tokens of the prompt, once it is tokenised"),
    cells.number_column("cached", "CACHED", keep=3, help="of these, tokens that were in the worker's KV cache"),
    cells.number_column("hit", "HIT", keep=4, help="cached tokens of the prompt's"),
    cells.number_column("output", "OUTPUT", help="tokens so far"),
    cells.number_column("rate", "TOK/S", keep=6, help="output tokens a second, lately"),
    cells.number_column("priority", "PRIORITY", keep=2),
)
_COLUMNS_OF_TWO_LEGS = tuple(
    replace(column, least=18) if column.key in ("prefill_worker", "worker") else column for column in _COLUMNS
)
"""Both workers' names are worth more than figures."""


class Requests:
    name = "requests"
    summary = "what runs now, by request"
    acts = (Act("x", "cancel", "cancel", "Cancel the request {row}? Its client gets an error."),)

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        live, active = _live(frame.snapshot)
        rank = any(request.priority for request in live)
        rows = [_row(request, frame, rank) for request in live]
        note = f"{len(rows):,} oldest of {active:,}" if active > len(rows) else ""
        empty = _silence(frame.snapshot)
        columns = _COLUMNS_OF_TWO_LEGS if any(request.prefill_worker for request in live) else _COLUMNS
        if not rows:
            columns = tuple(column for column in columns if column.key != "prefill_worker")
        return (cells.table("requests", "Requests", columns, rows, empty=empty, note=note),)

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        live, _ = _live(frame.snapshot)
        request = next((request for request in live if request.request_id == row), None)
        if request is None:
            return None
        lines = cells.facts(_facts(request, frame))
        router = decisions.router_of(frame.snapshot)
        for decision in reversed(router.decisions) if router is not None else ():
            if decision.request_id == row:
                lines += cells.section("Placement", decisions.lines(decision, frame.now))
        return Lines("request", one_line(row), tuple(lines))


VIEW = Requests()


def _live(snapshot: BoxSnapshot) -> tuple[tuple[RequestFigures, ...], int]:
    """The requests that frontends list, and how many there are."""
    live: tuple[RequestFigures, ...] = ()
    active = 0
    for process in snapshot.processes:
        if isinstance(process.figures, FrontendFigures):
            live += process.figures.live
            active += process.figures.active
    return live, active


def _silence(snapshot: BoxSnapshot) -> str:
    """Why there are no requests."""
    frontends = [process for process in snapshot.processes if process.kind == "frontend"]
    if not frontends:
        return "This box has no frontend."
    if any(isinstance(process.figures, FrontendFigures) for process in frontends):
        return "No request is running."
    return f"The frontend is {one_line(frontends[0].state)} and has reported nothing yet."


def _row(request: RequestFigures, frame: Frame, rank: bool) -> Row:
    cached = _cached_tokens(request)
    return Row(
        request.request_id,
        (
            cells.text(request.request_id),
            cells.seconds(frame.now - request.started),
            _PHASES.get(request.phase) or cells.text(request.phase),
            cells.name(request.model),
            cells.name(request.prefill_worker),
            cells.name(request.worker),
            _count(request.prompt_tokens or None),
            _count(cached),
            _share(cached, request.prompt_tokens),
            _count(request.output_tokens),
            cells.rate(frame.history.token_rate(request)),
            _count(request.priority) if rank else cells.ABSENT,
        ),
    )


def _facts(request: RequestFigures, frame: Frame) -> list[tuple[str, Cell]]:
    return [
        ("request", cells.text(request.request_id)),
        ("model", cells.text(request.model)),
        ("phase", _PHASES.get(request.phase) or cells.text(request.phase)),
        ("prefill worker", cells.text(request.prefill_worker)),
        ("worker", cells.text(request.worker)),
        ("started", cells.clock(request.started, frame.now)),
        ("age", cells.seconds(frame.now - request.started)),
        ("prompt tokens", cells.count(request.prompt_tokens or None)),
        ("cached tokens", cells.count(_cached_tokens(request))),
        ("hit rate", _share(_cached_tokens(request), request.prompt_tokens)),
        ("output tokens", cells.count(request.output_tokens)),
        ("tokens/s", cells.rate(frame.history.token_rate(request))),
        ("priority", cells.count(request.priority) if request.priority else cells.ABSENT),
    ]


def _cached_tokens(request: RequestFigures) -> int | None:
    """None before the first token, which brings the news."""
    return request.cached_tokens if request.output_tokens or request.cached_tokens else None


@lru_cache(4096)
def _count(value: int | None) -> Cell:
    """Most of a table's numbers are those of the frame before, or of another row."""
    return cells.count(value)


@lru_cache(4096)
def _share(part: int | None, whole: int) -> Cell:
    return cells.ABSENT if part is None else cells.percent(cells.ratio(part, whole))
