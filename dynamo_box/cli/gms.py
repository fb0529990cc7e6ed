"""`dynbox gms`: the weight memory of each device, and who has to do with it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, render, stderr
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode
from dynamo_box.paths import run_dir
from dynamo_box.protocol.figures import GmsFigures, LayoutFigures, LockHolder
from dynamo_box.snapshot import ProcessInfo

app = complete.verb()

HASH_SHOWN = 12


@app.command()
def gms(
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> ExitCode:
    """Show the layouts of each device's weight memory: their state, and who reads, writes and waits since when."""
    with ControlClient.connect(run_dir()) as client:
        snapshot = client.snapshot()
    services = [process for process in snapshot.processes if process.kind == "gms"]
    now = snapshot.at or time.time()
    for service in services:
        if service.state != "ready":
            cause = f": {wording.printable(service.cause)}" if service.cause else ""
            stderr.warn(f"{service.name} is {service.state}{cause}; its readers go on, and what is committed is kept")
    if as_json:
        output.json({"services": [service_json(service, now) for service in services]})
    elif services:
        output.table("\n\n".join(service_text(service, now) for service in services))
    else:
        stderr.say(f"no engine of profile {snapshot.box.profile} shares its weights: there is no service")
    return ExitCode.OK


def service_text(service: ProcessInfo, now: float) -> str:
    """A line on the service, a table of its layouts, and then who and what happened, a layout after the other."""
    figures = service.figures
    if not isinstance(figures, GmsFigures):
        return f"{service.name}  {service.state}  says nothing of its layouts"
    head = (
        f"{service.name}  {service.state}  {figures.device}: {wording.size(figures.device_bytes)} of "
        f"{wording.size(figures.capacity_bytes)}, host {wording.size(figures.host_bytes)} of "
        f"{wording.size(figures.host_capacity_bytes)}, disk {wording.size(figures.disk_bytes)}"
    )
    if not figures.layouts:
        return f"{head}\nno layout yet"
    header = ("LAYOUT", "STATE", "PLACE", "EPOCH", "BYTES", "READERS", "WRITER", "WAITERS", "HASH")
    table = render.table(header, (_row(layout) for layout in figures.layouts), right=(3, 4, 5, 7))
    return "\n\n".join((f"{head}\n{table}", *(_story(layout, now) for layout in figures.layouts)))


def service_json(service: ProcessInfo, now: float) -> dict[str, Any]:
    """The figures as they are, with `writers` as a list like the others, and the age of each hold and wait."""
    figures = service.figures
    found: dict[str, Any] = {"name": service.name, "state": service.state, "pid": service.pid, "cause": service.cause}
    if not isinstance(figures, GmsFigures):
        return {**found, "layouts": []}
    found |= msgspec.to_builtins(figures)
    found.pop("type", None)
    for layout, data in zip(figures.layouts, found["layouts"], strict=True):
        del data["writer"]
        data["writers"] = _holders_json((layout.writer,) if layout.writer else (), now)
        data["readers"] = _holders_json(layout.readers, now)
        data["waiters"] = _holders_json(layout.waiters, now)
    return found


def _row(layout: LayoutFigures) -> tuple[str, ...]:
    return (
        layout.name,
        layout.state,
        f"{layout.place} → {layout.moving}" if layout.moving else layout.place or "-",
        str(layout.epoch),
        wording.size(layout.bytes),
        str(len(layout.readers)),
        layout.writer.owner if layout.writer else "-",
        str(len(layout.waiters)),
        layout.layout_hash[:HASH_SHOWN] or "-",
    )


def _story(layout: LayoutFigures, now: float) -> str:
    rows = [
        *(("reads", holder) for holder in layout.readers),
        *((("writes", layout.writer),) if layout.writer else ()),
        *((f"waits for {holder.lock}", holder) for holder in layout.waiters),
    ]
    lines = [
        f"  {act}  {holder.owner} (pid {holder.pid})  for {wording.duration(_age(holder, now))}" for act, holder in rows
    ]
    lines += [f"  {_clock(event.at)}  {event.text}" for event in layout.history]
    return wording.printable("\n".join((layout.name, *lines)))


def _holders_json(holders: Iterable[LockHolder], now: float) -> list[dict[str, Any]]:
    return [{**msgspec.to_builtins(holder), "age_s": round(_age(holder, now), 3)} for holder in holders]


def _age(holder: LockHolder, now: float) -> float:
    return max(0.0, now - holder.since)


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
