"""What is served: each model, its workers, and where its weights are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dynamo_box import wording
from dynamo_box.protocol.figures import FrontendFigures, WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, ModelInfo, ProcessInfo
from dynamo_box.tui.model import Act, Cell, Column, Frame, Lines, Panel, Row, Tone, View
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import cells

MODELS = "models"

_COLUMNS = (
    Column("model", "MODEL", least=10, widest=40),
    Column("state", "STATE", least=5, widest=16),
    cells.number_column("workers", "WORKERS", help="ready, of all"),
    Column("devices", "WEIGHTS ON", keep=2, least=8, widest=60, help="devices of the workers that hold weights"),
    cells.number_column("weights", "WEIGHTS", keep=5, help="bytes of weights of all its workers together"),
    cells.number_column("requests", "REQUESTS", help="running/waiting, of all its workers"),
    cells.number_column("rate", "TOK/S", help="output tokens a second"),
    cells.number_column("hit", "HIT", keep=4, help="share of prompt tokens that were cached, since the start"),
    cells.number_column("idle", "IDLE", keep=3, help="since its last request ended"),
    Column("path", "PATH", keep=1, least=12, widest=80),
)


class Models:
    name = "models"
    summary = "what is served, and where its weights are"
    acts: tuple[Act, ...] = ()

    def panels(self, frame: Frame, width: int) -> tuple[Panel, ...]:
        snapshot = frame.snapshot
        names = cells.device_names(snapshot.devices)
        rows = [_row(model, _service(model.name, snapshot.processes), names) for model in snapshot.models]
        return (cells.table(MODELS, "Models", _COLUMNS, rows, empty="The box serves no model."),)

    def detail(self, frame: Frame, panel: str, row: str) -> Lines | None:
        snapshot = frame.snapshot
        model = next((each for each in snapshot.models if each.name == row), None)
        if model is None:
            return None
        service = _service(row, snapshot.processes)
        names = cells.device_names(snapshot.devices)
        workers = cells.facts((one_line(each.name), _worker(each, names)) for each in service.workers)
        lines = [*cells.facts(_facts(model, service, snapshot, names)), *cells.section("Workers", workers)]
        return Lines(MODELS, one_line(model.name), tuple(lines))


VIEW: View = Models()


class _Service(NamedTuple):
    """A model's workers, and what those of them report that report anything."""

    workers: tuple[ProcessInfo, ...]
    figures: tuple[WorkerFigures, ...]

    @property
    def holders(self) -> list[ProcessInfo]:
        """Workers that say that they hold weights."""
        return [each for each in self.workers if _weights(each)]

    @property
    def weights_bytes(self) -> int | None:
        return _sum(figures.weights_bytes for figures in self.figures)

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


def _service(model: str, processes: Iterable[ProcessInfo]) -> _Service:
    workers = tuple(process for process in processes if process.model == model)
    return _Service(workers, tuple(each.figures for each in workers if isinstance(each.figures, WorkerFigures)))


def _sum(values: Iterable[int | None]) -> int | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _weights(process: ProcessInfo) -> int | None:
    return process.figures.weights_bytes if isinstance(process.figures, WorkerFigures) else None


def _row(model: ModelInfo, service: _Service, device_names: Mapping[str, str]) -> Row:
    return Row(
        model.name,
        (
            cells.name(model.name),
            cells.state(model.state),
            _workers(model),
            _devices(service.holders, device_names),
            cells.size(service.weights_bytes, Tone.WEIGHTS),
            service.queue,
            cells.rate(service.tokens_per_s),
            cells.percent(service.hit_rate),
            _idle(model.idle_s),
            cells.text(model.path, Tone.DIM),
        ),
    )


def _workers(model: ModelInfo) -> Cell:
    """Ready ones of all: `7/8`."""
    ready, total = model.workers_ready, model.workers_total
    if not total:
        return cells.ABSENT
    tone = Tone.PLAIN if ready >= total else Tone.WARN if ready else Tone.BAD
    return Cell(f"{ready}/{total}", tone, ready)


def _devices(holders: Iterable[ProcessInfo], names: Mapping[str, str]) -> Cell:
    """Each device once, in the order of the workers."""
    ids = dict.fromkeys(device for each in holders for device in (each.device or "").split(",") if device)
    return cells.device_label(",".join(ids), names)


def _idle(seconds: float | None) -> Cell:
    """Since the last request ended; a model that has never had one has no idle time."""
    return Cell("in use", Tone.PLAIN, 0.0) if seconds == 0 else cells.seconds(seconds)


def _facts(
    model: ModelInfo, service: _Service, snapshot: BoxSnapshot, names: Mapping[str, str]
) -> list[tuple[str, Cell]]:
    return [
        ("state", cells.state(model.state)),
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
        ("last request", _last_ended(model.name, snapshot)),
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
        process.role or "",
        process.state,
        cells.device_label(process.device, names).text if process.device else "",
    ]
    weights = _weights(process)
    parts.append("" if weights is None else f"weights {wording.size(weights)}")
    return cells.text("  ".join(part for part in parts if part), cells.STATE_TONES.get(process.state, Tone.PLAIN))
