"""What is served: each model, its workers, and where its weights are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dynamo_box import wording
from dynamo_box.protocol.figures import FrontendFigures, WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, ModelInfo, ProcessInfo, Targets
from dynamo_box.tui import layouts, legs
from dynamo_box.tui.layouts import Held
from dynamo_box.tui.model import Act, Cell, Column, Frame, Lines, Panel, Row, Tone, View
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import advice, cells, charts, layout_table, residence

MODELS = "models"

_COLUMNS = (
    Column("model", "MODEL", least=10, widest=40),
    Column("state", "STATE", least=24, widest=36, help="with the phase of going to sleep or waking, and since when"),
    Column("place", "PLACE", keep=15, least=6, widest=8, help="where its weights are: device, host or disk"),
    cells.number_column("workers", "WORKERS", keep=10, help="ready, of all"),
    Column("devices", "WEIGHTS ON", keep=2, least=8, widest=60, help="devices of the workers that hold weights"),
    cells.number_column("weights", "WEIGHTS", keep=9, help="bytes of weights: once if they are shared, else of all"),
    cells.number_column("waiting", "WAITING", keep=14, help="requests that wait for it to wake"),
    cells.number_column("requests", "REQUESTS", keep=13, help="running/waiting, of all its workers"),
    cells.number_column("rate", "TOK/S", keep=12, help="output tokens a second"),
    cells.number_column("ttft", "TTFT p99", keep=13, help="time to the first token, of 99 in 100/target"),
    cells.number_column("itl", "ITL p99", keep=13, help="time between tokens, of 99 in 100/target"),
    cells.number_column("hit", "HIT", keep=4, help="share of prompt tokens that were cached, since the start"),
    cells.number_column("idle", "IDLE", keep=7, help="since its last request ended"),
    cells.number_column("woke", "LAST WAKE", keep=11, help="how long it took, from the request to serving"),
    Column(
        "policy", "KEEP", keep=10, least=20, widest=20, help="where it sleeps; pin: not by itself; after so long idle"
    ),
    cells.number_column("turns", "SLEEPS/WAKES", keep=5, help="of the wakes, cold ones are counted beside"),
    cells.number_column("slept", "SLEPT", keep=6, help="in all"),
    Column("note", "NOTE", keep=3, least=16, widest=80, help="why the last wake fell back to a cold start"),
    Column("path", "PATH", keep=1, least=12, widest=80),
)


class Models:
    name = "models"
    summary = "what is served, and where its weights are"
    acts: tuple[Act, ...] = (
        Act("z", "sleep", "sleep", "Put {row} to sleep? It takes nothing new, finishes what runs, and frees memory."),
        Act("w", "wake", "wake"),
        Act("p", legs.POLICY, "disagg policy", needs_row=False, of=legs.SPLIT),
    )

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        snapshot = frame.snapshot
        names = cells.device_names(snapshot.devices)
        services = _services(snapshot)
        rows = [_row(model, services[model.name], frame, names) for model in snapshot.models]
        note = _note(snapshot.models)
        table = cells.table(MODELS, "Models", _COLUMNS, rows, empty="The box serves no model.", note=note)
        advised = charts.clipped(advice.lines(frame, width), width)
        return (table, Lines("advice", "Advice", advised)) if advised else (table,)

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        snapshot = frame.snapshot
        model = next((each for each in snapshot.models if each.name == row), None)
        if model is None:
            return None
        service = _services(snapshot)[row]
        names = cells.device_names(snapshot.devices)
        workers = cells.facts((one_line(each.name), _worker(each, names)) for each in service.workers)
        where = model.residency
        lines = [
            *cells.facts(_facts(model, service, frame, names)),
            *cells.section("Targets and advice", cells.facts(advice.facts(model, frame))),
            *cells.section("Sleep", cells.facts(residence.facts(model, service.waiting, frame.now))),
            *cells.section("Last wake, by phase", cells.facts(residence.phases(where.wake_phases) if where else ())),
            *cells.section("Last sleep, by phase", cells.facts(residence.phases(where.sleep_phases) if where else ())),
            *cells.section("Layouts", cells.facts(layout_table.mapping(snapshot, row))),
            *cells.section("Workers", workers),
        ]
        return Lines(MODELS, one_line(model.name), tuple(lines))


VIEW: View = Models()


class _Service(NamedTuple):
    """A model's workers, what those of them report that report anything, the layouts that hold its weights, and how
    many requests wait for it to wake.
    """

    workers: tuple[ProcessInfo, ...]
    figures: tuple[WorkerFigures, ...]
    layouts: tuple[Held, ...]
    waiting: int

    @property
    def holders(self) -> list[ProcessInfo]:
        """Workers that say that they hold weights."""
        return [each for each in self.workers if _weights(each)]

    @property
    def weights_bytes(self) -> int | None:
        """Once if they lie in layouts, else as many copies as there are workers."""
        shared = layouts.size(self.layouts)
        return _sum(figures.weights_bytes for figures in self.figures) if shared is None else shared

    @property
    def kv_bytes(self) -> int | None:
        return _sum(figures.kv_bytes for figures in self.figures)

    @property
    def tokens_per_s(self) -> float | None:
        return sum(each.tokens_per_s for each in self.figures) if self.figures else None

    @property
    def hit_rate(self) -> float | None:
        cached = sum(figures.cached_tokens for figures in self.figures)
        return cells.ratio(cached, sum(figures.prompt_tokens for figures in self.figures))

    @property
    def queue(self) -> Cell:
        if not self.figures:
            return cells.ABSENT
        running = sum(figures.running for figures in self.figures)
        return cells.queue(running, sum(figures.waiting for figures in self.figures))


def _services(snapshot: BoxSnapshot) -> dict[str, _Service]:
    """By model, in one pass over the processes: there may be many of both."""
    workers: dict[str, list[ProcessInfo]] = {model.name: [] for model in snapshot.models}
    for process in snapshot.processes:
        if process.model in workers:
            workers[process.model].append(process)
    waiting = residence.waiting(snapshot)
    stored: dict[str, list[Held]] = {}
    for held in layouts.held(snapshot):
        stored.setdefault(held.layout.name, []).append(held)
    return {
        model: _Service(
            tuple(found),
            tuple([each.figures for each in found if isinstance(each.figures, WorkerFigures)]),
            tuple(stored.get(model, ())),
            waiting.get(model, 0),
        )
        for model, found in workers.items()
    }


def _note(models: Iterable[ModelInfo]) -> str:
    """How many sleep, where any can."""
    known = [each.residency for each in models if each.residency is not None]
    asleep = sum(each.state == "asleep" for each in known)
    return f"{asleep} of {len(known)} asleep" if known else ""


def _sum(values: Iterable[int | None]) -> int | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _weights(process: ProcessInfo) -> int | None:
    return process.figures.weights_bytes if isinstance(process.figures, WorkerFigures) else None


def _row(model: ModelInfo, service: _Service, frame: Frame, device_names: Mapping[str, str]) -> Row:
    return Row(
        model.name,
        (
            cells.name(model.name),
            residence.state(model, frame.now),
            residence.place(model),
            _workers(model),
            _devices(service.holders, device_names),
            cells.size(service.weights_bytes, Tone.WEIGHTS),
            residence.waiters(service.waiting),
            service.queue,
            cells.rate(service.tokens_per_s),
            *_latency(model, frame),
            cells.percent(service.hit_rate),
            _idle(model.idle_s),
            residence.last_wake(model),
            residence.policy(model),
            residence.turns(model),
            residence.slept(model, frame.now),
            residence.note(model),
            cells.text(model.path, Tone.DIM),
        ),
    )


def _latency(model: ModelInfo, frame: Frame) -> tuple[Cell, Cell]:
    """To the first token, and between two."""
    wanted = model.targets
    load = advice.load(model, frame) if wanted != Targets() else None
    if load is None:
        return cells.ABSENT, cells.ABSENT
    return advice.against(load.ttft_s, wanted.ttft_s), advice.against(load.itl_s, wanted.itl_s)


def _workers(model: ModelInfo) -> Cell:
    """Ready ones of all: `7/8`."""
    ready, total = model.workers_ready, model.workers_total
    if not total:
        return cells.ABSENT
    sleeps = model.residency is not None and model.residency.state in ("asleep", "falling_asleep", "waking")
    tone = Tone.PLAIN if ready >= total or sleeps else Tone.WARN if ready else Tone.BAD
    return Cell(f"{ready}/{total}", tone, ready)


def _devices(holders: Iterable[ProcessInfo], names: Mapping[str, str]) -> Cell:
    """Each device once, in the order of the workers."""
    ids = dict.fromkeys(device for each in holders for device in (each.device or "").split(",") if device)
    return cells.device_label(",".join(ids), names)


def _idle(seconds: float | None) -> Cell:
    """Since the last request ended; a model that has never had one has no idle time."""
    return Cell("in use", Tone.PLAIN, 0.0) if seconds == 0 else cells.seconds(seconds)


def _facts(model: ModelInfo, service: _Service, frame: Frame, names: Mapping[str, str]) -> list[tuple[str, Cell]]:
    return [
        ("state", residence.state(model, frame.now)),
        ("workers ready", _workers(model)),
        ("path", cells.text(model.path)),
        ("weights", cells.size(service.weights_bytes, Tone.WEIGHTS)),
        ("on", _devices(service.holders, names)),
        ("KV pools", cells.size(service.kv_bytes, Tone.KV)),
        ("running/waiting", service.queue),
        ("tokens/s", cells.rate(service.tokens_per_s)),
        ("hit rate", cells.percent(service.hit_rate)),
        ("requests served", cells.count(_sum(figures.requests for figures in service.figures))),
        ("output tokens", cells.count(_sum(figures.output_tokens for figures in service.figures))),
        ("idle", _idle(model.idle_s)),
        ("last request", _last_ended(model.name, frame.snapshot)),
    ]


def _last_ended(model: str, snapshot: BoxSnapshot) -> Cell:
    """When the last of its requests ended."""
    ended = [
        process.figures.last_ended[model]
        for process in snapshot.processes
        if isinstance(process.figures, FrontendFigures) and model in process.figures.last_ended
    ]
    return cells.clock(max(ended), snapshot.at) if ended else cells.ABSENT


def _worker(process: ProcessInfo, names: Mapping[str, str]) -> Cell:
    """Role, state, device and what it holds, in a line."""
    parts = [
        legs.role_of(process),
        process.state,
        cells.device_label(process.device, names).text if process.device else "",
    ]
    weights = _weights(process)
    parts.append("" if weights is None else f"weights {wording.size(weights)}")
    return cells.text("  ".join(part for part in parts if part), cells.STATE_TONES.get(process.state, Tone.PLAIN))
