"""A connection to another process of the box, made again for as long as this process lives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from dynamo_box.protocol.framing import Channel, connect_channel

FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.5
STABLE_S = 1.0

M = TypeVar("M")


async def keep_connected(
    path: Path, make_channel: Callable[[], Channel[M]], use: Callable[[Channel[M]], Awaitable[None]]
) -> None:
    """Connect and `use` the channel until that returns, again and again until cancelled.

    The pause between attempts doubles, and starts over after a connection that held.
    """
    loop = asyncio.get_running_loop()
    pause_s = FIRST_RETRY_S
    while True:
        try:
            channel = await connect_channel(path, make_channel)
        except OSError:
            pass  # nobody listens there yet, or any more
        else:
            opened = loop.time()
            try:
                await use(channel)
            finally:
                channel.close()
            if loop.time() - opened > STABLE_S:
                pause_s = FIRST_RETRY_S
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, LONGEST_RETRY_S)
