"""Where requests go, and why: hit rate by worker over time, shares of traffic, and the router's latest decisions."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_box import wording
from dynamo_box.protocol.figures import RouterFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui import legs, tiers
from dynamo_box.tui.history import BUCKET_S, KEPT_BUCKETS, Bucket, History
from dynamo_box.tui.model import Act, Frame, Lines, Panel, Span, Table, Tone
from dynamo_box.tui.text import fill, one_line, width_of
from dynamo_box.tui.views import cells, charts, decisions, sources
from dynamo_box.tui.views.cells import Line

MAX_ROWS = 10
"""Of more workers, those with the most requests have a row."""
NOW_BUCKETS = 2
"""What "now" is: the bucket that is being filled, and the one before it."""

_WIDEST_NAME = 24
_LEAST_HEAT = 8
_SHARE_BAR = 10


class Routing:
    name = "routing"
    summary = "where requests go, and why"
    acts = (
        Act("m", "mode", "router mode", needs_row=False),
        Act("p", legs.POLICY, "disagg policy", needs_row=False, of=legs.SPLIT),
    )

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        router = decisions.router_of(frame.snapshot)
        traffic = charts.clipped(_traffic(frame, router, width), width)
        table = _table(frame, router)
        return (Lines("traffic", "Traffic", traffic), table) if traffic else (table,)

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        router = decisions.router_of(frame.snapshot)
        has_tiers = tiers.process_of(frame.snapshot) is not None
        for decision in router.decisions if router is not None else ():
            if decisions.row_key(decision) == row:
                return Lines(
                    "decision",
                    one_line(decision.request_id),
                    tuple(decisions.lines(decision, frame.now, tiers=has_tiers)),
                )
        return None


VIEW = Routing()


def _table(frame: Frame, router: RouterFigures | None) -> Table:
    made = router.decisions[::-1] if router is not None else ()
    has_tiers = tiers.process_of(frame.snapshot) is not None
    rows = [decisions.row(decision, frame.now, tiers=has_tiers) for decision in made]
    note = f"latest {len(rows)} of {router.routed:,}" if router is not None and rows else ""
    columns = decisions.COLUMNS_OF_TWO_LEGS if any(each.prefill for each in made) else decisions.COLUMNS
    if not rows:
        absent = ("prefill", *(() if has_tiers else decisions.OF_TIERS))
        columns = tuple(column for column in columns if column.key not in absent)
    return cells.table("decisions", "Decisions", columns, rows, empty=_silence(frame.snapshot, router), note=note)


def _silence(snapshot: BoxSnapshot, router: RouterFigures | None) -> str:
    """Why there are no decisions."""
    if router is not None:
        return "The router has placed no request yet."
    process = next((process for process in snapshot.processes if process.kind == "router"), None)
    if process is None:
        return "This box has no router."
    return f"The router is {one_line(process.state)} and has reported nothing yet."


# traffic


@dataclass(frozen=True)
class _Worker:
    """A worker over the buckets that are shown."""

    name: str
    buckets: list[Bucket | None]
    requests: int
    hit_rate_now: float | None


def _traffic(frame: Frame, router: RouterFigures | None, width: int) -> list[Line]:
    has_tiers = tiers.process_of(frame.snapshot) is not None
    lines = [] if router is None else charts.flowing(_summary(router, has_tiers, legs.is_split(frame.snapshot)), width)
    names = _names(frame)
    if has_tiers:
        lines.append(sources.lately(names, frame.history, NOW_BUCKETS, width))
    if not names:
        return lines
    name_width = min(max(width_of(one_line(name)) for name in names), _WIDEST_NAME, max(width // 3, 1))
    shown, bar = _layout(width - name_width)
    workers = [_worker(name, frame.history, shown) for name in names]
    total = sum(worker.requests for worker in workers)
    rows = _busiest(workers)
    lines.append(_heads(name_width, shown, bar, frame.history.watched_s))
    lines.extend(_row(worker, total, name_width, bar) for worker in rows)
    if len(rows) < len(workers):
        rest = total - sum(worker.requests for worker in rows)
        lines.append(cells.remark(f"… and {len(workers) - len(rows)} more with {rest:,} requests"))
    lines.append(_legend())
    return lines


def _summary(router: RouterFigures, has_tiers: bool, is_split: bool) -> list[Line]:
    facts = [
        ("mode", cells.text(router.mode, Tone.ACCENT)),
        *([("policy", cells.text(legs.policy_of(router), Tone.ACCENT))] if is_split and router.disagg else ()),
        ("hit rate", cells.percent(router.hit_rate)),
        ("routed", cells.count(router.routed)),
        ("active", cells.count(router.active_requests)),
        ("indexed", cells.count(router.indexed_blocks)),
        *(_tiers(router) if has_tiers else ()),
        ("resyncs", cells.count(router.resyncs, Tone.WARN if router.resyncs else Tone.PLAIN)),
    ]
    if router.expired_leases:
        facts.append(("expired leases", cells.count(router.expired_leases, Tone.WARN)))
    return [(Span(f"{label} ", Tone.DIM), Span(cell.text, cell.tone)) for label, cell in facts]


def _tiers(router: RouterFigures) -> list[cells.Fact]:
    """What the router knows of the tiers. While it doesn't hear from them, it gives no credit for them."""
    if not router.tiers_connected:
        return [("tiers", cells.text("not connected", Tone.WARN))]
    return [
        ("in host", cells.count(router.host_blocks, Tone.HOST)),
        ("on disk", cells.count(router.disk_blocks, Tone.DISK)),
    ]


