"""Follow the instance directory from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from watchfiles import awatch

from dynamo_box.discovery.instances import Instance, read_instances


async def watch_instances(directory: Path, stop: asyncio.Event | None = None) -> AsyncIterator[dict[str, Instance]]:
    """Yield all live instances now, and again whenever the directory changes.

    Once a second the directory is read even if nothing changed, since a process can die without touching its file.
    """
    current = read_instances(directory)
    yield current
    async for _ in awatch(
        directory, stop_event=stop, step=10, debounce=50, rust_timeout=1000, yield_on_timeout=True, recursive=False
    ):
        latest = read_instances(directory)
        if latest != current:
            current = latest
            yield current
