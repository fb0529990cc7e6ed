"""What `options` of a model may hold, by engine, so that a profile is refused before a process starts.

The engines check their options themselves when they start; a test holds these tables to what they accept.
Engines that are not here take any option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_box.profile.values import Impossible
from dynamo_box.profile.wording import nearest, shown

LARGEST_INT = 2**63 - 1  # what a worker's spec can carry
NATIVE_BATCH_TOKENS = 2048  # the native engine's max_batch_tokens where nothing is said


@dataclass(frozen=True)
class Option:
    """`kind` float takes whole numbers too. `least` and `most` are allowed, `above` is not; `words` are the texts that
    are allowed, beside numbers where `kind` is one.
    """

    kind: type[bool] | type[int] | type[float] | type[str]
    least: int | None = None
    above: int | None = None
    most: int = LARGEST_INT
    words: tuple[str, ...] = ()


ENGINE_OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "native": {
        "dtype": Option(str, words=("float32", "float64", "bfloat16")),
        "max_batch_tokens": Option(int, least=1),
    },
    "mock": {
        "prefill_tokens_per_s": Option(float, above=0),
        "decode_ms": Option(float, least=0),
        "speedup": Option(float, above=0, words=("infinite",)),
        "startup_s": Option(float, least=0),
        "chunk_tokens": Option(int, least=1),
        "kv_blocks": Option(int, least=1),
        "kv_bytes_per_token": Option(int, least=1),
        "vocab_size": Option(int, least=1),
        "stop_after": Option(int, least=1),
        "fault": Option(str),
        "late_cancel": Option(bool),
        "parameters": Option(float, above=0),
        "width": Option(int, least=0),
        "weights_bytes": Option(float, above=0),
        "tensor_parallel": Option(int, least=1),
        "flops_per_s": Option(float, above=0),
        "flops_efficiency": Option(float, above=0, most=1),
        "memory_bytes_per_s": Option(float, above=0),
        "memory_efficiency": Option(float, above=0, most=1),
        "link_bytes_per_s": Option(float, above=0),
        "transfer_bytes_per_s": Option(float, above=0),
    },
}


def unknown_options(engine: str, options: Mapping[str, object]) -> dict[str, str]:
    """What to say of each key that the engine doesn't have."""
    known = ENGINE_OPTIONS.get(engine)
    if known is None:
        return {}
    return {key: f'unknown key "{key}"; {nearest(key, known)}' for key in options if key not in known}


def wrong_options(engine: str, options: Mapping[str, object]) -> dict[str, str]:
    """What to say of each value that the engine wouldn't take."""
    known = ENGINE_OPTIONS.get(engine, {})
    complaints = {key: _complaint(known[key], value) for key, value in options.items() if key in known}
    return {key: f'"{key}" {complaint}' for key, complaint in complaints.items() if complaint}


def accepted_by_the_mock(options: dict[str, Any]) -> dict[str, Any]:
    """`options` as they are.

    Raises:
        Impossible: the mock engine wouldn't take them.
    """
    unknown = tuple(((key,), text) for key, text in unknown_options("mock", options).items())
    wrong = [((key,), text) for key, text in wrong_options("mock", options).items()]
    if unknown or wrong:
        raise Impossible(*wrong, unknown=unknown)
    return options


def _complaint(option: Option, value: object) -> str | None:
    if option.kind is bool:
        return None if isinstance(value, bool) else f"must be true or false, not {shown(value)}"
    if isinstance(value, str) and (option.kind is str or value in option.words):
        if not option.words or value in option.words:
            return None
        return f"can't be {shown(value)}; {nearest(value, option.words)}"
    if option.kind is str:
        return f"must be a text (put it into quotes), not {shown(value)}"
    number = isinstance(value, int if option.kind is int else int | float) and not isinstance(value, bool)
    if not number or not isinstance(value, int | float):
        kind = "a whole number" if option.kind is int else "a number"
        return f"must be {' or '.join((kind, *map(shown, option.words)))}, not {shown(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, not {shown(value)}"
    if option.least is not None and value < option.least:
        return f"must be at least {option.least}, not {shown(value)}"
    if option.above is not None and value <= option.above:
        return f"must be above {option.above}, not {shown(value)}"
    return f"must be at most {option.most}" if value > option.most else None
