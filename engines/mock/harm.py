"""What faults do to the process and to what it says."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

from dynamo_box.protocol.request import KvCleared, KvEvent, KvRemoved, KvStored
from engines.log import get_logger

log = get_logger()


def with_wrong_hashes(event: KvEvent) -> KvEvent:
    """Every bit of every hash is the wrong one; number and kind are right."""
    if isinstance(event, KvCleared):
        return event
    wrong = tuple(value ^ 0xFFFF_FFFF_FFFF_FFFF for value in event.hashes)
    if isinstance(event, KvRemoved):
        return KvRemoved(event.event_id, wrong, event.tier)
    return KvStored(event.event_id, wrong, event.parent, event.tier)


def after_flush(action: Callable[[], None]) -> None:
    """Run `action` when what was sent in this turn of the loop is written, which is in the next one."""
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, action)


def die(harm: str) -> None:
    """Carry out "crash" or "freeze"; other harm is done elsewhere."""
    if harm == "crash":
        log.warning("crashing, as told")
        os.kill(os.getpid(), signal.SIGKILL)
    elif harm == "freeze":
        log.warning("freezing, as told")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSTOP)
