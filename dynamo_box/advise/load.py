"""How busy each role of a model was between two snapshots of its box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from dynamo_box.protocol.figures import FrontendFigures, RouterFigures, WorkerFigures
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import BoxSnapshot, Targets

F = TypeVar("F")

PREFILL, DECODE, BOTH = "prefill", "decode", "aggregated"


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """`busy` is the share of the time in which it computed; prompt and output tokens a second; `waiting` sequences, and
    the share of its KV pool in use, are those of the later snapshot.
    """

    name: str
    role: str
    busy: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    waiting: int
    kv_used: float


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """`ttft_s` and `itl_s` are what 99 of 100 recent requests stayed below, None if there were none. `why_not` is "" or
    why nothing can be said of it (it starts, or a worker changes just now).
    """

    model: str
    span_s: float
    workers: tuple[WorkerLoad, ...]
    targets: Targets
    disagg: Disagg
    ttft_s: float | None = None
    itl_s: float | None = None
    why_not: str = ""

    def of(self, role: str) -> tuple[WorkerLoad, ...]:
        return tuple(worker for worker in self.workers if worker.role == role)


def measure(model: str, before: BoxSnapshot, after: BoxSnapshot) -> ModelLoad:
    """A worker that began a new life between the two counts from its beginning."""
    span_s = max(after.at - before.at, 1e-9)
    earlier = {process.name: process for process in before.processes}
    workers: list[WorkerLoad] = []
    why_not = ""
    for process in after.processes:
        if process.model != model or process.kind != "worker":
            continue
        figures = process.figures
        if process.state != "ready" or not isinstance(figures, WorkerFigures):
            why_not = why_not or f"{process.name} is {process.state}"
            continue
        old = earlier.get(process.name)
        same_life = old is not None and old.pid == process.pid and isinstance(old.figures, WorkerFigures)
        base = old.figures if same_life and old is not None and isinstance(old.figures, WorkerFigures) else None
        workers.append(_worker(process.name, figures.role or process.role or BOTH, figures, base, span_s))
    info = next((each for each in after.models if each.name == model), None)
    if info is None:
        why_not = f"the box serves no {model}"
    elif info.state != "ready":
        why_not = why_not or f"{model} is {info.state}"
    ttft_s, itl_s = _latency({worker.name for worker in workers}, after)
    return ModelLoad(
        model=model,
        span_s=span_s,
        workers=tuple(workers),
        targets=info.targets if info is not None else Targets(),
        disagg=next((each.disagg_settings for each in _figures(after, RouterFigures)), Disagg()),
        ttft_s=ttft_s,
        itl_s=itl_s,
        why_not=why_not,
    )


def _worker(name: str, role: str, now: WorkerFigures, before: WorkerFigures | None, span_s: float) -> WorkerLoad:
    def grown(field: str) -> float:
        later: float = getattr(now, field)
        sooner: float = getattr(before, field) if before is not None else 0.0
        return max(later - sooner, 0.0)

    return WorkerLoad(
        name=name,
        role=role,
        busy=min(grown("busy_s") / span_s, 1.0),
        prompt_tokens_per_s=grown("computed_prompt_tokens") / span_s,
        output_tokens_per_s=grown("output_tokens") / span_s,
        waiting=now.waiting,
        kv_used=now.kv_blocks_used / now.kv_blocks_total if now.kv_blocks_total else 0.0,
    )


def _latency(workers: set[str], snapshot: BoxSnapshot) -> tuple[float | None, float | None]:
    """The worst worker's, of those that have any."""
    found = [
        latency
        for frontend in _figures(snapshot, FrontendFigures)
        for name, latency in frontend.by_worker.items()
        if name in workers
    ]
    return (
        max((each.ttft.p99 for each in found if each.ttft.p99 is not None), default=None),
        max((each.itl.p99 for each in found if each.itl.p99 is not None), default=None),
    )


def _figures(snapshot: BoxSnapshot, kind: type[F]) -> list[F]:
    return [process.figures for process in snapshot.processes if isinstance(process.figures, kind)]
