"""Waiting for futures that belong to somebody else: nothing here cancels what it waits for."""

from __future__ import annotations

import asyncio
from typing import Any


async def first_of(*awaited: asyncio.Future[Any]) -> None:
    """Until one of them is done, in whatever way."""
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)


async def done_within(awaited: asyncio.Future[Any], timeout_s: float) -> bool:
    """Whether it is done before the time is up."""
    await asyncio.wait((awaited,), timeout=timeout_s)
    return awaited.done()


async def set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event is set before the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False
