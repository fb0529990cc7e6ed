"""Where a model's weights are, and how they got there: its sleep and its wakes, as cells and as facts."""

from __future__ import annotations

from dynamo_box import wording
from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.protocol.residency import Residency
from dynamo_box.snapshot import BoxSnapshot, ModelInfo
from dynamo_box.tui.layouts import whereabouts
from dynamo_box.tui.model import Cell, Tone
from dynamo_box.tui.views import cells

TOTAL = "total"
_RESTING = ("awake", "unavailable")
"""States in which a phase would be that of the last transition."""

Fact = tuple[str, Cell]


def state(model: ModelInfo, now: float) -> Cell:
    """`awake`, `asleep 12m`, `asleep, held 12m`, `waking populate 3s`; without a residency as the model says."""
    where = model.residency
    if where is None:
        return cells.state(model.state)
    word = where.state if model.state == "ready" else model.state
    held = ", held" if where.held and word in ("asleep", "falling_asleep") else ""
    phase = where.phase if where.state not in _RESTING else ""
    since = now - where.since
    for_long = wording.duration(max(since, 0.0)) if where.since > 0 and word not in ("awake", "ready") else ""
    words = " ".join(part for part in (word.replace("_", " ") + held, phase, for_long) if part and part != "-")
    return cells.text(words, cells.STATE_TONES.get(word, Tone.PLAIN))


def place(model: ModelInfo) -> Cell:
    """Of its weights: device, host or disk; absent where they are nowhere, or nobody says."""
    where = model.residency
    if where is None:
        return cells.ABSENT
    return cells.text(where.place, Tone.WEIGHTS if where.place == "device" else Tone.ACCENT)


def policy(model: ModelInfo) -> Cell:
    """`host`, `host pin`, `disk 5m`; `stop` where sleeping stops the workers."""
    where = model.residency
    if where is None:
        return cells.ABSENT
    ttl = "" if where.idle_ttl_s is None else wording.duration(where.idle_ttl_s).removesuffix("00s").removesuffix("00m")
    keep = where.keep if where.engine_sleeps else "stop"
    return cells.text(" ".join(part for part in (keep, "pin" * where.pin, ttl) if part))


def waiting(snapshot: BoxSnapshot) -> dict[str, int]:
    """Requests that wait for their model to wake, by model."""
    counts: dict[str, int] = {}
    for process in snapshot.processes:
        if isinstance(process.figures, FrontendFigures):
            for model, count in process.figures.waking.items():
                counts[model] = counts.get(model, 0) + count
    return counts


def waiters(count: int) -> Cell:
    """Absent if none waits."""
    return cells.count(count, Tone.WARN) if count > 0 else cells.ABSENT


def last_wake(model: ModelInfo) -> Cell:
    """How long the last one took; marked if it was a cold start."""
    where = model.residency
    if where is None or TOTAL not in where.wake_phases:
        return cells.ABSENT
    found = cells.took(where.wake_phases[TOTAL], Tone.WARN if where.cold else Tone.PLAIN)
    return found._replace(text=f"{found.text} cold") if where.cold else found


def turns(model: ModelInfo) -> Cell:
    """Sleeps and wakes: `3/2`, and of these the cold ones: `3/2 1 cold`."""
    where = model.residency
    if where is None or not (where.sleeps or where.wakes or where.cold_wakes):
        return cells.ABSENT
    cold = f" {where.cold_wakes:,} cold" if where.cold_wakes else ""
    return Cell(f"{where.sleeps:,}/{where.wakes:,}{cold}", Tone.WARN if cold else Tone.PLAIN, where.wakes)


def slept(model: ModelInfo, now: float) -> Cell:
    """All its sleep, the one that it is in too."""
    where = model.residency
    if where is None:
        return cells.ABSENT
    total = where.slept_s + (max(now - where.since, 0.0) if where.state == "asleep" and where.since > 0 else 0.0)
    return cells.seconds(total) if total else cells.ABSENT


def note(model: ModelInfo) -> Cell:
    """Why the last wake was a cold start, or what else there is to say."""
    where = model.residency
    return cells.ABSENT if where is None else cells.text(where.note, Tone.WARN)


def facts(model: ModelInfo, waiting: int, now: float) -> list[Fact]:
    """All of it; nothing for a box that doesn't say."""
    where = model.residency
    if where is None:
        return []
    return [
        ("since", cells.clock(where.since, now) if where.since > 0 else cells.ABSENT),
        ("weights are", cells.text(whereabouts(where.place)) if where.place else Cell("nowhere: not loaded")),
        ("weights' size", cells.size(where.weights_bytes, Tone.WEIGHTS)),
        ("requests waiting for it", waiters(waiting)),
        ("when asleep", cells.text(_how(where))),
        ("sleeps by itself after", _idle_ttl(where)),
        ("pinned", cells.text("yes: only a person puts it to sleep" if where.pin else "")),
        ("awake for at least", cells.seconds(where.min_awake_s) if where.min_awake_s else cells.ABSENT),
        ("held", cells.text("yes: only w, or `dynbox wake`, wakes it" if where.held else "", Tone.WARN)),
        ("sleeps/wakes", turns(model)),
        ("slept in all", slept(model, now)),
        ("last note", note(model)),
    ]


def _how(where: Residency) -> str:
    if not where.engine_sleeps:
        return "its workers are stopped: its engine can't sleep"
    return f"weights {whereabouts(where.keep)}, unless told otherwise"


def _idle_ttl(where: Residency) -> Cell:
    return Cell("never") if where.idle_ttl_s is None else cells.text(f"{cells.seconds(where.idle_ttl_s).text} idle")


def phases(spent: dict[str, float]) -> list[Fact]:
    """Each phase in its order, the total last."""
    last = [(TOTAL, spent[TOTAL])] if TOTAL in spent else []
    ordered = [*((phase, seconds) for phase, seconds in spent.items() if phase != TOTAL), *last]
    return [(cells.text(phase).text, cells.took(seconds)) for phase, seconds in ordered]
