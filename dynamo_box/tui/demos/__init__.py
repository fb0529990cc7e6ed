"""The recordings that ship with the program: `dynbox top --replay NAME`. `tests/bench/make_demos.py` made them."""

from __future__ import annotations

from pathlib import Path

DEMOS = {
    "routed-load": "eight workers under a load with shared prompts: idle, busy, bursts",
    "crash-recovery": "a worker and the router killed under load, and back",
    "sleep-wake": "two models that don't fit awake together take turns; then one sleeps on disk and is woken",
    "disagg": "prompts here, answers there on a rehearsed 70B model; a prefill worker killed under load",
}
SUFFIX = ".dynrec"


def path(name: str) -> Path:
    """Where the recording of the demo `name` lies."""
    return Path(__file__).with_name(name + SUFFIX)