def _names(frame: Frame) -> list[str]:
    """Workers of the box, then those that are gone and still have a past."""
    present = [process.name for process in frame.snapshot.processes if process.kind == "worker"]
    gone = sorted(name for name, buckets in frame.history.workers.items() if buckets and name not in set(present))
    return present + gone


def _layout(room: int) -> tuple[int, int]:
    """Columns for the heat map and for the bar of the share, of which the bar goes first."""
    figures = len("  NOW") + len(" SHARE") + len(" REQUESTS") + 1
    shown = room - figures - _SHARE_BAR
    if shown >= 2 * _LEAST_HEAT:
        return min(shown, KEPT_BUCKETS), _SHARE_BAR
    return max(room - figures, 1), 0


def _worker(name: str, history: History, shown: int) -> _Worker:
    buckets = history.recent(name, shown)
    lately = Bucket(history.newest)
    for bucket in buckets[-NOW_BUCKETS:]:
        if bucket is not None:
            lately.prompt_tokens += bucket.prompt_tokens
            lately.cached_tokens += bucket.cached_tokens
    return _Worker(name, buckets, sum(bucket.requests for bucket in buckets if bucket), lately.hit_rate)


def _busiest(workers: list[_Worker]) -> list[_Worker]:
    """At most MAX_ROWS, in their order, so that rows don't jump about as long as they stay."""
    if len(workers) <= MAX_ROWS:
        return workers
    names = {worker.name for worker in sorted(workers, key=lambda worker: -worker.requests)[:MAX_ROWS]}
    return [worker for worker in workers if worker.name in names]


def _heads(name_width: int, shown: int, bar: int, watched_s: float) -> Line:
    """What was before anyone watched is not there, and the heads say so."""
    span_s = shown * BUCKET_S
    if watched_s < span_s:
        time = wording.duration(watched_s)
        phrases = (f"hit rate, watched for {time}", f"watched {time}", time)
    else:
        time = wording.duration(span_s)
        phrases = (f"hit rate, the last {time}", f"last {time}", time)
    words = next((phrase for phrase in phrases if len(phrase) <= shown), "")
    share = fill("SHARE", bar + len(" SHARE"), right=True)
    return (Span(fill("WORKER", name_width) + " " + fill(words, shown) + f"  NOW{share} REQUESTS", Tone.DIM),)


def _row(worker: _Worker, total: int, name_width: int, bar: int) -> Line:
    now = cells.percent(worker.hit_rate_now)
    share = cells.ratio(worker.requests, total)
    filled = round((share or 0.0) * bar)
    return (
        Span(fill(one_line(worker.name), name_width, front=True) + " "),
        *charts.heat([None if bucket is None else bucket.hit_rate for bucket in worker.buckets]),
        Span(fill(now.text, len("  NOW"), right=True), now.tone),
        Span(" " * bool(bar) + "━" * filled, Tone.ACCENT),
        Span("─" * (bar - filled), Tone.DIM),
        Span(fill(_share(share), len(" SHARE") - bool(bar), right=True)),
        Span(fill(f"{worker.requests:,}", len(" REQUESTS"), right=True)),
    )


def _share(share: float | None) -> str:
    return "-" if share is None else cells.percentage(share)


def _legend() -> Line:
    line: Line = (Span("cached", Tone.DIM),)
    for number, (character, tone) in enumerate(charts.HEAT):
        edge = f"{number * 20}%" if number else "none"
        line = (*line, Span(f"  {character}", tone), Span(f" {edge}", Tone.DIM))
    return (*line, Span("  blank: no prompt", Tone.DIM))
