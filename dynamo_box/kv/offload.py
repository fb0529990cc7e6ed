"""The priority filter: which of a request's blocks are offered to the tiers. Pure.

A block's priority is the highest among its tokens' (a block is kept for its dearest part): by range where one covers
a token, else the request's own, else unset. Blocks are taken while their priority is at least the threshold; at the
first below it offloading stops for that request, so that what is kept stays a prefix without a break. What was refused
once is judged anew with every request. An unset priority is allowed, and counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_box.protocol.request import PriorityRange


class LengthMismatch(ValueError):
    """The priorities don't fit the tokens or blocks that they were given for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`taken` are places in the batch that was judged. `stopped`: nothing more of this request is offered."""

    taken: tuple[int, ...]
    filtered: int
    unset: int
    stopped: bool


def block_priorities(
    first_block: int,
    count: int,
    *,
    block_size: int,
    prompt_tokens: int,
    priority: int | None,
    ranges: Sequence[PriorityRange] = (),
) -> list[int | None]:
    """Priorities of `count` blocks of a sequence from block `first_block` on. Generated tokens have the request's own.

    Raises:
        LengthMismatch: a range that is empty or reaches beyond the prompt.
    """
    for one in ranges:
        if not 0 <= one.start < one.end <= prompt_tokens:
            raise LengthMismatch(
                f"priorities for tokens {one.start} to {one.end} don't fit a prompt of {prompt_tokens} tokens"
            )
    found: list[int | None] = []
    for block in range(first_block, first_block + count):
        start, end = block * block_size, (block + 1) * block_size
        inside = [one for one in ranges if one.start < end and one.end > start]
        values = [one.priority for one in inside]
        if priority is not None and not _covered(start, end, inside):
            values.append(priority)
        found.append(max(values, default=None))
    return found


def judge(
    priorities: Sequence[int | None],
    blocks: int,
    *,
    min_priority: int,
    continue_after_filter: bool,
    stopped: bool = False,
) -> Verdict:
    """Which of the next `blocks` blocks of a request go to the tiers; `stopped` is what the last verdict said.

    Raises:
        LengthMismatch: not one priority a block.
    """
    if len(priorities) != blocks:
        raise LengthMismatch(f"{len(priorities)} priorities for {blocks} blocks")
    taken: list[int] = []
    filtered = unset = 0
    for place, priority in enumerate(priorities):
        if stopped:
            filtered += 1
        elif priority is None:
            unset += 1
            taken.append(place)
        elif priority >= min_priority:
            taken.append(place)
        else:
            filtered += 1
            stopped = not continue_after_filter
    return Verdict(tuple(taken), filtered, unset, stopped)


def _covered(start: int, end: int, ranges: Sequence[PriorityRange]) -> bool:
    """Whether the ranges leave no token between `start` and `end` out."""
    at = start
    for one in sorted(ranges, key=lambda each: each.start):
        if one.start > at:
            return False
        at = max(at, one.end)
    return at >= end
