"""What a box lives on: its devices, the machine itself and its disks, as one table, and all that is known of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamo_box import wording
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.snapshot import BoxSnapshot, DeviceFigures, DeviceInfo, DiskInfo, ProcessInfo
from dynamo_box.tui.host import HOST, HOST_KINDS, Host, host_of
from dynamo_box.tui.model import Cell, Column, Lines, Row, Table, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import cells

DEVICES = "devices"
_DISK = "disk "
_BAR_COLUMNS = 8
_ALMOST_FULL, _FULL = 0.9, 0.97
_HOT_C, _TOO_HOT_C = 85.0, 92.0
"""From where a temperature is marked: data-centre GPUs slow down by themselves a little above."""

_COLUMNS = (
    Column("device", "DEVICE", least=14, widest=26),
    Column("name", "NAME", keep=2, least=8, widest=44),
    cells.number_column("used", "USED", keep=12, help="bytes in use by anyone, of all of them"),
    cells.number_column("box", "BOX", keep=6, help="of these, this box's"),
    cells.number_column("others", "OTHERS", keep=4, help="of these, other processes'"),
    cells.number_column("planned", "PLANNED", keep=3, help="what the plan set aside"),
    Column("utilisation", "UTILISATION", keep=9, least=13, help="share of the last second in which it worked"),
    cells.number_column("power", "POWER", keep=7, help="power drawn, of what it may draw"),
    cells.number_column("temperature", "TEMP", keep=8),
    Column("throttled", "THROTTLED", keep=10, least=9, widest=40, help="why it runs slower than it could"),
    Column("errors", "ERRORS", keep=11, least=12, widest=60),
)


def table(snapshot: BoxSnapshot) -> Table | None:
    """None if nothing is known of what the box lives on."""
    names = cells.device_names(snapshot.devices)
    rows = [_device_row(device, names) for device in snapshot.devices if device.kind not in HOST_KINDS]
    host = host_of(snapshot)
    if host is not None:
        rows.append(_host_row(host))
    rows.extend(_disk_row(disk) for disk in snapshot.disks)
    return cells.table(DEVICES, "Devices", _COLUMNS, rows) if rows else None


def detail(snapshot: BoxSnapshot, row: str) -> Lines | None:
    """All that is known of the device, the machine or the disk in this row."""
    if row == HOST:
        host = host_of(snapshot)
        return None if host is None else _host_lines(host, snapshot)
    disk = next((each for each in snapshot.disks if _DISK + each.path == row), None)
    if disk is not None:
        return _disk_lines(disk)
    device = next((each for each in snapshot.devices if each.id == row), None)
    return None if device is None else _device_lines(device, snapshot)


# rows


def _device_row(device: DeviceInfo, names: Mapping[str, str]) -> Row:
    figures = device.figures or DeviceFigures()
    used = cells.size_of(figures.used_bytes, device.memory_bytes)
    return _row(device.id, cells.name(names[device.id]), _model(device), used, device.planned_bytes, figures)


def _host_row(host: Host) -> Row:
    figures = host.figures or DeviceFigures()
    used = figures.used_bytes
    in_use = cells.size_of(used, host.total, _fullness(used, host.total))
    return _row(HOST, cells.name(HOST), cells.text(host.name), in_use, host.planned, figures)


def _disk_row(disk: DiskInfo) -> Row:
    used = disk.total_bytes - disk.free_bytes
    in_use = cells.size_of(used, disk.total_bytes, _fullness(used, disk.total_bytes))
    figures = DeviceFigures(box_bytes=disk.box_bytes)
    return _row(_DISK + disk.path, cells.name(disk.path), cells.text(disk.purpose), in_use, {}, figures)


def _row(key: str, label: Cell, name: Cell, used: Cell, planned: dict[str, int], figures: DeviceFigures) -> Row:
    return Row(
        key,
        (
            label,
            name,
            used,
            cells.size(figures.box_bytes),
            cells.size(figures.other_bytes, Tone.OTHER),
            cells.size(sum(planned.values())) if planned else cells.ABSENT,
            cells.bar(figures.utilisation, _BAR_COLUMNS),
            _power(figures),
            _temperature(figures.temperature_c),
            cells.text(", ".join(figures.throttled), Tone.WARN),
            cells.text(", ".join(figures.errors), Tone.BAD),
        ),
    )


def _model(device: DeviceInfo) -> Cell:
    return cells.text(f"{device.name} (simulated)" if device.kind == "simulated" else device.name)


def _power(figures: DeviceFigures) -> Cell:
    drawn, limit = figures.power_w, figures.power_limit_w
    if drawn is None:
        return cells.ABSENT
    return Cell(f"{drawn:.0f} W" if limit is None else f"{drawn:.0f}/{limit:.0f} W", Tone.PLAIN, drawn)


def _temperature(celsius: float | None) -> Cell:
    if celsius is None:
        return cells.ABSENT
    tone = Tone.BAD if celsius >= _TOO_HOT_C else Tone.WARN if celsius >= _HOT_C else Tone.PLAIN
    return Cell(f"{celsius:.0f}°C", tone, celsius)


def _fullness(used: int | None, total: int | None) -> Tone:
    """A host or a disk that runs full stops the box; a GPU is meant to be full."""
    if used is None or not total:
        return Tone.PLAIN
    return Tone.BAD if used >= total * _FULL else Tone.WARN if used >= total * _ALMOST_FULL else Tone.PLAIN


# details


def _device_lines(device: DeviceInfo, snapshot: BoxSnapshot) -> Lines:
    figures = device.figures or DeviceFigures()
    lines = cells.facts(
        [
            ("name", _model(device)),
            ("id", cells.text(device.id)),
            ("kind", cells.text(device.kind)),
            ("memory", cells.size(device.memory_bytes)),
            *_figures(figures, device.memory_bytes),
        ]
    )
    if device.figures is None:
        lines.append(cells.remark("Nothing reads this device: what is used of it isn't known."))
    lines += _planned(device.planned_bytes)
    lines += _tenants(snapshot.processes, (device.id,))
    return Lines(DEVICES, one_line(device.id), tuple(lines))


def _host_lines(host: Host, snapshot: BoxSnapshot) -> Lines:
    figures = host.figures or DeviceFigures()
    facts = [("name", cells.text(host.name)), ("memory", cells.size(host.total)), *_figures(figures, host.total)]
    lines = [*cells.facts(facts), *_planned(host.planned), *_tenants(snapshot.processes, host.ids)]
    return Lines(DEVICES, HOST, tuple(lines))


def _disk_lines(disk: DiskInfo) -> Lines:
    facts = [
        ("purpose", cells.text(disk.purpose)),
        ("size", cells.size(disk.total_bytes)),
        ("free", cells.size(disk.free_bytes, _fullness(disk.total_bytes - disk.free_bytes, disk.total_bytes))),
        ("this box", cells.size(disk.box_bytes)),
    ]
    return Lines(DEVICES, one_line(disk.path), tuple(cells.facts(facts)))


def _figures(figures: DeviceFigures, total: int | None) -> list[tuple[str, Cell]]:
    known = (figures.used_bytes, figures.box_bytes, figures.other_bytes)
    unattributed = free = None
    if known[0] is not None:
        free = None if total is None else max(total - known[0], 0)
        if known[1] is not None and known[2] is not None:
            unattributed = max(known[0] - known[1] - known[2], 0)
    return [
        ("used", cells.size(figures.used_bytes)),
        ("this box", cells.size(figures.box_bytes)),
        ("other processes", cells.size(figures.other_bytes)),
        ("unattributed", cells.size(unattributed)),
        ("free", cells.size(free)),
        ("utilisation", cells.bar(figures.utilisation, 2 * _BAR_COLUMNS)),
        ("power", _power(figures)),
        ("temperature", _temperature(figures.temperature_c)),
        *(("throttled", cells.text(reason, Tone.WARN)) for reason in figures.throttled),
        *(("error", cells.text(error, Tone.BAD)) for error in figures.errors),
    ]


def _planned(planned: dict[str, int]) -> list[cells.Line]:
    if not planned:
        return []
    return cells.section("Planned", cells.facts((one_line(key), cells.size(size)) for key, size in planned.items()))


def _tenants(processes: Sequence[ProcessInfo], ids: Sequence[str]) -> list[cells.Line]:
    """Who is on the device, and what they say they hold of it."""
    tenants = [each for each in processes if each.device and not set(each.device.split(",")).isdisjoint(ids)]
    if not tenants:
        return []
    return cells.section("Processes", cells.facts((one_line(each.name), _holding(each)) for each in tenants))


def _holding(process: ProcessInfo) -> Cell:
    parts = [process.state]
    if isinstance(process.figures, WorkerFigures):
        weights, kv = process.figures.weights_bytes, process.figures.kv_bytes
        parts += [f"weights {wording.size(weights)}"] if weights is not None else []
        parts += [f"KV {wording.size(kv)}"] if kv is not None else []
    return cells.text("  ".join(parts), cells.STATE_TONES.get(process.state, Tone.PLAIN))
