"""All that the box knows of one process."""

from __future__ import annotations

from dynamo_box.protocol.figures import (
    Decision,
    FrontendFigures,
    GmsFigures,
    KvStoreFigures,
    Latency,
    LayoutFigures,
    RouterFigures,
    WorkerFigures,
)
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.tui import layouts, legs
from dynamo_box.tui.history import BUCKET_S, Bucket, History
from dynamo_box.tui.model import Cell, Frame, Lines, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import cells, layout_table, tier_facts

KEY = "process"
EVENTS_SHOWN = 8
WINS_SHOWN = 5
RECENT_S = 60.0

_Fact = tuple[str, Cell]


def lines(process: ProcessInfo, frame: Frame) -> Lines:
    snapshot = frame.snapshot
    found = [
        *cells.facts(_identity(process)),
        *cells.section("Memory", cells.facts(_memory(process))),
        *cells.section("Figures", cells.facts(_figures(process, frame))),
        *cells.section("Legs", cells.facts(_legs(process, frame))),
        *_tiers(process, frame),
        *cells.section("Layouts", cells.facts(_layouts(process) or _mapped(process, snapshot))),
        *cells.section(
            "Says of itself",
            cells.facts((one_line(key), cells.text(value)) for key, value in process.info.items()),
        ),
        *cells.section("Latest routed to it", _wins(process.name, snapshot, frame.now)),
        *cells.section("Events", _events(process.name, snapshot, frame.now)),
    ]
    return Lines(KEY, one_line(process.name), tuple(found))


def _identity(process: ProcessInfo) -> list[_Fact]:
    return [
        ("kind", cells.text(process.kind)),
        ("model", cells.text(process.model)),
        ("role", _role(process)),
        ("state", cells.state_and_phase(process)),
        ("cause", cells.text(process.cause, Tone.DIM if process.state == "ready" else Tone.BAD)),
        ("device", cells.text(process.device)),
        ("pid", cells.pid(process.pid)),
        ("guard", cells.pid(process.guard_pid)),
        ("uptime", cells.seconds(process.uptime_s)),
        ("restarts", cells.count(process.restarts, Tone.WARN if process.restarts else Tone.PLAIN)),
    ]


def _role(process: ProcessInfo) -> Cell:
    """What it serves as now, and what was planned, if that is something else."""
    now = legs.role_of(process)
    return cells.text(now if not process.role or now == process.role else f"{now} (planned: {process.role})")


def _memory(process: ProcessInfo) -> list[_Fact]:
    facts = [("resident", cells.size(process.rss_bytes))]
    if isinstance(process.figures, WorkerFigures):
        facts += [
            ("weights", cells.size(process.figures.weights_bytes, Tone.WEIGHTS)),
            ("KV pool", cells.kv_pool(process.figures) if process.figures.kv_bytes is not None else cells.ABSENT),
            ("KV blocks", _blocks(process.figures)),
        ]
    elif isinstance(process.figures, KvStoreFigures):
        facts.append(("tables", cells.size(process.figures.metadata_bytes)))
    return [*facts, ("other", cells.size(cells.other_bytes(process), Tone.OTHER))]


def _blocks(worker: WorkerFigures) -> Cell:
    total = worker.kv_blocks_total
    if not total:
        return cells.ABSENT
    used, cached = worker.kv_blocks_used, worker.kv_blocks_cached
    return Cell(f"{used:,} used, {cached:,} cached, {max(total - used - cached, 0):,} free, of {total:,}")


def _figures(process: ProcessInfo, frame: Frame) -> list[_Fact]:
    match process.figures:
        case WorkerFigures() as worker:
            return _worker(
                worker, _latency_of(process.name, frame.snapshot), _recent_hit_rate(process.name, frame.history)
            )
        case RouterFigures() as router:
            return _router(router, legs.is_split(frame.snapshot))
        case FrontendFigures() as frontend:
            return _frontend(frontend)
        case GmsFigures() as gms:
            return _gms(gms)
        case KvStoreFigures() as store:
            return tier_facts.of_store(store)
        case None:
            return []


