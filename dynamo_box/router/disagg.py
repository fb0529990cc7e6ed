"""The disaggregation policy as text, as people set it while the box runs: `fallback`, or
`conditional:min_uncached_tokens=512,min_uncached_share=0.5`.
"""

from __future__ import annotations

import math
from typing import get_args

from msgspec.structs import replace

from dynamo_box.protocol.spec import Disagg, DisaggPolicy

POLICIES: tuple[DisaggPolicy, ...] = get_args(DisaggPolicy)
MAX_TOKENS = 2**31
"""Largest threshold in tokens."""

_LIMITS: dict[str, float] = {
    "min_uncached_tokens": MAX_TOKENS,
    "min_uncached_share": 1,
    "max_prefill_tokens": MAX_TOKENS,
}


def describe(disagg: Disagg) -> str:
    """What `parse` makes the same of."""
    if disagg.policy != "conditional":
        return disagg.policy
    return f"conditional:{','.join(f'{name}={getattr(disagg, name):.10g}' for name in _LIMITS)}"


def parse(text: str, now: Disagg) -> Disagg:
    """What is in force after `now` if a person sets `text`: thresholds that it doesn't name stay as they are.

    Raises:
        ValueError: it names no policy, or a threshold that can't be.
    """
    name, colon, thresholds = text.partition(":")
    policy = _policy(name.strip())
    if not colon:
        return replace(now, policy=policy)
    if policy != "conditional":
        raise ValueError(f"disagg {text!r}: {policy} has no thresholds; give it without them, or set conditional:…")
    changes: dict[str, float] = {}
    for part in thresholds.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key in changes:
            raise ValueError(f"disagg {text!r}: {key} is there twice; give it once")
        changes[key] = _threshold(key, value)
    return replace(now, policy=policy, **changes)


def problem(disagg: Disagg) -> str:
    """Why these settings can't be used, or "" when they can."""
    try:
        _policy(disagg.policy)
        for name in _LIMITS:
            _threshold(name, str(getattr(disagg, name)))
    except ValueError as error:
        return str(error)
    return ""


def _policy(name: str) -> DisaggPolicy:
    for policy in POLICIES:
        if policy == name:
            return policy
    raise ValueError(f"disagg: no policy {name!r}; there are {', '.join(POLICIES)}")


def _threshold(name: str, text: str) -> float:
    limit = _LIMITS.get(name)
    if limit is None:
        raise ValueError(f"disagg: conditional has no threshold {name!r}; there are {', '.join(_LIMITS)}")
    kind = float if name == "min_uncached_share" else int
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= limit:  # false for NaN
        what = "a number" if kind is float else "a whole number"
        raise ValueError(f"disagg: {name} must be {what} from 0 to {limit:,.0f}, not {text!r}")
    return value
