"""What a request, and parts of its prompt, are worth: 0 (least) to 100.

One number says two things: who goes first, and which KV the tiers keep. A request that gives none goes with those of
priority 0, while its KV counts as unset, which every threshold allows.
"""

from __future__ import annotations

from dynamo_box.frontend.errors import ApiError, invalid_request
from dynamo_box.frontend.schemas import CommonBody, Nvext
from dynamo_box.protocol.kv import HIGHEST_PRIORITY, LOWEST_PRIORITY
from dynamo_box.protocol.request import PriorityRange

MAX_TOKENS = 2**31 - 1
RANGES = "nvext.kv_priorities"


def read_priority(body: CommonBody) -> int | None:
    """The request's priority, in whichever of its three places it is.

    Raises:
        ApiError: out of range, or two of them contradict each other (400).
    """
    extension = body.nvext or Nvext()
    places = {
        "nvext.agent_hints.priority": extension.agent_hints.priority if extension.agent_hints else None,
        "nvext.priority": extension.priority,
        "priority": body.priority,
    }
    given = {name: value for name, value in places.items() if value is not None}
    for name, value in given.items():
        if not LOWEST_PRIORITY <= value <= HIGHEST_PRIORITY:
            raise _out_of_range(name, value, name)
    if len(set(given.values())) > 1:
        told = " and ".join(f"'{name}' {value}" for name, value in given.items())
        raise invalid_request(f"{told} contradict each other; give one of them", next(iter(given)))
    return next(iter(given.values()), None)


def read_ranges(extension: Nvext) -> tuple[PriorityRange, ...]:
    """Priorities of parts of the prompt, in any order; where they overlap the highest counts.

    An end beyond the prompt is no error here: the prompt's tokens are counted later, and the answer doesn't depend on
    what becomes of its KV.

    Raises:
        ApiError: a range that is empty, backwards or out of bounds (400).
    """
    found = []
    for number, one in enumerate(extension.kv_priorities or ()):
        where = f"{RANGES}[{number}]"
        if not 0 <= one.start < one.end <= MAX_TOKENS:
            raise invalid_request(
                f"'{where}' is from token {one.start} to {one.end}; 'start' must be at least 0 and below 'end', "
                f"and 'end' at most {MAX_TOKENS}",
                RANGES,
            )
        if not LOWEST_PRIORITY <= one.priority <= HIGHEST_PRIORITY:
            raise _out_of_range(f"{where}.priority", one.priority, RANGES)
        found.append(PriorityRange(one.start, one.end, one.priority))
    return tuple(found)


def _out_of_range(name: str, value: int, field: str) -> ApiError:
    return invalid_request(f"'{name}' is {value}; it must be from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}", field)