def _worker(worker: WorkerFigures, latency: Latency | None, recent_hit_rate: float | None) -> list[_Fact]:
    return [
        ("running", cells.count(worker.running)),
        ("waiting", cells.count(worker.waiting, Tone.WARN if worker.waiting else Tone.PLAIN)),
        ("tokens/s", cells.rate(worker.tokens_per_s)),
        ("prompt tokens", cells.count(worker.prompt_tokens)),
        ("cached tokens", cells.count(worker.cached_tokens)),
        ("output tokens", cells.count(worker.output_tokens)),
        ("hit rate", cells.percent(cells.ratio(worker.cached_tokens, worker.prompt_tokens))),
        ("in the last minute", cells.percent(recent_hit_rate)),
        ("requests", cells.count(worker.requests)),
        ("errors", cells.count(worker.errors, Tone.BAD if worker.errors else Tone.PLAIN)),
        ("steps", cells.count(worker.steps)),
        *_latency(latency),
    ]


def _legs(process: ProcessInfo, frame: Frame) -> list[_Fact]:
    """Of a worker in a box whose workers have roles, or that has ever passed on or taken on a request."""
    worker = process.figures
    if not isinstance(worker, WorkerFigures):
        return []
    if not (legs.is_split(frame.snapshot) or worker.handed_over or worker.taken_over or worker.transfers_failed):
        return []
    failed = worker.transfers_failed
    return [
        ("busy", cells.percent(frame.history.lately.busy(process))),
        ("handed over", cells.count(worker.handed_over)),
        ("mean time until held", cells.took(_mean(worker.handover_seconds, worker.handed_over))),
        ("taken over", cells.count(worker.taken_over)),
        ("prompt tokens computed", cells.count(worker.computed_prompt_tokens)),
        ("transfers failed", cells.count(failed, Tone.BAD if failed else Tone.PLAIN)),
    ]


def _mean(total: float, count: int) -> float | None:
    return total / count if count > 0 else None


def _tiers(process: ProcessInfo, frame: Frame) -> list[cells.Line]:
    """A store's tiers, or a worker's dealings with them."""
    match process.figures:
        case KvStoreFigures() as store:
            return tier_facts.sections_of_store(store, frame)
        case WorkerFigures(tiers=tiers) if tiers is not None:
            return tier_facts.sections_of_worker(tiers)
        case _:
            return []


def _router(router: RouterFigures, is_split: bool) -> list[_Fact]:
    return [
        ("mode", cells.text(router.mode)),
        ("disagg policy", cells.text(legs.policy_of(router)) if is_split else cells.ABSENT),
        ("workers", cells.text(", ".join(router.workers))),
        ("active requests", cells.count(router.active_requests)),
        ("routed", cells.count(router.routed)),
        ("hit rate", cells.percent(router.hit_rate)),
        ("indexed blocks", cells.count(router.indexed_blocks)),
        ("KV tiers", cells.text("connected" if router.tiers_connected else "")),
        ("blocks in host memory", cells.count(router.host_blocks, Tone.HOST) if router.host_blocks else cells.ABSENT),
        ("blocks on disk", cells.count(router.disk_blocks, Tone.DISK) if router.disk_blocks else cells.ABSENT),
        ("resyncs", cells.count(router.resyncs)),
        ("expired leases", cells.count(router.expired_leases)),
    ]


def _frontend(frontend: FrontendFigures) -> list[_Fact]:
    return [
        ("models", cells.text(", ".join(frontend.models))),
        ("active requests", cells.count(frontend.active)),
        ("requests", cells.count(frontend.requests)),
        ("errors", cells.count(frontend.errors, Tone.BAD if frontend.errors else Tone.PLAIN)),
        ("disconnected", cells.count(frontend.disconnected)),
        ("output tokens", cells.count(frontend.output_tokens)),
        ("tokens/s", cells.rate(frontend.tokens_per_s)),
        *_latency(Latency(frontend.ttft, frontend.itl)),
    ]


