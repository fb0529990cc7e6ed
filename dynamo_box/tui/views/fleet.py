"""The fleet: every process of the box, and below them what they live on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dynamo_box.protocol.figures import (
    FrontendFigures,
    GmsFigures,
    KvStoreFigures,
    Latency,
    RouterFigures,
    WorkerFigures,
)
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo
from dynamo_box.tui import legs, tiers
from dynamo_box.tui.lately import Lately
from dynamo_box.tui.model import Act, Cell, Column, Frame, Lines, Panel, Row, Table, Tone, View
from dynamo_box.tui.views import cells, device_table, process_detail

PROCESSES = "processes"

_COLUMNS = (
    Column("process", "PROCESS", least=24, widest=40, tail=True),
    Column("model", "MODEL", keep=3, least=8, widest=24),
    Column("role", "ROLE", keep=2, least=10, widest=12, help="what it serves as now"),
    Column("state", "STATE", least=16, widest=52, help="state, phase of the start and how far it is"),
    Column("device", "DEVICE", keep=14, least=14, widest=26),
    cells.number_column("weights", "WEIGHTS", keep=9, help="bytes of weights; what a gms holds, workers map"),
    cells.number_column(
        "kv",
        "KV",
        keep=10,
        help="KV in use: of the pool, bytes, else blocks; of a kvstore, of its host tier",
    ),
    cells.number_column("other", "OTHER", keep=5, help="resident memory beside weights and KV"),
    cells.number_column("rate", "TOK/S", keep=17, help="output tokens a second"),
    cells.number_column("ttft", "TTFT ms", keep=16, help="time to the first token, p50/p99 of recent requests"),
    cells.number_column("itl", "ITL ms", keep=11, help="time between tokens, p50/p99 of recent requests"),
    cells.number_column("queue", "QUEUE", keep=15, help="requests running/waiting"),
    cells.number_column("busy", "BUSY", keep=13, help="share of the last 10 s in which it computed"),
    cells.number_column("handed", "HAND/S", keep=6, help="legs a second: handed over by prefill, taken over by decode"),
    cells.number_column("hit", "HIT", keep=13, help="share of prompt tokens that were cached, since the start"),
    cells.number_column("restarts", "RESTARTS", keep=7),
    cells.number_column("uptime", "UPTIME", keep=12),
    cells.number_column("pid", "PID", keep=4),
    Column("cause", "CAUSE", keep=8, least=16, widest=80, help="why it last failed, or what a tier lacks"),
)
_KEPT_OF_ROLES = {"role": 16, "handed": 11}
_COLUMNS_OF_ROLES = tuple(replace(column, keep=_KEPT_OF_ROLES.get(column.key, column.keep)) for column in _COLUMNS)
"""The same for a box whose workers have roles, which are then what one wants to see first."""


class Fleet:
    name = "fleet"
    summary = "processes, and the devices they live on"
    acts: tuple[Act, ...] = (
        Act("r", "restart", "restart", "Drain and restart {row}?"),
        Act("d", "drain", "drain", "Drain and stop {row}? It stays stopped until a restart."),
        Act("o", legs.ROLE, "role", "What shall {row} serve as? It drains first.", of=legs.SPLIT),
    )

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        devices = device_table.table(frame.snapshot)
        return (_processes(frame),) if devices is None else (_processes(frame), devices)

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        if panel == device_table.DEVICES:
            return device_table.detail(frame.snapshot, row)
        process = next((each for each in frame.snapshot.processes if each.name == row), None)
        return process_detail.lines(process, frame) if process is not None and panel == PROCESSES else None


VIEW: View = Fleet()


def _processes(frame: Frame) -> Table:
    snapshot = frame.snapshot
    lately = frame.history.lately if legs.is_split(snapshot) else None
    names = cells.device_names(snapshot.devices)
    latencies = _latencies(snapshot)
    rows = [_process_row(process, names, latencies.get(process.name), lately) for process in snapshot.processes]
    ready = sum(process.state == "ready" for process in snapshot.processes)
    asleep = sum(process.state == "asleep" for process in snapshot.processes)
    note = f"{ready} of {len(rows)} ready{f', {asleep} asleep' if asleep else ''}" if rows else ""
    columns = _COLUMNS if lately is None else _COLUMNS_OF_ROLES
    return cells.table(PROCESSES, "Processes", columns, rows, empty="The plan has no processes.", note=note)


def _latencies(snapshot: BoxSnapshot) -> dict[str, Latency]:
    """What clients saw, by the worker that served them, and of all workers together by the name of the frontend."""
    found: dict[str, Latency] = {}
    for process in snapshot.processes:
        if isinstance(process.figures, FrontendFigures):
            found |= process.figures.by_worker
            found[process.name] = Latency(process.figures.ttft, process.figures.itl)
    return found


def _process_row(
    process: ProcessInfo, device_names: Mapping[str, str], latency: Latency | None, lately: Lately | None
) -> Row:
    """`lately` in a box whose workers have roles: what they are busy with tells whether these fit."""
    weights = kv = rate = queue = busy = handed = hit = cells.ABSENT
    match process.figures:
        case WorkerFigures() as worker:
            weights = cells.size(worker.weights_bytes, Tone.WEIGHTS)
            kv = cells.kv_pool(worker)
            rate = cells.rate(worker.tokens_per_s)
            queue = cells.queue(worker.running, worker.waiting)
            if lately is not None:
                busy = cells.percent(lately.busy(process))
                handed = _handed(lately, process)
            hit = cells.percent(cells.ratio(worker.cached_tokens, worker.prompt_tokens))
        case FrontendFigures() as frontend:
            rate = cells.rate(frontend.tokens_per_s)
            queue = cells.count(frontend.active)
        case RouterFigures() as router:
            queue = cells.count(router.active_requests)
            hit = cells.percent(router.hit_rate)
        case GmsFigures() as gms:
            weights = cells.size(gms.device_bytes, Tone.WEIGHTS)
        case KvStoreFigures() as store:
            if store.host.state != tiers.OFF:
                kv = cells.size_of(store.host.used_bytes, store.host.capacity_bytes, Tone.HOST)
            hit = cells.percent(tiers.hit_rate(store))
        case None:
            pass
    return Row(
        process.name,
        (
            cells.name(process.name),
            cells.name(process.model),
            _role(process),
            _state(process),
            cells.device_label(process.device, device_names),
            weights,
            kv,
            cells.size(cells.other_bytes(process), Tone.OTHER),
            rate,
            cells.ABSENT if latency is None else cells.latency(latency.ttft),
            cells.ABSENT if latency is None else cells.latency(latency.itl),
            queue,
            busy,
            handed,
            hit,
            cells.count(process.restarts, Tone.WARN if process.restarts else Tone.PLAIN),
            cells.seconds(process.uptime_s),
            cells.pid(process.pid),
            _cause(process),
        ),
    )


def _role(process: ProcessInfo) -> Cell:
    """What it serves as now; marked if that isn't what was planned."""
    now = legs.role_of(process)
    return cells.text(now, Tone.PLAIN if now == (process.role or now) else Tone.ACCENT)


def _handed(lately: Lately, process: ProcessInfo) -> Cell:
    """Both together: a worker that has one role does one of them."""
    over, taken = lately.handed_over(process), lately.taken_over(process)
    return cells.ABSENT if over is None or taken is None else cells.rate(over + taken)


def _state(process: ProcessInfo) -> Cell:
    """As of all; a store that serves without one of its tiers says so instead of ready."""
    found = cells.state_and_phase(process)
    if not isinstance(process.figures, KvStoreFigures) or process.state != "ready":
        return found
    names = list(tiers.suspended(process.figures))
    if not names:
        return found
    return found._replace(text=f"{', '.join(names)} suspended", tone=Tone.WARN)


def _cause(process: ProcessInfo) -> Cell:
    """Why it last failed, or why a tier of it is suspended."""
    if isinstance(process.figures, KvStoreFigures) and (why := tiers.suspended(process.figures)):
        return cells.text("; ".join(f"{name} tier: {reason}" for name, reason in why.items()), Tone.WARN)
    return cells.text(process.cause, Tone.DIM if process.state == "ready" else Tone.BAD)
