"""Advice on roles and thresholds. Pure: measured load and targets in, advice with its reasons out.

The signal is time: a role that computes nearly all the time is what requests wait for, and one that rarely does has
something to give. Prompts wait for prefill (time to the first token), tokens wait for decode (time between tokens). So:

    first tokens are late and prefill is busy     → more prefill: a decode worker flips, or short prompts go to decode
    tokens are late and decode is busy            → more decode: a prefill worker flips, or more prompts go to prefill
    both are busy                                 → no flip helps; the box is full
    no targets                                    → only a clear imbalance is worth a word

A role never loses its last worker by advice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynamo_box.advise.load import BOTH, DECODE, PREFILL, ModelLoad, WorkerLoad

BUSY = 0.85
"""From this share of the time on a role is what requests wait for."""
SPARE = 0.5
"""Below this it could take as much again."""
IMBALANCE = 0.5
"""Difference of the shares that is worth a word without targets."""
SHORTEST_SPAN_S = 1.0
LEAST_THRESHOLD = 64
HIGHEST_THRESHOLD = 65_536

Kind = Literal["flip", "threshold", "none"]


@dataclass(frozen=True, slots=True)
class Advice:
    """`kind` flip: have `worker` serve as `role`. threshold: set the router's `disagg` to `setting`. none: nothing
    would help, or nothing is needed. `reasons` are lines for a person, the most important first; `command` does it.
    """

    model: str
    kind: Kind
    reasons: tuple[str, ...]
    worker: str = ""
    role: str = ""
    setting: str = ""
    needed: bool = False
    """Whether something is wrong, be there help or not."""
    relieves: str = ""
    """The role that gets more workers, or less work."""

    @property
    def command(self) -> str:
        if self.kind == "flip":
            return f"dynbox role {self.worker} {self.role}"
        if self.kind == "threshold":
            return f"dynbox disagg --policy {self.setting}"
        return ""


def advise(load: ModelLoad) -> Advice:
    """The one thing that would help most."""
    if load.why_not:
        return Advice(load.model, "none", (load.why_not,))
    if load.span_s < SHORTEST_SPAN_S:
        return Advice(load.model, "none", (f"measured for {load.span_s:.1f} s only",))
    prefill, decode, both = load.of(PREFILL), load.of(DECODE), load.of(BOTH)
    late_first = _late("first token", load.ttft_s, load.targets.ttft_s)
    late_next = _late("token after token", load.itl_s, load.targets.itl_s)
    measured = _measured(prefill, decode, both)
    if not prefill or not decode:
        return _one_role(load, both, late_first, late_next, measured)
    prefill_busy, decode_busy = _mean(prefill), _mean(decode)
    full = prefill_busy >= BUSY and decode_busy >= BUSY
    if full and (late_first or late_next):
        why = f"prefill and decode are both busy: no flip helps; more workers or less load would ({measured})"
        return Advice(load.model, "none", _lines(late_first, late_next, why), needed=True)
    if late_first and prefill_busy >= BUSY:
        return _more_prefill(load, prefill, decode, _lines(late_first, measured))
    if late_next and decode_busy >= BUSY:
        return _more_decode(load, prefill, decode, _lines(late_next, measured))
    if late_first or late_next:
        why = f"neither role is busy all the time, so roles are not what is missing ({measured})"
        return Advice(load.model, "none", _lines(late_first, late_next, why), needed=True)
    untargeted = load.targets.ttft_s is None and load.targets.itl_s is None
    if untargeted and prefill_busy - decode_busy >= IMBALANCE and prefill_busy >= BUSY:
        return _more_prefill(load, prefill, decode, (f"no targets are set, but prefill is short: {measured}",))
    if untargeted and decode_busy - prefill_busy >= IMBALANCE and decode_busy >= BUSY:
        return _more_decode(load, prefill, decode, (f"no targets are set, but decode is short: {measured}",))
    return Advice(load.model, "none", _lines("nothing is late" if not untargeted else "no targets are set", measured))


def _more_prefill(
    load: ModelLoad, prefill: tuple[WorkerLoad, ...], decode: tuple[WorkerLoad, ...], reasons: tuple[str, ...]
) -> Advice:
    decode_after = _mean(decode) * len(decode) / (len(decode) - 1) if len(decode) > 1 else 1.0
    if len(decode) > 1 and decode_after < BUSY:
        idlest = min(decode, key=lambda worker: (worker.busy, worker.name))
        effect = (
            f"with {idlest.name} as prefill, {len(prefill) + 1} workers share the prompts, "
            f"and the {len(decode) - 1} left to decode would be busy {decode_after:.0%} of the time"
        )
        return Advice(
            load.model, "flip", (*reasons, effect), worker=idlest.name, role=PREFILL, needed=True, relieves=PREFILL
        )
    if _mean(decode) < SPARE:
        return _threshold(load, reasons, up=True)
    why = "decode has nothing to give: more workers, or less load, would help"
    return Advice(load.model, "none", (*reasons, why), needed=True)


def _more_decode(
    load: ModelLoad, prefill: tuple[WorkerLoad, ...], decode: tuple[WorkerLoad, ...], reasons: tuple[str, ...]
) -> Advice:
    prefill_after = _mean(prefill) * len(prefill) / (len(prefill) - 1) if len(prefill) > 1 else 1.0
    if len(prefill) > 1 and prefill_after < BUSY:
        idlest = min(prefill, key=lambda worker: (worker.busy, worker.name))
        effect = (
            f"with {idlest.name} as decode, {len(decode) + 1} workers share the answers, "
            f"and the {len(prefill) - 1} left to prefill would be busy {prefill_after:.0%} of the time"
        )
        return Advice(
            load.model, "flip", (*reasons, effect), worker=idlest.name, role=DECODE, needed=True, relieves=DECODE
        )
    if load.disagg.policy == "conditional" and _mean(prefill) < SPARE:
        return _threshold(load, reasons, up=False)
    why = "prefill has no worker to give: more workers, or less load, would help"
    return Advice(load.model, "none", (*reasons, why), needed=True)


def _threshold(load: ModelLoad, reasons: tuple[str, ...], *, up: bool) -> Advice:
    """Doubled or halved: advice is asked for again once its effect has been measured."""
    now = load.disagg.min_uncached_tokens
    if up and load.disagg.policy != "conditional":
        setting = f"conditional:min_uncached_tokens={now}"
        effect = f"prompts with fewer than {now} uncached tokens would be computed by decode workers, which have time"
        return Advice(load.model, "threshold", (*reasons, effect), setting=setting, needed=True, relieves=PREFILL)
    if up:
        then = max(now, min(max(now * 2, LEAST_THRESHOLD), HIGHEST_THRESHOLD))
    else:
        then = min(now, max(now // 2, LEAST_THRESHOLD))
    if then == now:
        why = f"the threshold of {now} tokens is at its end"
        return Advice(load.model, "none", (*reasons, why), needed=True)
    who = "decode" if up else "prefill"
    effect = (
        f"prompts of {min(now, then)} to {max(now, then)} uncached tokens would go to {who} workers, which have time"
    )
    setting = f"conditional:min_uncached_tokens={then}"
    relieves = PREFILL if up else DECODE
    return Advice(load.model, "threshold", (*reasons, effect), setting=setting, needed=True, relieves=relieves)


def _one_role(load: ModelLoad, both: tuple[WorkerLoad, ...], late_first: str, late_next: str, measured: str) -> Advice:
    """Prompts hold up the answers of the workers that compute both."""
    late = _lines(late_first, late_next)
    if not late:
        return Advice(load.model, "none", (f"its workers aren't split into prefill and decode ({measured})",))
    if len(both) < 2 or not late_next or not any(worker.prompt_tokens_per_s for worker in both):
        why = f"there are no two workers whose roles could be split to any use ({measured})"
        return Advice(load.model, "none", (*late, why), needed=True)
    first, second = sorted(both, key=lambda worker: (worker.output_tokens_per_s, worker.name))[:2]
    effect = (
        f"prompts and answers share every worker; with {first.name} for prompts, long ones would no longer hold up "
        f"answers (then `dynbox role {second.name} decode`)"
    )
    return Advice(
        load.model, "flip", (*late, measured, effect), worker=first.name, role=PREFILL, needed=True, relieves=DECODE
    )


def _late(what: str, measured_s: float | None, target_s: float | None) -> str:
    if measured_s is None or target_s is None or measured_s <= target_s:
        return ""
    return f"{what}: {measured_s * 1000:.0f} ms for 99 of 100, the target is {target_s * 1000:.0f} ms"


def _measured(*groups: tuple[WorkerLoad, ...]) -> str:
    parts = [
        f"{group[0].role} {_mean(group):.0%} busy ({len(group)} worker{'s' if len(group) > 1 else ''}"
        + (f", {sum(worker.waiting for worker in group)} waiting" if any(worker.waiting for worker in group) else "")
        + ")"
        for group in groups
        if group
    ]
    return ", ".join(parts) or "no worker is ready"


def _mean(workers: tuple[WorkerLoad, ...]) -> float:
    return sum(worker.busy for worker in workers) / len(workers) if workers else 0.0


def _lines(*texts: str) -> tuple[str, ...]:
    return tuple(text for text in texts if text)
