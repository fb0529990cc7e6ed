"""CPU time that watching costs the supervisor: a box on `mock-8gpu` under streaming clients, with and without watchers.

    python tests/bench/snapshot_cost.py [--clients 64] [--seconds 20] [--watchers 0 1 4] [--profile mock-8gpu]

Each watcher is a subscription at 4 Hz. The difference to no watcher is what snapshots cost; the rest is what the
supervisor pays for its children's reports and its own samples. The clients send to the box over real sockets and are
not counted. The model of the profile has to be in the store of `$DYNBOX_HOME`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from box_under_test import Box  # noqa: E402

from dynamo_box.control.client import ControlClient  # noqa: E402
from dynamo_box.paths import RunDir, home  # noqa: E402

TOKENS = 200


async def stream_forever(port: int, model: str, number: int) -> None:
    """One client: a completion after the other, each with a prompt of its own."""
    for turn in range(1_000_000):
        body = {"model": model, "prompt": f"{number} {turn} hello " * 40, "max_tokens": TOKENS, "stream": True}
        data = json.dumps(body | {"ignore_eos": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        )
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        while await reader.read(65536):
            continue
        writer.close()
        await writer.wait_closed()


@contextlib.contextmanager
def load(port: int, model: str, clients: int) -> Iterator[None]:
    loop = asyncio.new_event_loop()

    async def run() -> None:
        await asyncio.gather(*(stream_forever(port, model, number) for number in range(clients)))

    task = loop.create_task(run())

    def until_cancelled() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=until_cancelled)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


class Watcher(threading.Thread):
    """A subscription at 4 Hz that counts."""

    def __init__(self, run_dir: RunDir) -> None:
        super().__init__()
        self.snapshots = 0
        self._run_dir = run_dir
        self._over = threading.Event()

    def run(self) -> None:
        with ControlClient.connect(self._run_dir) as client:
            for _ in client.watch(4.0):
                self.snapshots += 1
                if self._over.is_set():
                    return

    def close(self) -> None:
        self._over.set()
        self.join()


def measure(box: Box, watchers: int, seconds: float) -> float:
    """Share of a core."""
    supervisor = psutil.Process(box.ps()["box"]["pid"])
    watching = [Watcher(RunDir(box.run_dir)) for _ in range(watchers)]
    for watcher in watching:
        watcher.start()
    before = supervisor.cpu_times()
    threading.Event().wait(seconds)
    after = supervisor.cpu_times()
    rate = sum(watcher.snapshots for watcher in watching) / seconds
    share = (after.user - before.user + after.system - before.system) / seconds
    print(f"{watchers} watchers: {share:.2%} of a core, {rate:.1f} snapshots/s", flush=True)
    for watcher in watching:
        watcher.close()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--watchers", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--profile", default="mock-8gpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        box = Box(Path(root) / "run", home().models.parent)
        try:
            box.up(options.profile)
            with load(box.port, box.ps()["models"][0]["name"], options.clients):
                shares = {count: measure(box, count, options.seconds) for count in options.watchers}
        finally:
            box.destroy()
    if 0 in shares:
        for count, share in shares.items():
            if count:
                print(f"snapshots to {count}: {share - shares[0]:.2%} of a core")


if __name__ == "__main__":
    main()