def _gms(gms: GmsFigures) -> list[_Fact]:
    return [
        ("on the device", cells.size_of(gms.device_bytes, gms.capacity_bytes, Tone.WEIGHTS)),
        ("in host memory", cells.size_of(gms.host_bytes, gms.host_capacity_bytes, Tone.WEIGHTS)),
        ("on disk", cells.size(gms.disk_bytes, Tone.WEIGHTS)),
        ("requests", cells.count(gms.requests)),
        ("refused", cells.count(gms.refused, Tone.WARN if gms.refused else Tone.PLAIN)),
    ]


def _layouts(process: ProcessInfo) -> list[_Fact]:
    """What a gms holds, a line for each layout."""
    if not isinstance(process.figures, GmsFigures):
        return []
    return [(one_line(each.name), layout_table.summary(each)) for each in process.figures.layouts]


def _mapped(process: ProcessInfo, snapshot: BoxSnapshot) -> list[_Fact]:
    """Layouts that the process holds a lock on, and which."""
    return [
        (one_line(each.layout.name), cells.text(f"{_access(each.layout, process.name)} of {each.service.name}"))
        for each in layouts.held(snapshot)
        if _access(each.layout, process.name)
    ]


def _access(layout: LayoutFigures, owner: str) -> str:
    if any(holder.owner == owner for holder in layout.readers):
        return "mapped, read-only, out"
    if layout.writer is not None and layout.writer.owner == owner:
        return "being written, out"
    return "waited for, out" if any(holder.owner == owner for holder in layout.waiters) else ""


def _latency(latency: Latency | None) -> list[_Fact]:
    if latency is None:
        return []
    return [("TTFT p50/p99 ms", cells.latency(latency.ttft)), ("ITL p50/p99 ms", cells.latency(latency.itl))]


def _latency_of(worker: str, snapshot: BoxSnapshot) -> Latency | None:
    for process in snapshot.processes:
        if isinstance(process.figures, FrontendFigures) and worker in process.figures.by_worker:
            return process.figures.by_worker[worker]
    return None


def _recent_hit_rate(worker: str, history: History) -> float | None:
    """None if it had no prompt in the last minute."""
    oldest = history.newest - RECENT_S / BUCKET_S
    recent: list[Bucket] = [bucket for bucket in history.workers.get(worker, ()) if bucket.number > oldest]
    return cells.ratio(sum(bucket.cached_tokens for bucket in recent), sum(bucket.prompt_tokens for bucket in recent))


def _wins(worker: str, snapshot: BoxSnapshot, now: float) -> list[cells.Line]:
    """The latest requests that the router sent there, newest first, and why."""
    decisions = [
        decision
        for process in snapshot.processes
        if isinstance(process.figures, RouterFigures)
        for decision in process.figures.decisions
        if worker in (decision.winner, decision.prefill)
    ]
    return cells.facts(
        (cells.clock(each.at, now).text, _why(each, worker)) for each in decisions[: -WINS_SHOWN - 1 : -1]
    )


def _why(decision: Decision, worker: str) -> Cell:
    if not decision.prefill:
        return cells.text(f"{decision.request_id}: {decision.reason}")
    leg, said = ("prefill", decision.prefill_reason) if worker == decision.prefill else ("decode", decision.reason)
    return cells.text(f"{decision.request_id}, {leg}: {said}")


def _events(name: str, snapshot: BoxSnapshot, now: float) -> list[cells.Line]:
    """Its latest events, newest first."""
    own = [event for event in snapshot.events if event.process == name][: -EVENTS_SHOWN - 1 : -1]
    return cells.facts(
        (cells.clock(event.at, now).text, cells.text(event.text, cells.LEVEL_TONES.get(event.level, Tone.PLAIN)))
        for event in own
    )
