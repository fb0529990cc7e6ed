"""Where the tokens of prompts came from: the worker's own pool, the box's host or disk tier, or computed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from dynamo_box.protocol.figures import Candidate
from dynamo_box.tui.history import Bucket, History
from dynamo_box.tui.model import Cell, Span, Tone
from dynamo_box.tui.text import spans_width
from dynamo_box.tui.views import cells, charts
from dynamo_box.tui.views.cells import Line

FILLS = (
    ("own pool", "█", Tone.CACHED),
    ("host", "▓", Tone.HOST),
    ("disk", "▒", Tone.DISK),
    ("computed", "·", Tone.FREE),
)
"""In the order in which they follow each other in a prompt; each reads without colour."""
CREDIT_COLUMNS = 12
_WIDEST_BAR = 48
_LEAST_BAR = 8


def credit(candidate: Candidate, prompt_blocks: int, columns: int = CREDIT_COLUMNS) -> Line:
    """A prompt as a bar: what the candidate has itself, what it would load from the tiers, what it would compute."""
    left = max(prompt_blocks, 0)
    sizes = []
    for blocks in (candidate.overlap_blocks, candidate.host_blocks, candidate.disk_blocks):
        sizes.append(min(max(blocks, 0), left))
        left -= sizes[-1]
    return _bar((*sizes, left), columns)


def credit_cell(candidate: Candidate | None, prompt_blocks: int) -> Cell:
    """Sorted by all that need not be computed."""
    if candidate is None or prompt_blocks <= 0:
        return cells.ABSENT
    parts = credit(candidate, prompt_blocks)
    found = candidate.overlap_blocks + candidate.host_blocks + candidate.disk_blocks
    return Cell("".join(span.text for span in parts), Tone.PLAIN, found / prompt_blocks, parts)


def lately(names: Sequence[str], history: History, buckets: int, width: int) -> Line:
    """The prompt tokens of these workers in the last `buckets`, by where they came from."""
    by_worker = [_shares_of(history.recent(name, buckets)) for name in names]
    sizes = [sum(sizes) for sizes in zip(*by_worker, strict=True)]
    label = Span("prompts now ", Tone.DIM)
    whole = sum(sizes)
    if not whole:
        return label, Span("none", Tone.DIM)
    words: list[Span] = []
    for (name, character, tone), size in zip(FILLS, sizes, strict=True):
        words += [Span(f"  {character}", tone), Span(f" {name} ", Tone.DIM), Span(cells.percentage(size / whole), tone)]
    room = min(width - spans_width((label, *words)), _WIDEST_BAR)
    return (label, *(_bar(tuple(sizes), room) if room >= _LEAST_BAR else ()), *words)


def _shares_of(buckets: Iterable[Bucket | None]) -> list[int]:
    """Of one worker: one that goes on from prompts of others loads what it doesn't count as its prompts."""
    there = [bucket for bucket in buckets if bucket is not None]
    return shares(
        sum(bucket.prompt_tokens for bucket in there),
        sum(bucket.cached_tokens for bucket in there),
        sum(bucket.host_tokens for bucket in there),
        sum(bucket.disk_tokens for bucket in there),
    )


def shares(prompt: int, cached: int, host: int, disk: int) -> list[int]:
    """Tokens from the own pool, the host tier, the disk tier, and computed ones: `prompt` in all. A worker counts what
    it loaded from the tiers as cached, too; its counts needn't be of the same moment.
    """
    cached = min(max(cached, 0), max(prompt, 0))
    host = min(max(host, 0), cached)
    disk = min(max(disk, 0), cached - host)
    return [cached - host - disk, host, disk, max(prompt, 0) - cached]


def legend() -> Line:
    return tuple(
        span for name, character, tone in FILLS for span in (Span(f"{character} ", tone), Span(f"{name}  ", Tone.DIM))
    )


@lru_cache(1024)
def _bar(sizes: tuple[int, ...], columns: int) -> Line:
    """The same decisions are drawn in frame after frame."""
    return charts.stacked(
        [(size, character, tone) for size, (_, character, tone) in zip(sizes, FILLS, strict=True)], columns
    )
