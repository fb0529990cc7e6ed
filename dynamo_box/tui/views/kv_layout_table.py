"""KV layouts: what is stored in the tiers for which model, in which shape. Blocks of one never match another."""

from __future__ import annotations

from dynamo_box import wording
from dynamo_box.protocol.figures import KvLayoutFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui import tiers
from dynamo_box.tui.model import Cell, Column, Frame, Lines, Row, Table, Tone
from dynamo_box.tui.text import clip
from dynamo_box.tui.views import cells

KV_LAYOUTS = "kv-layouts"
_HASH_COLUMNS = 12
_OWNERS_SHOWN = 32

_COLUMNS = (
    Column("layout", "KV LAYOUT", least=10, widest=40, help="model whose workers attached; else its fingerprint"),
    Column("fingerprint", "FINGERPRINT", keep=2, least=8, widest=_HASH_COLUMNS, help="of the model's content"),
    Column("dtype", "DTYPE", keep=6, least=8, widest=12),
    cells.number_column("tokens", "BLOCK", keep=3, help="tokens in a block"),
    cells.number_column("block", "BYTES/BLOCK", keep=5),
    cells.number_column("host", "IN HOST", keep=11, help="blocks in host memory, of the slots there"),
    cells.number_column("disk", "ON DISK", keep=10, help="blocks in files"),
    cells.number_column("leased", "LEASED", keep=9, help="slots that someone copies from, and that can't be evicted"),
    cells.number_column("writing", "WRITING", keep=4, help="slots that someone copies into"),
    cells.number_column("owners", "WORKERS", keep=7, help="workers that are attached"),
    Column("who", "ATTACHED", keep=1, least=24, widest=60),
)


def table(frame: Frame) -> Table | None:
    """None in a box without tiers, and while nobody has stored anything."""
    store = tiers.store_of(frame.snapshot)
    if store is None or not store.figures.layouts:
        return None
    rows = [_row(layout, frame.snapshot) for layout in store.figures.layouts]
    return cells.table(KV_LAYOUTS, "KV layouts", _COLUMNS, rows)


def detail(frame: Frame, row: str) -> Lines | None:
    store = tiers.store_of(frame.snapshot)
    layout = next((each for each in store.figures.layouts if each.name == row), None) if store is not None else None
    if layout is None:
        return None
    facts = [
        ("models", cells.text(", ".join(tiers.models_of(frame.snapshot, layout.owners)))),
        ("layout", cells.text(layout.name)),
        ("fingerprint", cells.text(layout.fingerprint)),
        ("dtype", cells.text(layout.kv_dtype)),
        ("tokens in a block", cells.count(layout.block_size)),
        ("bytes in a block", Cell(f"{wording.size(layout.block_bytes)} ({layout.block_bytes:,} B)")),
        ("slots in host memory", cells.count(layout.host_slots)),
        ("blocks in them", cells.count(layout.host_blocks, Tone.HOST)),
        ("free", cells.count(layout.host_free)),
        ("leased", cells.count(layout.host_leased)),
        ("being written", cells.count(layout.host_writing)),
        ("blocks on disk", cells.count(layout.disk_blocks, Tone.DISK)),
        ("attached", cells.text(", ".join(_workers(layout)[:_OWNERS_SHOWN]))),
    ]
    return Lines("kv-layout", _label(layout, frame.snapshot).text, tuple(cells.facts(facts)))


def _row(layout: KvLayoutFigures, snapshot: BoxSnapshot) -> Row:
    return Row(
        layout.name,
        (
            _label(layout, snapshot),
            cells.text(clip(cells.text(layout.fingerprint).text, _HASH_COLUMNS)),
            cells.text(layout.kv_dtype),
            cells.count(layout.block_size),
            cells.size(layout.block_bytes),
            _in_host(layout),
            cells.count(layout.disk_blocks, Tone.DISK),
            cells.count(layout.host_leased),
            cells.count(layout.host_writing) if layout.host_writing else cells.ABSENT,
            cells.count(len(_workers(layout))),
            cells.text(", ".join(_workers(layout)[:_OWNERS_SHOWN])),
        ),
    )


def _workers(layout: KvLayoutFigures) -> list[str]:
    """Each once, however many connections it has."""
    return list(dict.fromkeys(layout.owners))


def _label(layout: KvLayoutFigures, snapshot: BoxSnapshot) -> Cell:
    """Files of a model that isn't served now are known by their fingerprint only."""
    models = tiers.models_of(snapshot, layout.owners)
    return cells.text(", ".join(models) or layout.fingerprint or layout.name)


def _in_host(layout: KvLayoutFigures) -> Cell:
    """`8,123/16,000`: blocks of slots."""
    if not layout.host_slots:
        return cells.ABSENT
    return Cell(f"{layout.host_blocks:,}/{layout.host_slots:,}", Tone.HOST, layout.host_blocks)
