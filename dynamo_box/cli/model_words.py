"""Where a model is between awake and asleep, and that it is none, in words. Pure."""

from __future__ import annotations

from dynamo_box import wording
from dynamo_box.snapshot import ModelInfo

_PLACES = {"device": "on the device", "host": "in host", "disk": "on disk"}


SIMULATED = "SIMULATED: these GPUs are not there; speeds are a timing model's, and answers are not a model's"


def resting(model: ModelInfo) -> str:
    """Where it sleeps; "" while it doesn't."""
    where = model.residency
    if where is None or where.state != "asleep":
        return ""
    return _PLACES.get(where.place, "its workers are stopped")


def model_words(model: ModelInfo, now: float) -> tuple[str, str]:
    """`asleep in host for 3m`, and what goes with that: `wakes on request`. `now` is Unix time."""
    where = model.residency
    workers = f"{model.workers_ready} of {model.workers_total} workers" if model.workers_total else ""
    if where is None or where.state not in ("asleep", "waking", "falling_asleep"):
        return model.state, workers
    if where.state != "asleep":
        return where.state.replace("_", " "), wording.printable(where.phase)
    span = wording.duration(max(0.0, now - where.since)) if where.since else "-"
    place = f" {_PLACES[where.place]}" if where.place in _PLACES else ""
    notes = [f"held: `dynbox wake {model.name}` wakes it" if where.held else "wakes on request"]
    if not where.engine_sleeps:
        notes.insert(0, "its engine can't sleep: its workers are stopped")
    return f"asleep{place} for {span}", "; ".join(notes)


def wake_words(model: ModelInfo) -> str:
    """How long the last wake took, phase by phase; "" if it never slept."""
    where = model.residency
    if where is None or not where.wakes or where.state == "asleep":
        return ""
    parts = ", ".join(f"{name} {_short(took)}" for name, took in where.wake_phases.items() if name != "total")
    phases = f" ({parts})" if parts else ""
    total = _short(where.wake_phases.get("total", sum(where.wake_phases.values())))
    times = "once" if where.sleeps == 1 else f"{where.sleeps} times"
    cold = f"; a cold start: {wording.printable(where.note)}" if where.cold else ""
    return f"slept {times}, {wording.duration(where.slept_s)}; last woke in {total}{phases}{cold}"


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
