"""TCP ports for boxes under test."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to whoever connects, so that none is taken between the look and the box's start."""

_random = random.SystemRandom()
"""Test processes that run beside each other, and tests that seed `random`, don't look in the same order."""


def free_port() -> int:
    """One on which nobody listens."""
    for port in _random.sample(PORTS, 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError(f"no free port between {PORTS[0]} and {PORTS[-1]}")
