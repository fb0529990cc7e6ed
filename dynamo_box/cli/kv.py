"""`dynbox kv`: the KV tiers of the box: how full they are, what went in and out, and what was kept out."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, render, stderr
from dynamo_box.cli.model_words import SIMULATED
from dynamo_box.cli.tier_words import KVSTORE, store_of, tier_troubles, tiers_of, workers_of
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode, NotRunning
from dynamo_box.paths import run_dir
from dynamo_box.protocol.figures import KvLayoutFigures, KvStoreFigures, TierFigures, TierUse, WorkerTiers
from dynamo_box.protocol.kv import Tier
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo

app = complete.verb(invoke_without_command=True)

NAME_SHOWN = 12
_TIER_HEADER = (
    "TIER", "STATE", "USED", "OF", "BLOCKS", "IN", "IN/S", "OUT", "OUT/S", "HIT", "EVICTED", "FAILED", "DROPPED",
)  # fmt: skip
_LAYOUT_HEADER = ("LAYOUT", "DTYPE", "TOKENS", "BLOCK", "HOST", "FREE", "LEASED", "WRITING", "DISK", "WORKERS")
_WORKER_HEADER = (
    "WORKER", "OFFLOADED", "KNOWN", "FILTERED", "UNSET", "DROPPED", "QUEUED", "HOST HIT", "DISK HIT", "LOADS",
    "RECOMPUTES",
)  # fmt: skip


class Where(StrEnum):
    host = "host"
    disk = "disk"


_TIERS: dict[Where, Tier] = {Where.host: "g2", Where.disk: "g3"}
"""In the order in which they are cleared: what host memory still hands to the disk goes first."""

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.callback()
def kv(context: typer.Context, as_json: AsJson = False) -> ExitCode:
    """Show the KV tiers: state, how full, what went in and out, hits, and what each worker kept out and why."""
    if context.invoked_subcommand is None:
        with ControlClient.connect(run_dir()) as client:
            show(client.snapshot(), as_json=as_json)
    return ExitCode.OK


@app.command()
def clear(
    tier: Annotated[Where | None, typer.Option("--tier", help="Only this one (default: both).")] = None,
    as_json: AsJson = False,
) -> ExitCode:
    """Forget what is in the KV tiers. Requests go on; what they find no more is computed again."""
    with ControlClient.connect(run_dir()) as client:
        cleared = {where: client.set_option(KVSTORE, "clear", _TIERS[where]) for where in _asked(client, tier)}
    if as_json:
        output.json({"cleared": [{"tier": where, "text": text} for where, text in cleared.items()]})
    else:
        for text in cleared.values():
            output.text(wording.printable(text))
    return ExitCode.OK


def _asked(client: ControlClient, tier: Where | None) -> list[Where]:
    """Raises:
    NotRunning: the box has no such tier.
    """
    store = store_of(client.snapshot())
    if store is None:
        raise NotRunning("this box has no KV tiers", remedy="see `dynbox help kv` for how to have some")
    figures = store.figures
    there = [
        where for where in _TIERS if not isinstance(figures, KvStoreFigures) or tiers_of(figures)[where].state != "off"
    ]  # a store that says nothing yet will answer for itself
    if tier is not None and tier not in there:
        raise NotRunning(f"this box has no {tier} tier", remedy=f"memory.tiers.{tier} in the profile gives it one")
    return there if tier is None else [tier]


def show(snapshot: BoxSnapshot, *, as_json: bool) -> None:
    store = store_of(snapshot)
    if store is not None and store.state != "ready":
        cause = f": {wording.printable(store.cause)}" if store.cause else ""
        stderr.warn(f"{store.name} is {store.state}{cause}; workers serve without tiers meanwhile")
    for trouble in tier_troubles(snapshot):
        stderr.warn(trouble)
    workers = workers_of(snapshot)
    if as_json:
        output.json(tiers_json(store, workers))
    elif store is None:
        stderr.say(f"profile {snapshot.box.profile} has no KV tiers; see `dynbox help kv` for how to have some")
    else:
        if snapshot.simulated:
            output.text(SIMULATED)
        output.table("\n\n".join(part for part in (_store_text(store), _workers_text(workers)) if part))


def tiers_json(store: ProcessInfo | None, workers: dict[str, WorkerTiers]) -> dict[str, Any]:
    """The figures as they are, tiers by name, with their hit rates."""
    figures = store.figures if store is not None else None
    found: dict[str, Any] = {"process": None, "tiers": {}, "layouts": []}
    if isinstance(figures, KvStoreFigures):
        found |= msgspec.to_builtins(figures)
        del found["type"]
        for name, tier in tiers_of(figures).items():
            found["tiers"][name] = {**found.pop(name), "hit_rate": _hit_rate(tier)}
    if store is not None:
        found["process"] = {"name": store.name, "state": store.state, "pid": store.pid, "cause": store.cause}
    found["workers"] = [{"name": name, **msgspec.to_builtins(tiers)} for name, tiers in workers.items()]
    return found


def _store_text(store: ProcessInfo) -> str:
    """A line on the store, a table of its tiers, and one of the kinds of blocks that share them."""
    figures = store.figures
    if not isinstance(figures, KvStoreFigures):
        return f"{store.name}  {store.state}  says nothing of its tiers"
    words = [store.name, store.state]
    if figures.simulated:
        words.append("simulated: no bytes, and no files")
    if figures.disk.state != "off":
        where = f"{figures.directory}, " if figures.directory else ""
        words.append(f"{where}admits {figures.admission.replace('_', ' ')}")
    words.append(f"{figures.connections} connected")
    words.append(f"{figures.leases} leases")
    if figures.indexing:
        words.append(f"reading the index of {figures.indexing} layouts")
    rows = (_tier_row(name, tier) for name, tier in tiers_of(figures).items())
    tiers = render.table(_TIER_HEADER, rows, right=range(2, len(_TIER_HEADER)))
    parts = [f"{wording.printable('  '.join(words))}\n{tiers}"]
    if figures.layouts:
        parts.append(render.table(_LAYOUT_HEADER, map(_layout_row, figures.layouts), right=range(2, 9)))
    return "\n\n".join(parts)


def _tier_row(name: str, tier: TierFigures) -> tuple[str, ...]:
    if tier.state == "off":
        return (name, tier.state, *("-" for _ in range(11)))
    return (
        name,
        tier.state,
        wording.size(tier.used_bytes),
        wording.size(tier.capacity_bytes),
        f"{tier.blocks:,}",
        wording.size(tier.in_bytes),
        _speed(tier.in_bytes, tier.in_seconds),
        wording.size(tier.out_bytes),
        _speed(tier.out_bytes, tier.out_seconds),
        _percent(_hit_rate(tier)),
        f"{tier.evicted:,}",
        f"{tier.failed:,}",
        f"{sum(tier.dropped.values()):,}",
    )


def _layout_row(layout: KvLayoutFigures) -> tuple[str, ...]:
    return (
        layout.name[:NAME_SHOWN],
        layout.kv_dtype,
        str(layout.block_size),
        wording.size(layout.block_bytes),
        f"{layout.host_blocks:,}",
        f"{layout.host_free:,}",
        f"{layout.host_leased:,}",
        f"{layout.host_writing:,}",
        f"{layout.disk_blocks:,}",
        ", ".join(dict.fromkeys(layout.owners)) or "-",
    )


def _workers_text(workers: dict[str, WorkerTiers]) -> str:
    """A table, then why blocks stayed out, a worker after the other."""
    if not workers:
        return ""
    rows = (_worker_row(name, one) for name, one in workers.items())
    table = render.table(_WORKER_HEADER, rows, right=range(1, len(_WORKER_HEADER)))
    stories = [wording.printable(story) for name, one in workers.items() if (story := _story(name, one))]
    return "\n".join((table, *stories))


def _worker_row(name: str, tiers: WorkerTiers) -> tuple[str, ...]:
    return (
        name,
        f"{tiers.offloaded:,}",
        f"{tiers.known:,}",
        f"{tiers.filtered:,}",
        f"{tiers.unset:,}",
        f"{sum(tiers.dropped.values()):,}",
        f"{tiers.queued:,}",
        _loaded(tiers.host),
        _loaded(tiers.disk),
        f"{tiers.loads:,}",
        f"{tiers.recomputes:,}",
    )


def _loaded(use: TierUse) -> str:
    """Prompt tokens that came from a tier, of those that were there."""
    return f"{use.loaded:,} of {use.matched:,}"


def _story(name: str, tiers: WorkerTiers) -> str:
    parts = [f"keeps priorities from {tiers.min_priority} on"] if tiers.min_priority else []
    parts += [f"offload stopped for {_reasons(tiers.terminated)}"] if any(tiers.terminated.values()) else []
    parts += [f"dropped for {_reasons(tiers.dropped)}"] if any(tiers.dropped.values()) else []
    failed = {"host": tiers.host.failed, "disk": tiers.disk.failed}
    parts += [f"tokens that failed their check: {_reasons(failed)}"] if any(failed.values()) else []
    return f"  {name}: {'; '.join(parts)}" if parts else ""


def _reasons(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda each: -each[1])
    return ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in ordered if count)


def _hit_rate(tier: TierFigures) -> float | None:
    return tier.hits / tier.lookups if tier.lookups else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _speed(size: int, seconds: float) -> str:
    return f"{wording.size(round(size / seconds))}" if seconds > 0 else "-"
